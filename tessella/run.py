"""From a folder of images to a model: `tessella run CONFIG [--key value ...]`."""

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs import ConfigError, Problem, run
from configs.files import make_folder, read_json, write_json
from configs.hub import check_push
from tessella.budget import seconds_per_step
from tessella.config import RunConfig
from tessella.processes import Child, number_of_gpus
from tessella.steps import Step, building_step, check, evaluation_step, push_step, training_steps

# Of a budget in minutes: the share that is spent when the tokenizer is trained, and when the prior is. A training gets
# the smallest share in any case, for the steps before it may have taken longer than expected.
SPENT_AFTER = {"train-tokenizer": 0.45, "train-prior": 0.9}
SMALLEST_SHARE = 0.2
FEWEST_STEPS = 20
PROGRESS_NAME, TRIAL_NAME = "progress.json", ".trial"


def main(config: RunConfig) -> None:
    """Runs all steps that have not finished.

    Raises:
        ConfigError: the settings of a step are wrong, or an upload would fail.
        SystemExit: a step failed or was stopped, with its exit code.
    """
    gpus = number_of_gpus()
    trainings = training_steps(config, gpus)
    for step in trainings:
        if config.steps is not None:
            step.keys["max_steps"] = config.steps
    check(trainings)
    make_folder(config.output_dir)  # fails here, not in each step
    if config.push is not None:
        check_push(config.push, license=config.license, field="push")  # now, not after hours of training
    steps: list[Callable[[], Step]] = [
        *(lambda step=step: step for step in trainings),  # type: ignore[misc]
        lambda: building_step(config),
        lambda: evaluation_step(config, gpus),
    ]
    if config.push is not None:
        steps.append(lambda: push_step(config))
    progress = Progress(config, gpus, len(steps))
    for number, describe in enumerate(steps, 1):
        progress.do(number, describe())
    pipeline = str(Path(config.output_dir, "pipeline"))
    print(f"\nThe model is in {pipeline}, metrics and pictures are in {config.output_dir}.")
    print(f"More images: tessella generate {shlex.quote(pipeline)} --num_images 16 --grid images.png")


class Progress:
    """What the run has done so far. progress.json records it: the command of each finished step and its seconds.

    Args:
        config: settings of the run.
        gpus: number of GPUs.
        total: number of steps.
    """

    def __init__(self, config: RunConfig, gpus: int, total: int):
        self.config, self.gpus, self.total = config, gpus, total
        self.folder = Path(config.output_dir)
        self.all_skipped = True
        path = self.folder / PROGRESS_NAME
        self.values: dict[str, Any] = (
            read_json(path) if path.is_file() else {"done": {}, "seconds": {}, "max_steps": {}}
        )

    def do(self, number: int, step: Step) -> None:
        """Runs a step, unless it has finished with the same command and no earlier step has run again.

        A step that runs again decides itself whether its folder holds a finished or another run.

        Raises:
            SystemExit: the step failed or was stopped, with its exit code.
        """
        title = f"[{number}/{self.total}] {step.name}"
        self.within_budget(step, title)
        command = step.command(self.gpus)
        if self.all_skipped and self.values["done"].get(step.name) == command and step.result.is_file():
            print(f"{title}: done before", flush=True)
            return
        self.all_skipped = False
        print(f"{title}\n      {command}", flush=True)
        started = time.monotonic()
        child = Child(step, self.gpus)
        with child.running() as process:
            code = child.exit_code(process)
        self.spend(step, started)
        if code:
            stop(title, code, child.stopped_by is not None or code in (130, 143))
        self.values["done"][step.name] = command
        self.save()
        if child.stopped_by is not None:  # too late for the step, which has finished
            print(f"\nstopped after {title}; the same command goes on from there", file=sys.stderr)
            sys.exit(128 + child.stopped_by)

    def within_budget(self, step: Step, title: str) -> None:
        """Sets the max_steps of a training by the budget in minutes. Those found before are taken again.

        Raises:
            ConfigError: the budget is too short.
            SystemExit: a training on trial failed or was stopped.
        """
        minutes = self.config.minutes
        if minutes is None or step.name not in SPENT_AFTER:
            return
        found, key = self.values["max_steps"], f"{step.name} in {self.config.budget}"
        if key not in found:
            print(f"{title}: timing a few steps", flush=True)
            started = time.monotonic()
            each = seconds_per_step(step, make_folder(self.folder) / TRIAL_NAME, self.gpus)
            self.spend(step, started)
            left = minutes * SPENT_AFTER[step.name] - sum(self.values["seconds"].values()) / 60
            left = max(left, minutes * SMALLEST_SHARE)
            found[key] = int(60 * left / each)
            print(f"      a step takes {each:.2f} s: {found[key]:,} steps in {left:.1f} minutes", flush=True)
        if found[key] < FEWEST_STEPS:
            message = f"received {self.config.budget!r}; leaves {found[key]} steps to {step.name}; give more time"
            raise ConfigError([Problem("budget", message)])
        step.keys["max_steps"] = found[key]

    def spend(self, step: Step, started: float) -> None:
        """Records the time that a step has taken since `started`."""
        seconds = self.values["seconds"]
        seconds[step.name] = round(seconds.get(step.name, 0) + time.monotonic() - started, 1)
        self.save()

    def save(self) -> None:
        """Writes progress.json."""
        make_folder(self.folder)
        write_json(self.folder / PROGRESS_NAME, self.values)


def stop(title: str, code: int, on_request: bool) -> None:
    """Exits with the exit code of a step. A step that was stopped on request has said so in its last line."""
    if not on_request:
        advice = (
            "mend what it says above, then start the same command again: what has finished is skipped; "
            "a key that `tessella run` does not have goes into the step's own command, above"
        )
        print(f"{title} ended with exit code {code}; {advice}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    run(RunConfig, main, "python -m tessella.run")
