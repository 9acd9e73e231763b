"""The evaluation of a pipeline or of the images in a file: read, sample, measure, report.

The metrics prepare real and generated images in the same way: pixels of the image processor in [-1, 1], averaged over
areas to `feature_size × feature_size`. All images lie in shards on disk and are read in parts.
"""

import time
from contextlib import nullcontext
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from tqdm.auto import tqdm

from configs import ConfigError, Problem
from configs.files import remove_tree, write_json
from configs.folder_lock import locked_folder
from pipelines.evaluation.classifiers import (
    Classifier,
    ResNetClassifier,
    SupportVectorClassifier,
    class_accuracy,
    class_metrics,
)
from pipelines.evaluation.conditions import RealLabels, real_labels
from pipelines.evaluation.config import EvaluationConfig
from pipelines.evaluation.figures import GENERATED, TRAINING, VALIDATION, details, figure_table, settings_of
from pipelines.evaluation.generated import generate_samples as generate_samples
from pipelines.evaluation.image_set import ImageSet
from pipelines.evaluation.metrics import frechet_distances, frechet_errors, nearest_distance
from pipelines.evaluation.npz import export_npz
from pipelines.evaluation.reading import all_area_features, image_batches, parts
from pipelines.evaluation.real_images import RealImages, read_real_images, store_real_images
from pipelines.evaluation.report import (
    METRICS_NAME,
    recorded_seconds,
    save_reconstructions,
    save_samples,
    saved_metrics,
    update_card,
)
from pipelines.evaluation.subject import OF_PIPELINE, SAMPLES, Subject, open_subject, store_images
from pipelines.pipeline_vqgan import VQGANPipeline
from stage1_vqgan import Images, load_images, require_range
from stage1_vqgan.reconstruction import evaluate_reconstruction
from stage2_prior import CLASS

REAL_IMAGES = "real_images"  # folder of the real images while they are compared
# How long a process waits for another one, which may still sample. The launcher ends all when one has died.
LONGEST = timedelta(days=7)


def evaluate(config: EvaluationConfig) -> dict[str, Any]:
    """Evaluates a pipeline or a file, writes metrics and pictures, and prints the metrics.

    If the folder already holds the metrics of the same weights and settings, it only prints them. Several processes
    share the sampling and the decoding of real images, and the main process measures. An interrupted evaluation goes on
    with the images that are missing.

    Returns:
        The metrics; in other processes than the main one nothing.

    Raises:
        ConfigError: the pipeline, the file, the images or a recorded duration cannot be read, num_components is too
            large, or the generated images do not fit on the disk.
    """
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    processes = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=LONGEST)
    subject = open_subject(config, processes)
    seconds = recorded_seconds(config)
    inputs = {**subject.record, **asdict(config), "export": None}
    metrics = saved_metrics(folder, inputs)
    processes.wait_for_everyone()  # all have read the same
    if metrics is None or config.export is not None:
        is_main = processes.is_main_process
        with locked_folder(folder / SAMPLES, "output_dir") if is_main else nullcontext():
            metrics = _evaluated(config, subject, inputs, seconds, processes, metrics)
    if metrics and processes.is_main_process:
        update_card(config, metrics)
        print(figure_table(metrics))
    return metrics


def _evaluated(
    config: EvaluationConfig,
    subject: Subject,
    inputs: dict[str, Any],
    seconds: dict[str, float],
    processes: PartialState,
    metrics: dict[str, Any] | None,
) -> dict[str, Any]:
    """Exports the images and measures them, unless `metrics` are known."""
    folder, started = Path(config.output_dir), time.perf_counter()
    if metrics is None:
        sources = load_images(config.data)
        train, validation = store_splits(config, subject, sources, processes)
    images, labels = store_images(config, subject, processes)
    if not processes.is_main_process:
        return metrics or {}
    if config.export is not None:
        export_npz(Path(config.export), images)
    if metrics is not None:
        return metrics
    real = known_labels(config, subject, train, validation)
    metrics = measure(config, subject.pipeline, train, validation, real, images, labels)
    metrics["seconds"] = {**seconds, "evaluate": round(time.perf_counter() - started, 1)}
    metrics["inputs"] = inputs
    (folder / METRICS_NAME).unlink(missing_ok=True)  # those of other settings must not stand beside new pictures
    save_samples(config, images, sources[0].class_names or [], subject.processor.postprocess)
    if subject.pipeline is not None:
        save_reconstructions(config, subject.pipeline, validation)
    write_json(folder / METRICS_NAME, metrics)
    remove_tree(folder / REAL_IMAGES)  # copies of images that the user has
    return metrics


def read_splits(config: EvaluationConfig, pipeline: VQGANPipeline) -> tuple[RealImages, RealImages]:
    """The real images of the training and of the validation split, in memory.

    Raises:
        ConfigError: they cannot be read, or num_components is too large.
    """
    require_range(config.data, pipeline.image_processor.values, str(config.pipeline))
    train, validation = (
        read_real_images(
            source,
            pipeline.image_processor,
            config.max_real_images,
            config.data.max_skipped_fraction,
            config.dataloader_num_workers,
        )
        for source in load_images(config.data)
    )
    require_components(config, len(train), pipeline.image_processor.num_channels)
    return train, validation


def store_splits(
    config: EvaluationConfig, subject: Subject, sources: tuple[Images, Images], processes: PartialState
) -> tuple[RealImages, RealImages]:
    """The real images of the training and of the validation split, in shards on disk.

    Raises:
        ConfigError: they cannot be read, or num_components is too large.
    """
    folder, count, workers = Path(config.output_dir), config.max_real_images, config.dataloader_num_workers
    train, validation = (
        store_real_images(
            folder / REAL_IMAGES / name, source, subject.processor, config.data, count, workers, processes
        )
        for name, source in zip((TRAINING, VALIDATION), sources, strict=True)
    )
    require_components(config, len(train), subject.processor.num_channels)
    return train, validation


def require_components(config: EvaluationConfig, images: int, channels: int) -> None:
    """Refuses more principal components than the features of the training images have.

    Raises:
        ConfigError: num_components is too large.
    """
    most = min(images, channels * config.feature_size**2)
    if config.num_components > most:
        allowed = f"at most {most} with these images and this feature_size"
        raise ConfigError([Problem("num_components", f"received {config.num_components}; {allowed}")])


def known_labels(config: EvaluationConfig, subject: Subject, train: RealImages, validation: RealImages) -> RealLabels:
    """The classes of real images; see `real_labels`. Beside the images of a file, they have no further conditions."""
    if subject.pipeline is not None:
        return real_labels(config, subject.pipeline.layout, train, validation)
    if train.labels is None or validation.labels is None:
        return {}
    return {CLASS: (train.labels, validation.labels)}


def measure(
    config: EvaluationConfig,
    pipeline: VQGANPipeline | None,
    train: RealImages,
    validation: RealImages,
    real: RealLabels,
    generated: ImageSet,
    labels: dict[str, np.ndarray],
) -> dict[str, Any]:
    """Computes all metrics of images and of the tokenizer. Class metrics need labels of all images.

    Args:
        config: settings of the evaluation.
        pipeline: the evaluated pipeline; None leaves the metrics of the tokenizer out.
        train, validation: real images.
        real: their classes.
        generated: the evaluated images.
        labels: their classes, int64 `(N,)`, by the name of the condition.

    Returns:
        The figures by name; `num_samples`; `details`, what stands beside each figure, see `figures.details`;
        `settings`; `left_out`, why figures are missing; `skipped`, if real images could not be decoded.
    """
    device = pipeline.device if pipeline is not None else PartialState().device
    figures = accuracies(config, device, train, validation, real, generated, labels)
    sets: list[ImageSet] = [train, validation, generated]
    features = [all_area_features(images, config.feature_size) for images in sets]
    distances, errors = distance_metrics(config, *features)
    figures |= distances
    if pipeline is not None:
        figures |= reconstruction_metrics(pipeline, train, validation)
    counts = {GENERATED: len(generated), TRAINING: len(train), VALIDATION: len(validation)}
    metrics: dict[str, Any] = {**figures, "num_samples": len(generated)}
    metrics |= {"details": details(figures, counts, errors), "settings": settings_of(config)}
    if pipeline is None:
        metrics["left_out"] = {OF_PIPELINE: "a file of images was evaluated"}
    if train.skipped + validation.skipped:
        metrics["skipped"] = train.skipped + validation.skipped
    return metrics


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
    """Distances between area features `(N, F)`, and the standard errors of some of them."""
    names = ("frechet_distance", "frechet_distance_real")
    compared = (train, validation, [generated, train], config.num_components)
    figures = dict(zip(names, frechet_distances(*compared), strict=True))
    errors = dict(zip(names, frechet_errors(*compared), strict=True))
    of_copies = nearest_distance(generated, train) / nearest_distance(validation, train)
    return figures | {"nearest_neighbour_ratio": of_copies}, errors


def new_classifier(config: EvaluationConfig, device: torch.device) -> Classifier:
    """An untrained classifier of the configured kind."""
    if config.classifier == "svc":
        return SupportVectorClassifier(config.feature_size, config.classifier_gamma, config.classifier_c)
    flips = config.data.augmentation.horizontal_flip
    return ResNetClassifier(config.classifier_epochs, flips, config.seed, device)


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
