"""Batches of an `ImageDataset` from worker processes."""

from collections.abc import Iterable, Iterator, Sequence
from math import prod
from traceback import clear_frames
from typing import Any, NamedTuple, cast

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, get_worker_info

from configs.interruption import leave_signals_to_main
from stage1_vqgan.compat import shared_memory
from stage1_vqgan.data.config import data_problem
from stage1_vqgan.data.dataset import ImageBatch, ImageDataset, ImageKey
from stage1_vqgan.data.decoding import SkippedImage, UndecodableImage
from stage1_vqgan.data.samplers import EveryImage

# Number of batches that each worker prepares ahead.
PREFETCH = 2


class BatchInSlot(NamedTuple):
    """The message of a worker to the training process: the number of the slot that holds the pixels, and plain values.

    It holds no tensor: torch opens a file for each tensor that a worker sends.
    """

    slot: int
    shapes: list[tuple[int, int]]
    flips: list[bool]
    images: list[int]
    skipped: list[SkippedImage]


class SharedSlots:
    """Memory for the pixels of a few batches, which the workers share with the training process.

    torch allocates new shared memory for every batch. The page faults increase the CPU time of loading by a fifth
    (256-pixel crops of JPEGs, one worker: 1.90 instead of 1.59 ms per image).

    A worker fills its `PREFETCH + 1` slots in turn. The DataLoader requests a batch from it only after the batch
    `PREFETCH` before has arrived. By then the training process has copied the batch before that one, whose slot the
    worker fills next.

    Args:
        dataset: computes the batches.
        batch_size: number of images in the largest batch.
        num_workers: number of worker processes, at least 1.
    """

    def __init__(self, dataset: ImageDataset, batch_size: int, num_workers: int):
        self.dataset = dataset
        slots = num_workers * (PREFETCH + 1)
        storage = shared_memory(slots * batch_size * dataset.row_size)
        self.rows = torch.empty(0, dtype=torch.uint8).set_(storage).view(slots, batch_size, dataset.row_size)
        self.turn = 0

    def make(self, keys: Sequence[ImageKey]) -> BatchInSlot:
        """Called in a worker: writes the batch of some keys to the worker's next slot."""
        slot = cast(Any, get_worker_info()).id * (PREFETCH + 1) + self.turn
        self.turn = (self.turn + 1) % (PREFETCH + 1)
        batch = self.dataset.__getitems__(keys, self.rows[slot])
        return BatchInSlot(slot, batch.shapes, batch.flips, batch.indices.tolist(), batch.skipped)

    def take(self, batch: BatchInSlot, pin_memory: bool) -> ImageBatch:
        """Called in the training process: copies the batch from its slot."""
        shape, channels = self.dataset.image_shape, self.dataset.num_channels
        longest = max(map(prod, batch.shapes), default=0) * channels
        rows = self.rows[batch.slot, : len(batch.shapes), :longest]
        rows = torch.empty(rows.shape, dtype=torch.uint8, pin_memory=pin_memory).copy_(rows)
        indices = torch.tensor(batch.images, dtype=torch.int64)
        return ImageBatch(rows, batch.shapes, batch.flips, shape, channels, indices, batch.skipped)


class _Keys(Dataset):
    """Returns the keys unchanged: `BatchLoader` computes the batch in the collate function."""

    def __getitems__(self, keys: Sequence[ImageKey]) -> Sequence[ImageKey]:
        return keys


class BatchLoader(DataLoader):
    """Batches of an `ImageDataset`, computed in worker processes or in this one.

    Args:
        dataset: the images.
        batch_sampler: yields the keys of each batch.
        batch_size: number of keys in the largest batch.
        num_workers: number of worker processes; 0 computes the batches in this process.
        pin_memory: whether batches of workers are put in pinned memory, from which a GPU copies asynchronously.
    """

    def __init__(
        self, dataset: ImageDataset, batch_sampler: Sampler, batch_size: int, num_workers: int, pin_memory: bool
    ):
        self._images, self._largest, self._pins = dataset, batch_size, pin_memory
        super().__init__(
            _Keys(),
            batch_sampler=batch_sampler,
            collate_fn=dataset.__getitems__,  # type: ignore[arg-type]
            num_workers=num_workers,
            worker_init_fn=leave_signals_to_main,
            prefetch_factor=PREFETCH if num_workers else None,
        )

    def __iter__(self) -> Iterator[ImageBatch]:  # type: ignore[override]
        """Raises a ConfigError if none of the images of a batch can be decoded."""
        try:
            yield from self._batches()
        except UndecodableImage as error:  # of a worker, it carries the worker's traceback
            # Its frames refer to it and to the workers. When Python collects such a cycle, torch waits for seconds.
            clear_frames(error.__traceback__)
            raise data_problem("dataset", str(error).rpartition("UndecodableImage: ")[2]) from error

    def _batches(self) -> Iterator[ImageBatch]:
        if not self.num_workers:
            yield from super().__iter__()
            return
        # each pass has its own slots, because two passes may run at the same time
        slots = SharedSlots(self._images, self._largest, self.num_workers)
        self.collate_fn = slots.make
        for sent in super().__iter__():
            yield slots.take(sent, self._pins)


def training_loader(dataset: ImageDataset, sampler: Any, num_workers: int, pin_memory: bool) -> BatchLoader:
    """Batches in the sampler's order."""
    return BatchLoader(dataset, sampler, sampler.batch_size, num_workers, pin_memory)


def keyed_loader(
    dataset: ImageDataset,
    keys: Iterable[ImageKey],
    batch_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> BatchLoader:
    """Batches of the given keys in order, each key once. Keys are drawn from the iterable while loading."""
    batches = BatchSampler(keys, batch_size, drop_last=False)  # type: ignore[arg-type]
    return BatchLoader(dataset, batches, batch_size, num_workers, pin_memory)


def evaluation_loader(
    dataset: ImageDataset, batch_size: int, num_workers: int = 0, rank: int = 0, world_size: int = 1
) -> BatchLoader:
    """Batches of this process's share of the images, each once; all processes together load every image."""
    return keyed_loader(dataset, EveryImage(dataset.source, rank, world_size), batch_size, num_workers)
