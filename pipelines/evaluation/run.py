"""The evaluation of a pipeline: load, sample, measure, report.

The metrics prepare real and generated images in the same way: pixels of the image processor in [-1, 1], averaged over
areas to `feature_size × feature_size`.
"""

import json
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from configs import ConfigError, Problem
from configs.files import write_json
from configs.memory import shortage
from pipelines.chunks import bytes_of_image
from pipelines.commands import load_pipeline
from pipelines.evaluation.classifiers import (
    Classifier,
    ResNetClassifier,
    SupportVectorClassifier,
    class_accuracy,
    class_metrics,
)
from pipelines.evaluation.conditions import RealLabels, real_labels
from pipelines.evaluation.config import EvaluationConfig
from pipelines.evaluation.metrics import area_features, frechet_distances, nearest_distance
from pipelines.evaluation.prompts import sample_held_out
from pipelines.evaluation.real_images import RealImages, read_real_images
from pipelines.evaluation.report import (
    METRICS_NAME,
    recorded_seconds,
    save_pictures,
    saved_metrics,
    update_card,
    weights_hash,
)
from pipelines.pipeline_vqgan import VQGANPipeline
from stage1_vqgan import load_images, require_range
from stage1_vqgan.reconstruction import evaluate_reconstruction
from stage2_prior import CLASS


def evaluate(config: EvaluationConfig) -> dict[str, Any]:
    """Evaluates a pipeline, writes metrics and pictures, and prints the metrics.

    If the folder already holds the metrics of the same weights and settings, it only prints them.

    Raises:
        ConfigError: the pipeline, the images or a recorded duration cannot be read, num_components is too large, or the
            generated images do not fit in memory.
    """
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    pipeline = load_pipeline(config.pipeline)
    require_room(config, pipeline)
    seconds = recorded_seconds(config)
    inputs = {"weights": weights_hash(pipeline), **asdict(config)}
    metrics = saved_metrics(folder, inputs)
    if metrics is None:
        started = time.perf_counter()
        train, validation = read_splits(config, pipeline)
        samples, labels = generate_samples(config, pipeline)
        real = real_labels(config, pipeline.layout, train, validation)
        metrics = measure(config, pipeline, train, validation, real, samples, labels)
        metrics["seconds"] = {**seconds, "evaluate": round(time.perf_counter() - started, 1)}
        metrics["inputs"] = inputs
        (folder / METRICS_NAME).unlink(missing_ok=True)  # those of other settings must not stand beside new pictures
        save_pictures(config, pipeline, samples, validation)
        write_json(folder / METRICS_NAME, metrics)
    update_card(config, metrics)
    print(json.dumps({name: value for name, value in metrics.items() if name != "inputs"}, indent=2))
    return metrics


def require_room(config: EvaluationConfig, pipeline: VQGANPipeline) -> None:
    """Refuses more images than memory can hold, before the first is generated.

    Raises:
        ConfigError: they do not fit.
    """
    count = config.samples_per_class * max(1, len(pipeline.class_names))
    lack = shortage(
        count * bytes_of_image(pipeline.vqgan, pipeline.layout, pipeline.layout.pixels, "pt"), torch.device("cpu")
    )
    if lack is not None:
        message = f"received {config.samples_per_class}; {count:,} images: {lack}; choose a smaller number"
        raise ConfigError([Problem("samples_per_class", message)])


def read_splits(config: EvaluationConfig, pipeline: VQGANPipeline) -> tuple[RealImages, RealImages]:
    """The real images of the training and of the validation split."""
    require_range(config.data, pipeline.image_processor.values, config.pipeline)
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
    most = min(len(train), pipeline.image_processor.num_channels * config.feature_size**2)
    if config.num_components > most:
        allowed = f"at most {most} with these images and this feature_size"
        raise ConfigError([Problem("num_components", f"received {config.num_components}; {allowed}")])
    return train, validation


def generate_samples(config: EvaluationConfig, pipeline: VQGANPipeline) -> tuple[Tensor, dict[str, np.ndarray]]:
    """Generates the images to evaluate.

    Returns:
        Pixels float32 `(N, C, H, W)` in [-1, 1], and their classes, int64 `(N,)`, by the name of the condition.
    """
    if pipeline.layout.segments:
        return sample_held_out(config, pipeline)
    generator = torch.Generator().manual_seed(config.seed)
    classes = range(len(pipeline.class_names))
    if not classes:
        out = pipeline.generate(
            num_images=config.samples_per_class, generator=generator, output_type="pt", **config.unmasking
        )
        return out.images.cpu() * 2 - 1, {}
    out = pipeline.generate(
        class_labels=pipeline.class_names,
        num_images_per_label=config.samples_per_class,
        guidance_scale=config.guidance_scale,
        generator=generator,
        output_type="pt",
        **config.unmasking,
    )
    return out.images.cpu() * 2 - 1, {CLASS: np.repeat(classes, config.samples_per_class)}


def measure(
    config: EvaluationConfig,
    pipeline: VQGANPipeline,
    train: RealImages,
    validation: RealImages,
    real: RealLabels,
    samples: Tensor,
    labels: dict[str, np.ndarray],
) -> dict[str, Any]:
    """Computes all metrics of generated images and of the tokenizer. Class metrics need labels of all images.

    Args:
        config: settings of the evaluation.
        pipeline: the evaluated pipeline.
        train, validation: real images.
        real: their classes.
        samples: generated images, float32 `(N, C, H, W)` in [-1, 1].
        labels: their classes, int64 `(N,)`, by the name of the condition.
    """
    train_pixels, validation_pixels = train.pixels(), validation.pixels()
    metrics = dict[str, Any]()
    for name in sorted(labels.keys() & real.keys()):
        classifier = partial(new_classifier, config, pipeline.device)
        of_train, of_validation = (train_pixels, real[name][0]), (validation_pixels, real[name][1])
        if name == CLASS:
            metrics |= class_metrics(classifier, of_train, of_validation, (samples, labels[name]))
        else:
            found = class_accuracy(classifier, of_train, of_validation, (samples, labels[name]))
            metrics |= {key.replace("accuracy", f"accuracy_{name}"): value for key, value in found.items()}
    real_train, real_validation, generated = (
        area_features(pixels, config.feature_size) for pixels in (train_pixels, validation_pixels, samples)
    )
    metrics["frechet_distance"], metrics["frechet_distance_real"] = frechet_distances(
        real_train, real_validation, [generated, real_train], config.num_components
    )
    metrics["nearest_neighbour_ratio"] = nearest_distance(generated, real_train) / nearest_distance(
        real_validation, real_train
    )
    metrics |= reconstruction_metrics(pipeline, train, validation)
    metrics["num_samples"] = len(samples)
    if train.skipped + validation.skipped:
        metrics["skipped"] = train.skipped + validation.skipped
    return metrics


def new_classifier(config: EvaluationConfig, device: torch.device) -> Classifier:
    """An untrained classifier of the configured kind."""
    if config.classifier == "svc":
        return SupportVectorClassifier(config.feature_size, config.classifier_gamma, config.classifier_c)
    flips = config.data.augmentation.horizontal_flip
    return ResNetClassifier(config.classifier_epochs, flips, config.seed, device)


@torch.no_grad()
def reconstruction_metrics(pipeline: VQGANPipeline, train: RealImages, validation: RealImages) -> dict[str, float]:
    """Codebook usage over the training images, and reconstruction errors of the validation images."""
    used = torch.zeros(pipeline.vqgan.quantize.num_entries, dtype=torch.bool)
    for batch in tqdm(train.batches, desc="encoding", unit="batch"):
        codes = pipeline.vqgan.encode(batch.images(pipeline.device)).codes
        used[pipeline.vqgan.quantize.entry_numbers(codes, pipeline.layout.grid).flatten().cpu()] = True
    errors = evaluate_reconstruction(pipeline.vqgan, validation.batches)
    return {
        "codebook_usage": used.float().mean().item(),
        **{name: errors[name] for name in ("reconstruction_l1", "psnr", "ssim") if name in errors},
    }
