"""The evaluation of a pipeline or of the images in a file: read, sample, measure, report.

The metrics prepare real and generated images in the same way: pixels of the image processor in [-1, 1], averaged over
areas to `feature_size × feature_size`. All images lie in shards on disk and are read in parts.
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env

from configs import ConfigError, Problem
from configs.checksums import checksum
from configs.files import remove_tree, write_json
from configs.folder_lock import locked_folder
from pipelines import hub
from pipelines.evaluation.conditions import RealLabels, load_splits, real_labels, require_same_classes
from pipelines.evaluation.config import EvaluationConfig
from pipelines.evaluation.copies import COPIES_NAME, FIGURES as COPYING_FIGURES, check_copies, known_images, save_copies
from pipelines.evaluation.copying import CopyingCheck
from pipelines.evaluation.figures import TRAINING, VALIDATION, figure_table
from pipelines.evaluation.generation import generation_metrics, networks_in_folders, obtained
from pipelines.evaluation.image_set import ImageSet
from pipelines.evaluation.measuring import completed, counts_of, measure
from pipelines.evaluation.npz import export_npz
from pipelines.evaluation.real_images import RealImages, read_real_images, store_real_images
from pipelines.evaluation.report import (
    METRICS_NAME,
    RECONSTRUCTIONS_NAME,
    class_rows,
    prompt_rows,
    recorded_seconds,
    save_reconstructions,
    save_samples,
    saved_metrics,
    update_card,
)
from pipelines.evaluation.subject import SAMPLES, Subject, open_subject, store_images
from pipelines.pipeline_vqgan import VQGANPipeline
from stage1_vqgan import Images, fingerprint_of_images, require_range
from stage2_prior import CLASS
from stage2_prior.manifest import MANIFEST_NAME

FEATURES = "features"  # folder of the features of networks
REAL_IMAGES = "real_images"  # folder of the real images while they are compared
# How long a process waits for another one, which may still sample. The launcher ends all when one has died.
LONGEST = timedelta(days=7)


def evaluate(config: EvaluationConfig) -> dict[str, Any]:
    """Evaluates a pipeline or a file, writes metrics and pictures, and prints the metrics.

    If the folder already holds the metrics of the same weights, settings and real images, it only prints them. Before,
    it adds figures that were left out because weights or a package were missing, if they can be had now. Several
    processes share the sampling and the decoding of real images, and the main process measures. An interrupted
    evaluation goes on with the images that are missing.

    Returns:
        The metrics; in other processes than the main one nothing.

    Raises:
        ConfigError: the pipeline, the file, the images or a recorded duration cannot be read, num_components is too
            large, or the generated images do not fit on the disk.
    """
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    processes = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=LONGEST)
    weights = hub.weights_of(Path(str(config.pipeline)))
    subject = open_subject(config, processes)
    seconds = recorded_seconds(config)
    asked = {} if subject.asked is None else subject.asked.record
    sources, is_main = load_splits(config.data, subject.pipeline), processes.is_main_process
    prints = [fingerprint_of_images(source, config.max_real_images) for source in sources] if is_main else []
    prints = broadcast_object_list([prints])[0]
    codes = {} if subject.store is None else {"codes": checksum(subject.store.folder / MANIFEST_NAME)}
    made_of = {**subject.record, **asked, **codes, "sampling": subject.sampling, **networks_in_folders(config.metrics)}
    inputs = {**made_of, "images": prints, **asdict(config), "export": None}
    metrics, networks = saved_metrics(folder, inputs), config.metrics.feature_networks
    if metrics is not None:
        networks = obtained(metrics.get("left_out", {}), networks) if is_main else []
    networks = broadcast_object_list([networks])[0]  # and all have read the same metrics
    if metrics is None or networks or config.export is not None:
        with locked_folder(folder / SAMPLES, "output_dir") if is_main else nullcontext():
            metrics = _evaluated(config, subject, sources, inputs, seconds, processes, metrics, networks)
    if metrics and processes.is_main_process:
        if hub.weights_of(Path(str(config.pipeline))) == weights:
            update_card(config, metrics)
        else:
            print(f"the card of {config.pipeline} does not show the metrics: its weights were replaced meanwhile")
        print(figure_table(metrics))
    return metrics


def _evaluated(
    config: EvaluationConfig,
    subject: Subject,
    sources: tuple[Images, Images],
    inputs: dict[str, Any],
    seconds: dict[str, float],
    processes: PartialState,
    metrics: dict[str, Any] | None,
    networks: list[str],
) -> dict[str, Any]:
    """Exports the images and measures them; of known `metrics`, only those in the features of `networks`."""
    started = time.perf_counter()
    if metrics is None or networks:
        if subject.pipeline is not None:
            require_same_classes(subject.pipeline.layout, sources[0].class_names or [])
        train, validation = store_splits(config, subject, sources, inputs["images"], processes)
    images, labels = store_images(config, subject, processes)
    if config.export is not None and processes.is_main_process:
        export_npz(Path(config.export), images)
    if metrics is not None and not networks:
        return metrics
    features, of_networks = Path(config.output_dir) / FEATURES, replace(config.metrics, feature_networks=networks)
    others, left_out = generation_metrics(of_networks, validation, images, Accelerator(), features)
    if not processes.is_main_process:
        return {}
    if metrics is not None:
        metrics = completed(metrics, others, left_out, counts_of(train, validation, images))
        _write(config, metrics)
        return metrics
    known = known_images(config, subject.pipeline, subject.store, train)
    copies, reason = check_copies(subject.pipeline, processes.device, known, validation, images)
    others |= copies.figures if copies else {}
    left_out |= {} if copies else dict.fromkeys(COPYING_FIGURES, reason)
    real = known_labels(config, subject, train, validation)
    sets = (train, validation, real, images, labels)
    metrics = measure(config, subject.pipeline, *sets, others, left_out, subject.sampling)
    metrics["seconds"] = {**seconds, "evaluate": round(time.perf_counter() - started, 1)}
    metrics["inputs"] = inputs
    _save(config, subject, metrics, images, sources[0].class_names or [], validation, known, copies)
    return metrics


def _save(
    config: EvaluationConfig,
    subject: Subject,
    metrics: dict[str, Any],
    images: ImageSet,
    class_names: Sequence[str],
    validation: RealImages,
    known: list[ImageSet],
    check: CopyingCheck | None,
) -> None:
    """Writes pictures and metrics."""
    folder = Path(config.output_dir)
    for name in (METRICS_NAME, COPIES_NAME, RECONSTRUCTIONS_NAME):  # those of other settings must not stand beside new
        (folder / name).unlink(missing_ok=True)
    if check is not None:
        save_copies(config, check, known, images, subject.processor.postprocess)
    rows = class_rows(images, class_names)
    if subject.pipeline is not None and subject.asked is not None and subject.pipeline.layout.segments:
        rows = prompt_rows(subject.pipeline, subject.asked.prompts)
    save_samples(config, images, rows, subject.processor.postprocess)
    if subject.pipeline is not None:
        save_reconstructions(config, subject.pipeline, validation)
    _write(config, metrics)


def _write(config: EvaluationConfig, metrics: dict[str, Any]) -> None:
    """Writes metrics, and removes the copies of the real images and the features."""
    folder = Path(config.output_dir)
    write_json(folder / METRICS_NAME, metrics)
    for copies in (REAL_IMAGES, FEATURES):
        remove_tree(folder / copies)


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
        for source in load_splits(config.data, pipeline)
    )
    require_components(config, len(train), pipeline.image_processor.num_channels)
    return train, validation


def store_splits(
    config: EvaluationConfig,
    subject: Subject,
    sources: tuple[Images, Images],
    fingerprints: Sequence[str],
    processes: PartialState,
) -> tuple[RealImages, RealImages]:
    """The real images of the training and of the validation split, in shards on disk.

    Raises:
        ConfigError: they cannot be read, or num_components is too large.
    """
    folder, count, workers = Path(config.output_dir), config.max_real_images, config.dataloader_num_workers
    train, validation = (
        store_real_images(
            folder / REAL_IMAGES / name, source, subject.processor, config.data, count, workers, processes, fingerprint
        )
        for name, source, fingerprint in zip((TRAINING, VALIDATION), sources, fingerprints, strict=True)
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
