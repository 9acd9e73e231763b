"""Both stages of a preset within some minutes, evaluated:
`python -m benchmarks.recipes fashion_mnist --data FOLDER [--minutes 10] [--original | --diffusers]`.

The recipe runs tokenizer training, encoding, prior training and evaluation, by the public functions and with the
settings of the preset. A short run measures the speed of each training, which determines the number of steps that fit
into its share of the minutes. Warm-up and the start of the adversarial loss scale with the number of steps. The minutes
do not include these measurements. After an interruption, the same command continues with the same numbers of steps.

FOLDER holds the parquet files of both splits. `--perceptual none` trains without LPIPS, `random` with LPIPS on a random
network, and `pretrained` with torchvision's weights.

`--original` trains the recipe of the original (Esser et al. 2021 and the released code) in the same minutes;
`benchmarks.original_settings` lists its settings.

`--diffusers` trains the `VQModel` of diffusers in the minutes of the tokenizer, by the losses of its example, and the
prior of the preset on its codes. `benchmarks.diffusers_vqmodel` says what is as in the example. An interrupted training
of the `VQModel` starts anew. It needs `pip install 'tessella[convert]'`.

The output folder gets `results.json`, `samples.png` and `reconstructions.png`, the folder `--runs` models and logs.
TQDM_MININTERVAL=60 reduces the progress bars to one line per minute.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import original_settings
from benchmarks.machine import environment
from benchmarks.report import table, write
from benchmarks.stages import (
    GUIDANCE_SCALE,
    Folders,
    add_settings,
    evaluation_values,
    read_settings,
    report,
    stage1_values,
    stage2_values,
)
from configs import ConfigError, TrainingConfig, load_config, to_dict
from configs.files import write_json
from configs.interruption import Stopped
from configs.run_folder import LOG_NAME, RESULTS_NAME
from pipelines.build import BuildConfig, build
from pipelines.evaluate import EvaluationConfig, evaluate
from stage1_vqgan import Stage1Config
from stage1_vqgan.convert.command import NO_DIFFUSERS
from stage1_vqgan.training.run import train as train_tokenizer
from stage2_prior import Stage2Config
from stage2_prior.tokenize import tokenize
from stage2_prior.training.run import train as train_prior

# Fractions of the minutes for the tokenizer and for the evaluation. The prior gets the rest.
TOKENIZER_SHARE = 0.5
EVALUATION_SHARE = 0.1

# Fraction of the time of a training for its steps. The rest is for checkpoints and evaluations, which are not measured.
MARGIN = 0.92

# Number of evaluations: the prior of the best one is saved; the tokenizer is evaluated once, at the end.
PRIOR_EVALUATIONS = 5
CHECKPOINTS = 8

PERCEPTUAL: dict[str, dict[str, Any]] = {
    "none": {"loss.perceptual_weight": 0},
    "random": {"loss.lpips_weights": "random"},
    "pretrained": {},
}


@dataclass(frozen=True)
class Speed:
    """Speed of a training: seconds of a step, and fixed seconds that do not depend on the number of steps."""

    step: float
    fixed: float

    def steps_within(self, seconds: float) -> int:
        """Number of optimizer steps, at least 10, that fit into `seconds` with the fixed part."""
        return max(10, int(MARGIN * (seconds - self.fixed) / self.step))


def stage1_config(args: argparse.Namespace, **changes: Any) -> Stage1Config:
    """The settings of the tokenizer; `changes` override all others."""
    preset = f"{args.preset}/stage1"
    values = PERCEPTUAL[args.perceptual] | stage1_values(args, Folders.within(args.runs))
    if args.original:
        values |= original_settings.of_stage1(load_config(Stage1Config, preset, values))
    return load_config(Stage1Config, preset, values | changes)


def stage2_config(args: argparse.Namespace, **changes: Any) -> Stage2Config:
    """The settings of code store and prior; `changes` override all others."""
    preset, values = f"{args.preset}/stage2", stage2_values(args, Folders.within(args.runs))
    if args.original:
        values |= original_settings.of_stage2(load_config(Stage2Config, preset, values))
    return load_config(Stage2Config, preset, values | changes)


def evaluation_config(args: argparse.Namespace) -> EvaluationConfig:
    """The settings of the evaluation."""
    values = {"guidance_scale": 1.0 if args.original else GUIDANCE_SCALE}
    values |= evaluation_values(args, Folders.within(args.runs))
    return load_config(EvaluationConfig, f"{args.preset}/evaluate", values)


def scaled(config: TrainingConfig, steps: int, evaluations: int) -> dict[str, Any]:
    """The settings of a configuration that depend on the number of steps."""
    share = steps / config.max_steps
    changes: dict[str, Any] = {
        "max_steps": steps,
        "warmup_steps": round(share * config.warmup_steps),
        "logging_steps": max(1, steps // 20),
        "eval_steps": -(-steps // evaluations),
        "save_steps": max(1, steps // CHECKPOINTS),
    }
    if isinstance(config, Stage1Config):
        for name in ("discriminator_start_step", "adversarial_start_step"):
            changes[f"loss.{name}"] = round(share * getattr(config.loss, name))
    return changes


def measured_speed(
    make: Callable[..., TrainingConfig], train: Callable[[Any], object], rate: str, steps: int, length: int = 1
) -> Speed:
    """Measures the speed of a stage in a short run, which is then removed.

    Args:
        make: returns the configuration of the stage with some changes.
        train: trains the stage.
        rate: name of the logged speed, in images, or in tokens of which an image has `length`.
        steps: number of steps of the run; the last quarter is timed.
    """
    with tempfile.TemporaryDirectory() as folder:
        starts = {} if "images" not in rate else {"loss.discriminator_start_step": 0, "loss.adversarial_start_step": 0}
        every = {"logging_steps": max(1, steps // 4), "eval_steps": steps, "save_steps": steps}
        config = make(output_dir=folder, max_steps=steps, warmup_steps=0, **every, **starts)
        started = time.perf_counter()
        train(config)
        seconds = time.perf_counter() - started
        logs = [json.loads(line) for line in (Path(folder) / LOG_NAME).read_text().splitlines()]
    per_second = [log[rate] for log in logs if rate in log][-1]
    step = config.per_device_train_batch_size * length / per_second
    return Speed(step, max(0.0, seconds - steps * step))


class Decisions:
    """The numbers of steps and the measured speeds, saved in a file, so that an interrupted recipe reuses them."""

    def __init__(self, path: Path):
        self.path = path
        self.known: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.is_file() else {}

    def steps(self, stage: str, seconds: float, measure: Callable[[], Speed]) -> int:
        """Number of steps of a stage that may take `seconds`. Measures the speed if the file lacks it."""
        if stage not in self.known:
            started = time.perf_counter()
            speed = measure()
            decision = {
                "steps": speed.steps_within(seconds),
                "step_ms": round(1000 * speed.step, 2),
                "fixed_seconds": round(speed.fixed, 1),
                "measuring_seconds": round(time.perf_counter() - started, 1),
            }
            self.record(stage, decision)
        report(f"{stage}: {self.known[stage]}, in {seconds / 60:.1f} minutes")
        return int(self.known[stage]["steps"])

    def record(self, stage: str, decision: dict[str, float]) -> None:
        """Saves the numbers of a stage."""
        self.known[stage] = decision
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.known)


def run_tokenizer(args: argparse.Namespace, decisions: Decisions, seconds: float) -> Stage1Config:
    """Trains the tokenizer of the preset or of the original in `seconds`; returns its settings."""
    make = partial(stage1_config, args)
    steps = decisions.steps(
        "stage1", seconds, lambda: measured_speed(make, train_tokenizer, "images_per_second", args.probe_steps)
    )
    config = make(**scaled(make(), steps, 1))
    train_tokenizer(config)
    return config


def run_diffusers(args: argparse.Namespace, decisions: Decisions, seconds: float) -> Stage1Config:
    """Trains the `VQModel` of diffusers in `seconds`, unless this was done; returns the settings of sizes and data."""
    config = stage1_config(args)
    if "stage1" not in decisions.known:
        from benchmarks import diffusers_vqmodel

        decisions.record("stage1", diffusers_vqmodel.train(config, seconds))
    return config


def run_recipe(args: argparse.Namespace) -> dict[str, Any]:
    """Runs a recipe, or continues an interrupted one; returns its results."""
    decisions, seconds = Decisions(args.runs / "steps.json"), 60 * args.minutes
    make_stage2 = partial(stage2_config, args)

    run_stage1 = run_diffusers if args.diffusers else run_tokenizer
    stage1 = run_stage1(args, decisions, TOKENIZER_SHARE * seconds)
    store = tokenize(make_stage2())

    spent = json.loads((args.runs / "vqgan" / RESULTS_NAME).read_text())["train_runtime"] + store.manifest["seconds"]
    length = store.layout.length
    steps = decisions.steps(
        "stage2",
        (1 - EVALUATION_SHARE) * seconds - spent,
        lambda: measured_speed(make_stage2, train_prior, "tokens_per_second", args.probe_steps, length),
    )
    stage2 = make_stage2(**scaled(make_stage2(), steps, PRIOR_EVALUATIONS))
    train_prior(stage2)
    build(BuildConfig(tokenizer=stage1.output_dir, prior=stage2.output_dir, output_dir=str(args.runs / "pipeline")))
    evaluation = evaluation_config(args)
    metrics = evaluate(evaluation)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "recipe": args.preset,
        "original": args.original,
        "diffusers": args.diffusers,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": {"device": device, **environment()},
        "minutes": {step: round(took / 60, 2) for step, took in metrics["seconds"].items()},
        "decisions": decisions.known,
        "metrics": {name: value for name, value in metrics.items() if name not in ("inputs", "seconds")},
        "prior": json.loads((args.runs / "prior" / RESULTS_NAME).read_text()),
        "settings": {"stage1": to_dict(stage1), "stage2": to_dict(stage2), "evaluation": to_dict(evaluation)},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recipes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", help="fashion_mnist, cifar10, or another folder with the three presets")
    parser.add_argument("--data", required=True, help="folder of the parquet files, or another value of data.dataset")
    parser.add_argument("--minutes", type=float, default=10.0)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--original", action="store_true", help="train the recipe of the original")
    kind.add_argument(
        "--diffusers", action="store_true", help="train the VQModel of diffusers in place of our tokenizer"
    )
    parser.add_argument("--perceptual", choices=PERCEPTUAL, default="none")
    parser.add_argument("--num_workers", type=int, default=min(15, (os.cpu_count() or 1) - 1))
    parser.add_argument("--probe_steps", type=int, default=80, help="steps of the runs that measure the speed")
    add_settings(parser)
    parser.add_argument("--runs", default="runs/recipes", help="folder of models and logs")
    parser.add_argument("--output_dir", default="runs/benchmarks/recipes", help="folder of results and pictures")
    args = parser.parse_args(arguments)
    if args.diffusers and find_spec("diffusers") is None:
        parser.error(f"--diffusers: {NO_DIFFUSERS}")
    if args.diffusers and args.perceptual != "none":
        parser.error(f"--perceptual: received {args.perceptual}; --diffusers trains without LPIPS, so take none")
    name = args.preset + ("-original" if args.original else "-diffusers" if args.diffusers else "")
    args.runs, output = Path(args.runs) / name, Path(args.output_dir) / name
    read_settings(args)
    try:
        result = run_recipe(args)
    except (ConfigError, Stopped) as error:
        report(str(error))
        sys.exit(error.exit_code if isinstance(error, Stopped) else 2)
    output.mkdir(parents=True, exist_ok=True)
    for picture in ("samples.png", "reconstructions.png"):
        shutil.copy(args.runs / "evaluation" / picture, output)
    rows = [{"what": f"{step}, minutes", name: took} for step, took in result["minutes"].items()]
    figures = {key: value for key, value in result["metrics"].items() if not isinstance(value, dict)}
    rows += [{"what": metric, name: round(value, 4)} for metric, value in figures.items()]
    report(table(rows))
    write(str(output / "results.json"), result)


if __name__ == "__main__":
    main()
