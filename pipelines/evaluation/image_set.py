"""Sets of images that an evaluation compares."""

from typing import Protocol

import numpy as np
from torch import Tensor


class ImageSet(Protocol):
    """Images of a fixed order. They are read in parts, so that no more than one part is in memory.

    Attributes:
        labels: class of each image, int64 `(N,)`; None if they have no classes.
    """

    labels: np.ndarray | None

    def __len__(self) -> int:
        """N, number of images."""
        ...

    def read(self, rows: range) -> Tensor:
        """The images of these rows, float32 `(B, C, H, W)` in [-1, 1] on the CPU, each value one of 256 if 8-bit."""
        ...


class Mirrored:
    """An `ImageSet` of mirrored images.

    Args:
        images: the images.
    """

    def __init__(self, images: ImageSet):
        self.images, self.labels = images, images.labels

    def __len__(self) -> int:
        return len(self.images)

    def read(self, rows: range) -> Tensor:
        """See `ImageSet.read`."""
        return self.images.read(rows).flip(3)
