"""All metrics of the evaluated images, and of the tokenizer of a pipeline."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from configs import ConfigError, Problem
from pipelines.evaluation.classifiers import class_accuracy, class_metrics, new_classifier
from pipelines.evaluation.conditions import RealLabels
from pipelines.evaluation.config import EvaluationConfig
from pipelines.evaluation.figures import GENERATED, TRAINING, VALIDATION, details, settings_of
from pipelines.evaluation.image_set import ImageSet
from pipelines.evaluation.metrics import frechet_distances, frechet_errors, nearest_distance
from pipelines.evaluation.reading import all_area_features, image_batches, parts
from pipelines.evaluation.real_images import RealImages
from pipelines.pipeline_vqgan import VQGANPipeline
from stage1_vqgan.reconstruction import evaluate_reconstruction
from stage2_prior import CLASS

# Figures that need a pipeline.
OF_PIPELINE = ("codebook_usage", "reconstruction_l1", "psnr", "ssim")
SAME = 1e-6  # distance of features that are equal up to rounding


def measure(
    config: EvaluationConfig,
    pipeline: VQGANPipeline | None,
    train: RealImages,
    validation: RealImages,
    real: RealLabels,
    generated: ImageSet,
    labels: dict[str, np.ndarray],
    others: Mapping[str, float] | None = None,
    left_out: Mapping[str, str] | None = None,
    sampling: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Computes all metrics of images and of the tokenizer. Class metrics need labels of all images.

    Args:
        config: settings of the evaluation.
        pipeline: the evaluated pipeline; None leaves the metrics of the tokenizer out.
        train, validation: real images.
        real: their classes.
        generated: the evaluated images.
        labels: their classes, int64 `(N,)`, by the name of the condition.
        others, left_out: what `generation_metrics` returned.
        sampling: the settings of the generated images.

    Returns:
        The figures by name; `num_samples`; `details`, what stands beside each figure, see `figures.details`;
        `settings`; `left_out`, why figures are missing; `skipped`, if real images could not be decoded.
    """
    device = pipeline.device if pipeline is not None else PartialState().device
    figures = accuracies(config, device, train, validation, real, generated, labels)
    sets: list[ImageSet] = [train, validation, generated]
    features = [all_area_features(images, config.feature_size) for images in sets]
    distances, errors = distance_metrics(config, *features)
    figures |= {**distances, **(others or {})}
    if pipeline is not None:
        figures |= reconstruction_metrics(pipeline, train, validation)
    counts = counts_of(train, validation, generated)
    metrics: dict[str, Any] = {**figures, "num_samples": len(generated)}
    metrics |= {"details": details(figures, counts, errors), "settings": settings_of(config, sampling or {})}
    missing = OF_PIPELINE if pipeline is None else ()
    without = dict.fromkeys(missing, "it needs a pipeline, and a file of images was evaluated") | dict(left_out or {})
    if "nearest_neighbour_ratio" not in figures:
        without["nearest_neighbour_ratio"] = "all validation images equal training images in these features"
    if without:
        metrics["left_out"] = without
    if train.skipped + validation.skipped:
        metrics["skipped"] = train.skipped + validation.skipped
    return metrics


def completed(
    metrics: Mapping[str, Any], figures: Mapping[str, float], left_out: Mapping[str, str], counts: Mapping[str, int]
) -> dict[str, Any]:
    """The metrics of `measure` with figures that were left out of them.

    Args:
        metrics: what `measure` returned.
        figures, left_out: what `generation_metrics` returned for some of the networks.
        counts: see `counts_of`.
    """
    found = {**metrics, **figures, "details": metrics["details"] | details(figures, counts, {})}
    found["left_out"] = {name: why for name, why in (metrics["left_out"] | left_out).items() if name not in figures}
    return found


def counts_of(train: ImageSet, validation: ImageSet, generated: ImageSet) -> dict[str, int]:
    """Number of images in each set, by its name."""
    return {GENERATED: len(generated), TRAINING: len(train), VALIDATION: len(validation)}


def accuracies(
    config: EvaluationConfig,
    device: torch.device,
    train: RealImages,
    validation: RealImages,
    real: RealLabels,
    generated: ImageSet,
    labels: dict[str, np.ndarray],
) -> dict[str, float]:
    """The accuracies of each condition whose classes are known of all images.

    Raises:
        ConfigError: the images have a class that the training images lack.
    """
    found: dict[str, float] = {}
    for name in sorted(labels.keys() & real.keys()):
        classifier = partial(new_classifier, config, device)
        of_train, of_validation = (train, real[name][0]), (validation, real[name][1])
        if name == CLASS:
            require_known(labels[name], real[name][0])
            found |= class_metrics(classifier, of_train, of_validation, (generated, labels[name]))
        else:
            others = class_accuracy(classifier, of_train, of_validation, (generated, labels[name]))
            found |= {key.replace("accuracy", f"accuracy_{name}"): value for key, value in others.items()}
    return found


def require_known(labels: np.ndarray, train: np.ndarray) -> None:
    """Refuses classes of generated images that are above those of the training images.

    Raises:
        ConfigError: there is such a class.
    """
    if labels.max() > train.max():
        advice = "number the classes as this data set does, or give another one"
        message = f"its training images have the classes 0 to {train.max()}, the evaluated images {labels.max()}"
        raise ConfigError([Problem("data.dataset", f"{message}; {advice}")])


def distance_metrics(
    config: EvaluationConfig, train: np.ndarray, validation: np.ndarray, generated: np.ndarray
) -> tuple[dict[str, float], dict[str, float]]:
    """Distances between area features `(N, F)`, and the standard errors of some of them.

    `nearest_neighbour_ratio` is missing if all validation images equal training images.
    """
    names = ("frechet_distance", "frechet_distance_real")
    compared = (train, validation, [generated, train], config.num_components)
    figures = dict(zip(names, frechet_distances(*compared), strict=True))
    errors = dict(zip(names, frechet_errors(*compared), strict=True))
    held_out = nearest_distance(validation, train)
    if held_out > SAME:
        figures["nearest_neighbour_ratio"] = nearest_distance(generated, train) / held_out
    return figures, errors


@torch.no_grad()
def reconstruction_metrics(pipeline: VQGANPipeline, train: ImageSet, validation: ImageSet) -> dict[str, float]:
    """Codebook usage over the training images, and reconstruction errors of the validation images."""
    used = torch.zeros(pipeline.vqgan.quantize.num_entries, dtype=torch.bool)
    for pixels in tqdm(parts(train), desc="encoding", unit="batch"):
        codes = pipeline.vqgan.encode(pixels.to(pipeline.device)).codes
        used[pipeline.vqgan.quantize.entry_numbers(codes, pipeline.layout.grid).flatten().cpu()] = True
    errors = evaluate_reconstruction(pipeline.vqgan, image_batches(validation))
    return {
        "codebook_usage": used.float().mean().item(),
        **{name: errors[name] for name in ("reconstruction_l1", "psnr", "ssim") if name in errors},
    }
