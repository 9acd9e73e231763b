"""A run's folder: the resolved configuration it was started with, checkpoints, logs, and at the end the results."""

import contextlib
import json
import logging
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml

from configs.checkpoints import Checkpoint, complete_checkpoints, find_checkpoint, publish, remove_unfinished
from configs.files import write_json, write_text
from configs.folder_lock import held
from configs.interruption import Stopped
from configs.loader import save_config, to_dict
from configs.problems import ConfigError, Problem

CONFIG_NAME = "config.yaml"
RESULTS_NAME = "train_results.json"
LOG_NAME = "metrics.jsonl"
ALLOW = "give --allow_config_changes true"

# What may change when a run goes on: none of it has an influence on the result.
FREE_KEYS = {
    "data.max_skipped_fraction",
    "output_dir",
    "logging_steps",
    "num_sample_images",
    "save_steps",
    "save_total_limit",
    "resume_from_checkpoint",
    "allow_config_changes",
    "dataloader_num_workers",
    "report_to",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
}

logger = logging.getLogger(__name__)


def holds_work(folder: str | Path) -> bool:
    """Whether a run's folder holds something to go on from: checkpoints or results."""
    return (Path(folder) / RESULTS_NAME).is_file() or bool(complete_checkpoints(folder))


class RunFolder:
    """The folder of a run, new or going on, held by this job while it is open; for every process of the run.

    Args:
        config: the resolved settings.
        is_main_process: the one that writes what all share.

    Raises:
        ConfigError: on entering, if another job holds the folder, or it holds a run that was started with other
            settings, unless `config.allow_config_changes`.
    """

    def __init__(self, config: Any, is_main_process: bool = True):
        self.config, self.is_main_process = config, is_main_process
        self.path = Path(config.output_dir)
        self._lock = held(self.path, "output_dir") if is_main_process else nullcontext()
        self._started = time.perf_counter()

    def __enter__(self) -> "RunFolder":
        self._lock.__enter__()
        try:
            if holds_work(self.path):
                self._compare(self.path / CONFIG_NAME)
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, *exception: Any) -> None:
        self._lock.__exit__(*exception)

    @property
    def finished(self) -> dict[str, Any] | None:
        """The results, if the run has done all its steps, or has stopped early by the same patience."""
        try:
            results = json.loads((self.path / RESULTS_NAME).read_text())
        except FileNotFoundError:
            return None
        patience = results.get("early_stopping_patience")
        is_over = patience is not None and patience == self.config.early_stopping_patience
        return results if is_over or results["global_step"] >= self.config.max_steps else None

    @property
    def seconds(self) -> float:
        """Spent on the run so far, over all its sessions."""
        return time.perf_counter() - self._started

    def begin(self, num_processes: int) -> Checkpoint | None:
        """The complete checkpoint to go on from, see `find_checkpoint`; None to start anew.

        To be called when all else has been found in order: only now the folder is changed. The settings become those of
        the run, and the logs are cut back to the checkpoint.

        Raises:
            ConfigError: see `find_checkpoint`; or the number of processes, or settings of the run it is from, differ.
        """
        config = self.config
        found = find_checkpoint(self.path, config.resume_from_checkpoint, config.max_steps)
        if found is not None:
            self._check_origin(found, num_processes)
            self._started -= found.seconds
        if self.is_main_process:
            remove_unfinished(self.path)
            (self.path / RESULTS_NAME).unlink(missing_ok=True)
            save_config(config, self.path / CONFIG_NAME)
            self._cut_log(found.step if found is not None else 0)
        return found

    def _check_origin(self, found: Checkpoint, num_processes: int) -> None:
        if found.path.parent.resolve() != self.path.resolve():
            self._compare(found.path.parent / CONFIG_NAME)
        if found.num_processes != num_processes and not self.config.allow_config_changes:
            message = f"received {num_processes}, but {found.path} was saved by {found.num_processes}"
            advice = f"batches would change; launch as before, or {ALLOW}"
            raise ConfigError([Problem("number of processes", f"{message}: {advice}")])

    def publish(self, step: int, num_processes: int) -> Path:
        """Completes the checkpoint that all processes have written at `unfinished_path`; for the main process."""
        return publish(self.path, step, num_processes, self.seconds, self.config.save_total_limit)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Adds a line to metrics.jsonl; for the main process."""
        with open(self.path / LOG_NAME, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def save_image(self, name: str, image: Any, step: int) -> None:
        """Saves a PIL image as `name/step_00001000.png`; for the main process."""
        folder = self.path / name
        folder.mkdir(exist_ok=True)
        image.save(folder / f"step_{step:08d}.png")

    def finish(self, results: dict[str, Any]) -> None:
        """Writes the results, which marks the run as finished; for the main process."""
        write_json(self.path / RESULTS_NAME, results)

    def stopped(self, step: int, signal_number: int) -> Stopped:
        """What to raise when the run ends early on request, with its checkpoint saved."""
        message = f"stopped after step {step} of {self.config.max_steps}, which is saved in {self.path}"
        return Stopped(f"{message}; the same command goes on from there", signal_number)

    def _compare(self, path: Path) -> None:
        """Refuses settings other than those in a config.yaml, if it is there."""
        if not path.is_file():
            return
        differences = list(_differences(yaml.safe_load(path.read_text()), to_dict(self.config)))
        if not differences:
            return
        if self.config.allow_config_changes:
            if self.is_main_process:
                changes = ", ".join(f"{key}: {old!r} -> {new!r}" for key, old, new in differences)
                logger.warning("going on with changed settings: %s", changes)
            return
        advice = f"choose another output_dir, remove {path.parent} to start over, or {ALLOW}"
        raise ConfigError(
            [Problem("output_dir", advice)]  # first: a long list is cut
            + [Problem(key, f"the run was started with {old!r}, now it is {new!r}") for key, old, new in differences],
            f"{path.parent} holds a run with other settings",
        )

    def _cut_log(self, step: int) -> None:
        """Removes what was logged after a step, which will be logged again."""
        path = self.path / LOG_NAME
        if not path.is_file():
            return
        kept = []
        for line in path.read_text().splitlines(keepends=True):
            with contextlib.suppress(ValueError):  # the last line may be cut off
                if json.loads(line)["step"] <= step:
                    kept.append(line)
        write_text(path, "".join(kept))


def _differences(old: Any, new: Any, prefix: str = "") -> Any:
    for key in sorted({*old, *new}):
        if f"{prefix}{key}" in FREE_KEYS:
            continue
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key}", before, after
