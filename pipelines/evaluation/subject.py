"""What is evaluated: a pipeline, whose images are generated, or the images in a file."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from configs import ConfigError, Problem
from configs.checksums import checksum
from configs.disk_space import free_space
from configs.problems import in_bytes
from pipelines.commands import load_pipeline
from pipelines.evaluation.config import EvaluationConfig
from pipelines.evaluation.generated import Asked, asked_of, bytes_of_samples, store_samples
from pipelines.evaluation.npz import import_images, npz_header, read_labels
from pipelines.evaluation.prompts import open_store
from pipelines.evaluation.report import weights_hash
from pipelines.evaluation.shards import ImageShards, claim
from pipelines.pipeline_vqgan import VQGANPipeline
from stage1_vqgan import VQGANImageProcessor, require_range
from stage2_prior import CLASS, CodeStore

SAMPLES = "samples"  # folder of the evaluated images


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Attributes:
        processor: prepares the real images like the evaluated ones.
        record: identifies the weights or the file.
        pipeline: None if a file is evaluated.
        asked: what the pipeline is asked for.
        sampling: the sampling settings and the seed; empty if a file is evaluated.
        store: the codes that the prior was trained on, if `code_store` names them.
    """

    processor: VQGANImageProcessor
    record: dict[str, Any]
    pipeline: VQGANPipeline | None = None
    asked: Asked | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    store: CodeStore | None = None


def open_subject(config: EvaluationConfig, processes: PartialState) -> Subject:
    """Loads the pipeline, on the device of this process, or looks into the file.

    Raises:
        ConfigError: it cannot be loaded, was trained with another range of values, or cannot be asked for such images;
            they do not fit on the disk of output_dir; or `code_store` is another one than that of the prior.
    """
    if config.samples is not None:
        return _of_file(Path(config.samples), config)
    pipeline = load_pipeline(str(config.pipeline), str(processes.device))
    pipeline.set_progress_bar_config(disable=True)  # one bar counts the images of all shards
    require_range(config.data, pipeline.image_processor.values, str(config.pipeline))
    require_disk(config, pipeline)
    asked = asked_of(config, pipeline)
    record, sampling = {"weights": weights_hash(pipeline)}, asked.settings | {"seed": config.seed}
    store = None if config.code_store is None else open_store(config, pipeline.layout)
    return Subject(pipeline.image_processor, record, pipeline, asked, sampling, store)


def _of_file(path: Path, config: EvaluationConfig) -> Subject:
    _, height, width, channels = npz_header(path).shape
    size, values = {"height": height, "width": width}, config.data.value_range
    if values == "auto":
        message = "received 'auto', which the training of a tokenizer measures; give [low, high]"
        raise ConfigError([Problem("data.value_range", message)])
    processor = VQGANImageProcessor(size, channels, config.data.aspect_ratio, values)  # type: ignore[arg-type]
    return Subject(processor, {"checksum": checksum(path)})


def require_disk(config: EvaluationConfig, pipeline: VQGANPipeline) -> None:
    """Refuses more images than the disk can hold, before the first is generated.

    Raises:
        ConfigError: they do not fit.
    """
    folder = Path(config.output_dir) / SAMPLES
    count = config.samples_per_class * max(1, len(pipeline.class_names))
    needed = count * bytes_of_samples(pipeline) - sum(path.stat().st_size for path in folder.glob("*.npy"))
    if needed > (free := free_space(folder)):
        disk = f"{count:,} images need {in_bytes(needed)} in {folder}, and {in_bytes(free)} are free"
        message = f"received {config.samples_per_class}; {disk}; choose a smaller number, or another output_dir"
        raise ConfigError([Problem("samples_per_class", message)])


def store_images(
    config: EvaluationConfig, subject: Subject, processes: PartialState
) -> tuple[ImageShards, dict[str, np.ndarray]]:
    """The images that are evaluated, in shards on disk. All processes call this together.

    Returns:
        The images, and their classes int64 `(N,)` by the name of the condition.
    """
    folder = Path(config.output_dir) / SAMPLES
    if subject.pipeline is not None and subject.asked is not None:
        images = store_samples(folder, subject.pipeline, subject.record, subject.asked, processes)
        return images, subject.asked.labels
    path = Path(str(config.samples))
    if processes.is_main_process:
        claim(folder, subject.record)
        import_images(path, folder)
    processes.wait_for_everyone()
    labels = read_labels(path, len(ImageShards(folder)))
    return ImageShards(folder, labels), {} if labels is None else {CLASS: labels}
