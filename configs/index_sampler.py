"""The order in which training reads its images or codes, in both stages."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from configs.problems import ConfigError, Problem


class IndexSampler(Sampler[Any]):
    """Batches of image numbers for one process.

    A batch is int64 `(B, 2)`, with rows (epoch, number of the image). It depends only on the seed and on the number of
    the batch, so an exact resume needs no saved state. Every epoch is a permutation of the images. The batches of all
    processes for one step are a slice of this permutation, so no image repeats within an epoch. The images at the end
    of an epoch that do not fill a global batch are dropped.

    Args:
        num_images: images in the split.
        batch_size: images in a batch of one process.
        start, stop: range of batch numbers to yield.
        seed: seed of the permutations.
        rank, world_size: index of this process, and number of processes.

    Raises:
        ConfigError: the split has fewer images than one global batch.
    """

    def __init__(
        self, num_images: int, batch_size: int, start: int, stop: int, seed: int, rank: int = 0, world_size: int = 1
    ):
        if num_images < batch_size * world_size:
            images = f"{num_images} training images for {world_size} process(es)"
            raise too_few(batch_size, num_images // world_size, images, world_size)
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.start, self.stop, self.rank, self.world_size = start, stop, rank, world_size

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[Any]:
        global_batch = self.batch_size * self.world_size
        per_epoch = self.num_images // global_batch
        current, order = -1, np.empty(0, dtype=np.int64)
        for batch in range(self.start, self.stop):
            epoch, position = divmod(batch, per_epoch)
            if epoch != current:
                current, order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.num_images)
            first = position * global_batch + self.rank * self.batch_size
            rows = np.full((self.batch_size, 2), epoch)
            rows[:, 1] = order[first : first + self.batch_size]
            yield rows


def too_few(batch_size: int, most: int, images: str, world_size: int) -> ConfigError:
    """The error to raise when `images`, in words, are fewer than one global batch; a process has `most` of them."""
    advice = f"use at most {most}" if most else "use fewer processes"
    if most and world_size > 1:
        advice += f" (or {most * world_size} for global_batch_size)"
    message = f"received {batch_size}, but the data has only {images}; {advice}"
    return ConfigError([Problem("per_device_train_batch_size", message)])
