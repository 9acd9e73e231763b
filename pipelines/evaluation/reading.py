"""Reads sets of images in parts: whole, in any order, or as batches of the tokenizer. And sets that are in memory."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pipelines.evaluation.image_set import ImageSet
from pipelines.evaluation.metrics import area_features
from pipelines.evaluation.shards import levels_of
from stage1_vqgan import ImageBatch

PART = 256  # images


class PixelImages:
    """Images in memory, an `ImageSet`.

    Args:
        pixels: float32 `(N, C, H, W)` in [-1, 1].
        labels: int64 `(N,)`, or None.
    """

    def __init__(self, pixels: Tensor, labels: np.ndarray | None = None):
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, rows: range) -> Tensor:
        return self.pixels[rows.start : rows.stop]


class SomeImages:
    """Some images of a set in an order of their own, an `ImageSet`.

    Args:
        images: the set.
        numbers: number of each image in it, `(N,)`.
    """

    def __init__(self, images: ImageSet, numbers: Sequence[int] | np.ndarray):
        self.images, self.numbers = images, np.asarray(numbers)
        self.labels = None if images.labels is None else images.labels[self.numbers]

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, rows: range) -> Tensor:
        return some_pixels(self.images, self.numbers[rows.start : rows.stop])


def as_set(images: ImageSet | Tensor) -> ImageSet:
    """The set itself; pixels `(N, C, H, W)` in memory become one."""
    return PixelImages(images) if isinstance(images, Tensor) else images


def some_pixels(images: ImageSet, numbers: Sequence[int] | np.ndarray) -> Tensor:
    """The images of these numbers in this order, float32 `(B, C, H, W)` in [-1, 1]."""
    return torch.cat([images.read(range(number, number + 1)) for number in np.asarray(numbers).tolist()])


def parts(images: ImageSet, size: int = PART) -> Iterator[Tensor]:
    """All images, `size` at a time: float32 `(B, C, H, W)` in [-1, 1]."""
    for start in range(0, len(images), size):
        yield images.read(range(start, min(start + size, len(images))))


def all_area_features(images: ImageSet, size: int) -> np.ndarray:
    """`area_features` of all images of a set, float64 `(N, C · size · size)`."""
    return np.concatenate([area_features(part, size) for part in parts(images)])


def image_batches(images: ImageSet) -> Iterator[ImageBatch]:
    """All images as batches of a data loader, for sets of 8-bit images."""
    for start, pixels in zip(range(0, len(images), PART), parts(images), strict=True):
        levels = levels_of(pixels)
        count, height, width, channels = levels.shape
        yield ImageBatch(
            levels.reshape(count, -1),
            [(height, width)] * count,
            [False] * count,
            (height, width),
            channels,
            torch.arange(start, start + count),
            [],
        )
