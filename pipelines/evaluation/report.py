"""The files of an evaluation: metrics.json, which also records the inputs, and the two pictures."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs import ConfigError, Problem
from configs.files import read_json, write_png
from configs.sections import NonNegativeFloat
from configs.values import read_value
from pipelines.evaluation.config import EvaluationConfig
from pipelines.evaluation.real_images import RealImages
from pipelines.pipeline_vqgan import VQGANPipeline
from stage1_vqgan import labelled_grid, reconstruction_grid, spread

METRICS_NAME = "metrics.json"
SAMPLES_NAME = "samples.png"
RECONSTRUCTIONS_NAME = "reconstructions.png"

# Limits of the pictures: rows of samples.png, and originals in reconstructions.png.
MAX_CLASSES, MAX_ORIGINALS = 20, 16


def saved_metrics(folder: Path, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """The metrics saved in a folder; None if they were computed from other inputs, or a picture is missing."""
    if not all((folder / name).is_file() for name in (METRICS_NAME, SAMPLES_NAME, RECONSTRUCTIONS_NAME)):
        return None
    try:
        metrics = read_json(folder / METRICS_NAME)
    except ValueError:  # a damaged file is computed again
        return None
    return metrics if metrics.get("inputs") == inputs else None


def save_pictures(config: EvaluationConfig, pipeline: VQGANPipeline, samples: Tensor, validation: RealImages) -> None:
    """Writes samples.png, a row for each class, and reconstructions.png, originals above their reconstructions.

    Of many classes, samples.png shows some that are spread evenly over all.

    Args:
        config: settings of the evaluation.
        pipeline: the evaluated pipeline.
        samples: generated images, float32 `(N, C, H, W)` in [-1, 1], sorted by class.
        validation: real images.
    """
    folder, to_images = Path(config.output_dir), pipeline.image_processor.postprocess
    columns = min(config.grid_columns, config.samples_per_class)
    by_class = samples.view(-1, config.samples_per_class, *samples.shape[1:])
    shown = spread(len(by_class), MAX_CLASSES)
    names = pipeline.class_names or [""]
    rows = [(names[number], to_images(by_class[number, :columns])) for number in shown]
    write_png(folder / SAMPLES_NAME, labelled_grid(rows, columns, min_tile=48))
    originals = validation.pixels()[spread(len(validation), MAX_ORIGINALS, validation.labels)]
    with torch.no_grad():
        reconstructions = pipeline.vqgan(originals.to(pipeline.device)).reconstruction.cpu()
    write_png(folder / RECONSTRUCTIONS_NAME, reconstruction_grid(to_images(originals), to_images(reconstructions)))


def weights_hash(pipeline: VQGANPipeline) -> str:
    """A hash of the weights of both models."""
    digest = hashlib.sha256()
    for model in (pipeline.vqgan, pipeline.prior):
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def recorded_seconds(config: EvaluationConfig) -> dict[str, float]:
    """Reads the durations that the earlier steps recorded in their folders.

    Raises:
        ConfigError: a step has not recorded its duration.
    """
    places = {
        "stage1": (config.tokenizer_run, "train_results.json", "train_runtime"),
        "tokenize": (config.code_store, "manifest.json", "seconds"),
        "stage2": (config.prior_run, "train_results.json", "train_runtime"),
    }
    named = {step: (Path(folder) / file, name) for step, (folder, file, name) in places.items() if folder is not None}
    missing = [
        Problem("", f"{path} does not exist: that step has not finished; run it to its end")
        for path, _ in named.values()
        if not path.is_file()
    ]
    if missing:
        raise ConfigError(missing, "recorded durations")
    return {step: _seconds(path, name) for step, (path, name) in named.items()}


def _seconds(path: Path, name: str) -> float:
    try:
        return float(read_value(NonNegativeFloat, read_json(path).get(name), strict=True))
    except ValueError as error:
        raise ConfigError([Problem("", f"{path}: {name}: {error}; run that step to its end again")]) from error
