"""Losses of stage 1 at equal steps, on your images:
`python -m benchmarks.losses PRESET --data DATASET [--losses none adaptive] [--steps 600] [--seeds 0 1]`.

Each run trains the preset's tokenizer with one of the losses, and `stage1_vqgan.evaluate` measures it on the validation
images; on the training images, which are more, only the Frechet distance. The perceptual loss is shift-tolerant LPIPS
with AlexNet, so nothing is downloaded. The metrics have other networks than the losses: shift-tolerant LPIPS with VGG,
and the Frechet distance of EfficientNet-Lite0. Only `features-efficientnet` has the latter as its discriminator.

After an interruption, the same command goes on, and repeats no finished run. Other settings need another
`--output_dir`. The results are `losses.json` and, for each run, its model and a grid of images above their
reconstructions.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import environment
from benchmarks.report import table, write
from benchmarks.stages import report
from configs import ConfigError, load_config
from configs.interruption import Stopped
from configs.run_folder import RESULTS_NAME
from stage1_vqgan import Stage1Config
from stage1_vqgan.evaluation.config import ReconstructionConfig
from stage1_vqgan.evaluation.run import evaluate
from stage1_vqgan.training.run import train

PATCHGAN = {"discriminator.num_layers": 2, "discriminator.base_channels": 32}
FEATURES = {"discriminator.type": "features", "loss.adaptive_weight": True}
LOSSES: dict[str, dict[str, Any]] = {
    "pixels": {"loss.perceptual_weight": 0, "loss.adversarial_weight": 0},
    "none": {"loss.adversarial_weight": 0},
    "adaptive": PATCHGAN | {"loss.adversarial_weight": 0.2},
    "constant": PATCHGAN | {"loss.adversarial_weight": 0.02, "loss.adaptive_weight": False},
    "features-alex": FEATURES | {"discriminator.network": "stlpips/alex", "loss.adversarial_weight": 0.2},
    "features-efficientnet": FEATURES
    | {"discriminator.network": "efficientnet-lite0@64", "loss.adversarial_weight": 0.2},
}
COLUMNS = {
    "psnr": 2,
    "ssim": 3,
    "stlpips/vgg": 4,
    "frechet_distance/efficientnet-lite0@96": 2,
    "codebook_usage": 3,
}


def settings(args: argparse.Namespace, name: str, seed: int) -> Stage1Config:
    """The settings of the run with one of the losses."""
    values = {
        "data.dataset": args.data,
        "output_dir": str(Path(args.output_dir) / f"{name}-{seed}"),
        "max_steps": args.steps,
        "eval_steps": args.steps,
        "save_steps": args.steps,
        "seed": seed,
        "report_to": [],
        "loss.perceptual_weight": 1.0,
        "loss.lpips_backbone": "stlpips_alex",
        "loss.adversarial_start_step": 0.25,
        "discriminator.learning_rate": 3e-4,
    }
    return load_config(Stage1Config, args.preset, values | LOSSES[name])


def measured(config: Stage1Config, split: str) -> dict[str, Any]:
    """The figures of a trained tokenizer on a split."""
    values = {
        "model": config.output_dir,
        "data.dataset": config.data.dataset,
        "data.validation_split": config.data.validation_split,
        "data.use_labels": False,
        "split": split,
        "output_dir": f"{config.output_dir}/{split}",
        "metrics.perceptual_networks": ["stlpips/vgg"] if split == "validation" else [],
        "metrics.feature_networks": ["efficientnet-lite0@96"],
    }
    return evaluate(load_config(ReconstructionConfig, None, values))


def run_of(args: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """Trains with one of the losses and measures; what was done with these settings is not repeated.

    Raises:
        ConfigError: the folder holds a run of other settings.
    """
    config = settings(args, name, seed)
    train(config)  # a finished run is not trained again, but its settings are compared
    done = Path(config.output_dir) / "losses.json"
    runtime = json.loads((Path(config.output_dir) / RESULTS_NAME).read_text())["train_runtime"]
    known = json.loads(done.read_text()) if done.is_file() else {"train_runtime": runtime}
    missing = {split: measured(config, split) for split in args.splits if split not in known}
    if missing:
        write(done, known | missing)
    return known | missing


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.losses", description=__doc__)
    parser.add_argument("preset", help="a preset of stage 1, for instance emoji/stage1")
    parser.add_argument("--data", required=True, help="folder with the images, or another value of data.dataset")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--splits", nargs="+", choices=["validation", "train"], default=["validation", "train"])
    parser.add_argument("--output_dir", default="runs/benchmarks/losses")
    args = parser.parse_args()
    where = environment()
    try:
        results = {f"{name}-{seed}": run_of(args, name, seed) for seed in args.seeds for name in args.losses}
    except (ConfigError, Stopped) as error:
        report(str(error))
        sys.exit(error.exit_code if isinstance(error, Stopped) else 2)
    for split in args.splits:
        print(f"\n{split}")
        print(table([row(name, result[split]) for name, result in results.items()]))
    write(Path(args.output_dir) / "losses.json", {"environment": where, "steps": args.steps, "results": results})


def row(name: str, figures: dict[str, Any]) -> dict[str, Any]:
    """A line of the table."""
    return {"loss": name} | {
        column: round(figures[column], digits) for column, digits in COLUMNS.items() if column in figures
    }


if __name__ == "__main__":
    main()
