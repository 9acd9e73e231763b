"""Real images, for the comparison with generated images."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from tqdm.auto import tqdm

from configs import ConfigError, Problem
from configs.files import read_json
from pipelines.evaluation.image_set import ImageSet
from pipelines.evaluation.reading import PixelImages, parts
from pipelines.evaluation.shards import SHARD_SIZE, ImageShards, claim, levels_of, shard_path, write_shard
from stage1_vqgan import (
    DataConfig,
    ImageBatch,
    ImageDataset,
    ImageKey,
    Images,
    SkippedImage,
    VQGANImageProcessor,
    keyed_loader,
    some_keys,
    too_many_skipped,
)

BATCH_SIZE = 256


@dataclass
class RealImages:
    """Real images of a split, prepared for the tokenizer: an `ImageSet`.

    Attributes:
        images: those that could be decoded.
        numbers: int64 `(N,)`, the number of each image in its split.
        labels: int64 `(N,)`, or None if the data set has no labels.
        skipped: number of images that could not be decoded.
    """

    images: ImageSet
    numbers: np.ndarray
    labels: np.ndarray | None
    skipped: int

    def __len__(self) -> int:
        return len(self.images)

    def read(self, rows: range) -> Tensor:
        """See `ImageSet.read`."""
        return self.images.read(rows)

    def pixels(self) -> Tensor:
        """All of them, float32 `(N, C, H, W)` in [-1, 1]."""
        return torch.cat(list(parts(self.images)))


def read_real_images(
    source: Images, processor: VQGANImageProcessor, count: int, max_skipped_fraction: float, num_workers: int = 0
) -> RealImages:
    """Reads at most `count` images into memory, spread evenly over a split. A stream gives its first images.

    Args:
        source: the split.
        processor: image processor of the pipeline; it determines size, channels and aspect ratio.
        count: largest number of images.
        max_skipped_fraction: largest fraction of these images, in [0, 1], that may fail to decode.
        num_workers: processes that decode; 0 decodes in the calling process.

    Raises:
        ConfigError: more than the allowed fraction of the images, or all of them, cannot be decoded.
    """
    labels: dict[int, int | None] = {}

    def keys() -> Iterator[ImageKey]:
        for key, label in some_keys(source, count):
            labels[key.image] = label
            yield key

    loader = keyed_loader(prepared(source, processor), keys(), BATCH_SIZE, num_workers)
    batches = list(tqdm(loader, desc="reading real images", unit="batch"))
    numbers = torch.cat([batch.indices for batch in batches]).numpy()
    skipped = [image for batch in batches for image in batch.skipped]
    _check_skipped(skipped, len(numbers), max_skipped_fraction)
    pixels = torch.cat([batch.images() for batch in batches if len(batch.indices)])
    return RealImages(
        PixelImages(pixels), numbers, _labels(source, [labels[n] for n in numbers.tolist()]), len(skipped)
    )


def store_real_images(
    folder: Path,
    source: Images,
    processor: VQGANImageProcessor,
    data: DataConfig,
    count: int,
    num_workers: int,
    processes: PartialState,
    fingerprint: str,
) -> RealImages:
    """Decodes the images of `read_real_images` into shards of a folder. The processes share the work.

    A run that was interrupted goes on. All processes call this together, and get the same images.

    Args:
        folder: for the shards.
        source, processor, count, num_workers: see `read_real_images`.
        data: the settings that chose the images.
        processes: the processes of the run.
        fingerprint: of the images, see `fingerprint_of_images`. Shards of other images are written anew.

    Raises:
        ConfigError: see `read_real_images`.
    """
    if processes.is_main_process:
        claim(folder, {"images": fingerprint, "data": data.identity(), **processor.to_dict()})
    processes.wait_for_everyone()
    _write_missing(folder, source, processor, count, num_workers, processes)
    processes.wait_for_everyone()
    notes = [read_json(path.with_suffix(".json")) for path in sorted(folder.glob("*.npy"))]
    numbers, labels, skipped = (
        [one for note in notes for one in note[key]] for key in ("numbers", "labels", "skipped")
    )
    _check_skipped([SkippedImage(**image) for image in skipped], len(numbers), data.max_skipped_fraction)
    return RealImages(ImageShards(folder), np.array(numbers, np.int64), _labels(source, labels), len(skipped))


def _write_missing(
    folder: Path,
    source: Images,
    processor: VQGANImageProcessor,
    count: int,
    num_workers: int,
    processes: PartialState,
) -> None:
    """Writes the missing shards of this process: those with its number mod the number of processes."""
    labels: dict[int, int | None] = {}
    paths: list[Path] = []

    def keys() -> Iterator[ImageKey]:
        for number, items in groupby(enumerate(some_keys(source, count)), lambda item: item[0] // SHARD_SIZE):
            path = shard_path(folder, number)
            if number % processes.num_processes != processes.process_index or path.is_file():
                continue
            paths.append(path)
            for _, (key, label) in items:
                labels[key.image] = label
                yield key

    def notes(batch: ImageBatch) -> dict[str, Any]:
        numbers, skipped = batch.indices.tolist(), [image._asdict() for image in batch.skipped]
        return {"numbers": numbers, "labels": [labels[number] for number in numbers], "skipped": skipped}

    # only the last shard of all has fewer keys, so each batch is one shard
    loader = keyed_loader(prepared(source, processor), keys(), SHARD_SIZE, num_workers)
    shown = tqdm(loader, desc=f"reading {folder.name}", unit="batch", disable=not processes.is_main_process)
    for number, batch in enumerate(shown):
        write_shard(paths[number], levels_of(batch.images()).numpy(), notes(batch))


def prepared(source: Images, processor: VQGANImageProcessor) -> ImageDataset:
    """The images of a split as an image processor prepares them."""
    return ImageDataset(
        source,
        processor.image_shape,
        processor.num_channels,
        aspect_ratio=processor.aspect_ratio,
        value_range=processor.values,
    )


def _check_skipped(skipped: list[SkippedImage], decoded: int, max_fraction: float) -> None:
    problem = too_many_skipped(skipped, decoded + len(skipped), max_fraction, "images")
    if problem is not None:
        raise ConfigError([problem], "image data")
    if not decoded:
        raise ConfigError([Problem("data.dataset", f"none of the {len(skipped)} images can be decoded")])


def _labels(source: Images, labels: list[int | None]) -> np.ndarray | None:
    return np.array(labels, dtype=np.int64) if source.has_labels else None
