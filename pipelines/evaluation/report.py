"""The files of an evaluation: metrics.json, which also records the inputs, two pictures, and the pipeline's card."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from configs import ConfigError, Problem
from configs.card import FACTS_FOLDER, write_card
from configs.files import make_folder, read_json, write_json, write_png
from configs.problems import shown
from configs.sections import NonNegativeFloat
from configs.uploads import public_dataset
from configs.values import read_value
from pipelines.conditions import TextTokenizer
from pipelines.evaluation.config import EvaluationConfig
from pipelines.evaluation.image_set import ImageSet
from pipelines.evaluation.reading import some_pixels
from pipelines.evaluation.real_images import RealImages
from pipelines.model_card import (
    METRICS_NAME,
    PLACEHOLDER,
    RECONSTRUCTIONS_NAME,
    SAMPLES_NAME,
    meanings_of,
    model_card,
)
from pipelines.pipeline_vqgan import VQGANPipeline
from stage1_vqgan import labelled_grid, reconstruction_grid, spread
from stage2_prior.training.grid_prompts import describe

ToImages: TypeAlias = Callable[[Tensor], list[Image.Image]]
# The number of the row of each image, int64 `(N,)`, and the words beside the rows.
Rows: TypeAlias = tuple[np.ndarray, Sequence[str]]
# Limits of the pictures: rows of samples.png, and originals in reconstructions.png.
MAX_ROWS, MAX_ORIGINALS = 20, 16


def saved_metrics(folder: Path, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """The metrics saved in a folder; None if they were computed from other inputs, or a picture is missing."""
    pictures = [SAMPLES_NAME] if inputs.get("pipeline") is None else [SAMPLES_NAME, RECONSTRUCTIONS_NAME]
    if not all((folder / name).is_file() for name in (METRICS_NAME, *pictures)):
        return None
    try:
        metrics = read_json(folder / METRICS_NAME)
    except ValueError:  # a damaged file is computed again
        return None
    return metrics if metrics.get("inputs") == json.loads(json.dumps(inputs)) else None  # JSON has no tuples


def save_samples(config: EvaluationConfig, images: ImageSet, rows: Rows, to_images: ToImages) -> None:
    """Writes samples.png. Of many rows, it shows some that are spread evenly over all.

    Args:
        config: settings of the evaluation.
        images: the evaluated images.
        rows: see `class_rows` and `prompt_rows`.
        to_images: makes images of Pillow of pixels.
    """
    numbers, names = rows
    different = np.unique(numbers)
    shown = []
    for one in different[spread(len(different), MAX_ROWS)].tolist():
        pixels = some_pixels(images, np.flatnonzero(numbers == one)[: config.grid_columns])
        shown.append((names[one] if one < len(names) else str(one), to_images(pixels)))
    write_png(Path(config.output_dir) / SAMPLES_NAME, labelled_grid(shown, config.grid_columns, min_tile=48))


def class_rows(images: ImageSet, names: Sequence[str]) -> Rows:
    """A row for each class, or one row of images without classes; numbers stand for names that are missing."""
    return (np.zeros(len(images), np.int64), [""]) if images.labels is None else (images.labels, names)


def prompt_rows(pipeline: VQGANPipeline, prompts: Tensor) -> Rows:
    """A row for each of the different prompts int64 `(N, P)`, with what it asks for in words."""
    different, numbers = prompts.unique(dim=0, return_inverse=True)
    texts = {name: one.tokenizer for name, one in pipeline.conditions.items() if isinstance(one, TextTokenizer)}
    return numbers.numpy(), describe(different, pipeline.layout, texts)


def save_reconstructions(config: EvaluationConfig, pipeline: VQGANPipeline, validation: RealImages) -> None:
    """Writes reconstructions.png: validation images of all classes above their reconstructions."""
    to_images = pipeline.image_processor.postprocess
    originals = some_pixels(validation, spread(len(validation), MAX_ORIGINALS, validation.labels))
    with torch.no_grad():
        reconstructions = pipeline.vqgan(originals.to(pipeline.device)).reconstruction.cpu()
    picture = reconstruction_grid(to_images(originals), to_images(reconstructions))
    write_png(Path(config.output_dir) / RECONSTRUCTIONS_NAME, picture)


def update_card(config: EvaluationConfig, metrics: dict[str, Any]) -> None:
    """Shows metrics and pictures in the card of the evaluated pipeline, if it is a folder in which we may write."""
    folder = Path(str(config.pipeline))
    if config.pipeline is None or not folder.is_dir():
        return
    shown = {key: metrics[key] for key in (*meanings_of(metrics), "num_samples", "details") if key in metrics}
    settings = {key: value for key, value in metrics["settings"].items() if key != "data"}
    shown |= {"settings": settings, **public_dataset(config.data.dataset)}
    try:
        target = make_folder(folder / FACTS_FOLDER)
        for picture in (SAMPLES_NAME, RECONSTRUCTIONS_NAME):
            shutil.copyfile(Path(config.output_dir) / picture, target / picture)
        write_json(target / METRICS_NAME, shown)
        write_card(folder, lambda license: model_card(folder, PLACEHOLDER, license))
    except OSError as error:
        print(f"the card of {folder} does not show the metrics: {error}")
    else:
        print(f"{folder / 'README.md'} shows the metrics; `tessella push {folder} --hub_model_id NAME` uploads it")


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
    if config.pipeline is None:
        return {}
    places = {
        "stage1": ("tokenizer_run", "train_results.json", "train_runtime"),
        "tokenize": ("code_store", "manifest.json", "seconds"),
        "stage2": ("prior_run", "train_results.json", "train_runtime"),
    }
    folders = {key: getattr(config, key) for key, _, _ in places.values() if getattr(config, key) is not None}
    named = {
        step: (key, Path(folders[key]) / file, name) for step, (key, file, name) in places.items() if key in folders
    }
    advice = "the step that writes it has not finished; run it to its end, or set this key to null"
    missing = [
        Problem(key, f"received {shown(folders[key])}; {path.name} is missing there: {advice}")
        for key, path, _ in named.values()
        if not path.is_file()
    ]
    if missing:
        raise ConfigError(missing, "recorded durations")
    return {step: _seconds(*place) for step, place in named.items()}


def _seconds(key: str, path: Path, name: str) -> float:
    try:
        return float(read_value(NonNegativeFloat, read_json(path).get(name), strict=True))
    except ValueError as error:
        raise ConfigError([Problem(key, f"{path}: {name}: {error}; run that step to its end again")]) from error
