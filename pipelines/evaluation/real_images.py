"""Real images, for the comparison with generated images."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from configs import ConfigError, Problem
from stage1_vqgan import (
    ImageBatch,
    ImageDataset,
    ImageKey,
    Images,
    ImageStream,
    VQGANImageProcessor,
    keyed_loader,
    too_many_skipped,
)

BATCH_SIZE = 256


@dataclass(frozen=True)
class RealImages:
    """Real images of a split, prepared for the tokenizer.

    Attributes:
        batches: batches of the data loader, without empty ones.
        labels: int64 `(N,)`, or None if the data set has no labels.
        skipped: number of images that could not be decoded.
    """

    batches: list[ImageBatch]
    labels: np.ndarray | None
    skipped: int

    def __len__(self) -> int:
        return sum(len(batch.indices) for batch in self.batches)

    @property
    def numbers(self) -> np.ndarray:
        """int64 `(N,)`, the number of each image in its split."""
        return torch.cat([batch.indices for batch in self.batches]).numpy()

    def pixels(self) -> Tensor:
        """float32 `(N, C, H, W)` in [-1, 1]."""
        return torch.cat([batch.images() for batch in self.batches])


def read_real_images(
    source: Images, processor: VQGANImageProcessor, count: int, max_skipped_fraction: float, num_workers: int = 0
) -> RealImages:
    """Reads at most `count` images, spread evenly over a split. A stream gives its first images.

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
        for key, label in _some_of(source, count):
            labels[key.image] = label
            yield key

    dataset = ImageDataset(
        source,
        processor.image_shape,
        processor.num_channels,
        aspect_ratio=processor.aspect_ratio,
        value_range=processor.values,
    )
    loader = keyed_loader(dataset, keys(), BATCH_SIZE, num_workers)
    batches = list(tqdm(loader, desc="reading real images", unit="batch"))
    skipped = [image for batch in batches for image in batch.skipped]
    problem = too_many_skipped(skipped, len(labels), max_skipped_fraction, "images")
    if problem is not None:
        raise ConfigError([problem], "image data")
    indices = torch.cat([batch.indices for batch in batches]).tolist()
    if not indices:
        raise ConfigError([Problem("data.dataset", f"none of the {len(skipped)} images can be decoded")])
    found = np.array([labels[index] for index in indices], dtype=np.int64) if source.has_labels else None
    return RealImages([batch for batch in batches if len(batch.indices)], found, len(skipped))


def _some_of(source: Images, count: int) -> Iterator[tuple[ImageKey, int | None]]:
    """Keys and labels of the images to read; see `read_real_images`."""
    if isinstance(source, ImageStream):
        for number, (encoded, label) in enumerate(islice(source.read(), count)):
            yield ImageKey(0, number, encoded=encoded), label
        return
    for number in np.linspace(0, len(source) - 1, min(count, len(source))).astype(int).tolist():
        yield ImageKey(0, number), None if source.labels is None else int(source.labels[number])
