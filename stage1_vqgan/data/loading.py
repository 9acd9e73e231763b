"""Batches of an `ImageDataset` from worker processes."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, get_worker_info

from configs.interruption import leave_signals_to_main
from stage1_vqgan.data.dataset import ImageBatch, ImageDataset, ImageKey
from stage1_vqgan.data.decoding import SkippedImage
from stage1_vqgan.data.samplers import EveryImage

# Batches that torch lets each worker prepare ahead.
PREFETCH = 2


class BatchInSlot(NamedTuple):
    """What a worker sends of an `ImageBatch`: where its pixels are, and no tensor, which would cost a file each."""

    slot: int
    sides: list[int]
    flips: list[bool]
    images: list[int]
    skipped: list[SkippedImage]


class SharedSlots:
    """Memory for the pixels of some batches that workers and the training process share from the start.

    Shared memory made anew for every batch, torch's own way, costs a sixth of the time of loading (page faults). A
    worker uses its `PREFETCH + 1` slots in turn. When it is told to make a batch, the one `PREFETCH` batches before has
    arrived, so the one before that has been taken out, and its slot is free.
    """

    def __init__(self, dataset: ImageDataset, batch_size: int, num_workers: int):
        self.dataset = dataset
        slots = num_workers * (PREFETCH + 1)
        # rows that are never written to their end take no memory there; `share_memory_` would fill it
        storage = torch.UntypedStorage._new_shared(slots * batch_size * dataset.row_size)
        self.rows = torch.empty(0, dtype=torch.uint8).set_(storage).view(slots, batch_size, dataset.row_size)
        self.turn = 0

    def make(self, keys: Sequence[ImageKey]) -> BatchInSlot:
        """In a worker: the batch of some keys, its pixels in the worker's next slot."""
        slot = cast(Any, get_worker_info()).id * (PREFETCH + 1) + self.turn
        self.turn = (self.turn + 1) % (PREFETCH + 1)
        batch = self.dataset.__getitems__(keys, self.rows[slot])
        return BatchInSlot(slot, batch.sides, batch.flips, batch.indices.tolist(), batch.skipped)

    def take(self, batch: BatchInSlot, pin_memory: bool) -> ImageBatch:
        """In the training process: the batch, in memory of its own."""
        size, channels = self.dataset.image_size, self.dataset.num_channels
        rows = self.rows[batch.slot, : len(batch.sides), : max(batch.sides, default=0) ** 2 * channels]
        rows = torch.empty(rows.shape, dtype=torch.uint8, pin_memory=pin_memory).copy_(rows)
        indices = torch.tensor(batch.images, dtype=torch.int64)
        return ImageBatch(rows, batch.sides, batch.flips, size, channels, indices, batch.skipped)


class _Keys(Dataset):
    """Hands keys on as they are: a `BatchLoader` makes the batch of them where others collate one."""

    def __getitems__(self, keys: Sequence[ImageKey]) -> Sequence[ImageKey]:
        return keys


class BatchLoader(DataLoader):
    """Batches of an `ImageDataset`, made by workers or, without any, in this process.

    Args:
        dataset: the images.
        batch_sampler: the keys of each batch.
        batch_size: keys in the largest batch.
        num_workers: processes; 0 makes the batches in this one.
        pin_memory: whether batches of workers lie where a GPU copies from without waiting.
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
        if not self.num_workers:
            yield from super().__iter__()
            return
        # of this pass alone: another may be going on
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
    """Batches of the given keys in order, each exactly once; keys are taken as batches are wanted."""
    batches = BatchSampler(keys, batch_size, drop_last=False)  # type: ignore[arg-type]
    return BatchLoader(dataset, batches, batch_size, num_workers, pin_memory)


def evaluation_loader(
    dataset: ImageDataset, batch_size: int, num_workers: int = 0, rank: int = 0, world_size: int = 1
) -> BatchLoader:
    """Batches of the images of one process, each once; over all processes every image."""
    return keyed_loader(dataset, EveryImage(dataset.source, rank, world_size), batch_size, num_workers)
