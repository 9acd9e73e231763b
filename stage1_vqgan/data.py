"""Images → uint8 batches.

Every random choice is keyed by (seed, epoch, index, view), never drawn from a global generator, so a batch does not
depend on workers, processes or interruptions.
"""

from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, get_worker_info

from configs import ConfigError, Problem
from configs.interruption import leave_signals_to_main
from stage1_vqgan.augmentation import augment, keyed_draws
from stage1_vqgan.data_config import AugmentationConfig
from stage1_vqgan.decoding import EncodedImage, SkippedImage, UndecodableImage, decode_pixels
from stage1_vqgan.image_processing_vqgan import AspectRatio, to_square
from stage1_vqgan.sources import Images, ImageSource


class ImageKey(NamedTuple):
    """Address of a training image: what decides its augmentation, and where it lies.

    Attributes:
        epoch, image, view: with the seed, the key of every random choice.
        encoded: the image itself, where the source is a stream; else it is read from the source by its number.
    """

    epoch: int
    image: int
    view: int = 0
    encoded: EncodedImage | None = None


class ImageBatch(NamedTuple):
    """What a loader yields.

    Attributes:
        pixels: uint8 `(B, C, H, W)`, channels-last in memory.
        indices: int64 `(B,)`, the numbers in the source of the images that are there.
        skipped: images that could not be used.
    """

    pixels: Tensor
    indices: Tensor
    skipped: list[SkippedImage]


@dataclass(frozen=True)
class ImageDataset(Dataset):
    """Images of one split as uint8 squares, augmented by key.

    Attributes:
        source: where the images are.
        image_size, num_channels: side of the squares in pixels; 1 (gray) or 3 (RGB).
        augmentation: None leaves the images as they are; then only their numbers matter.
        seed: of the augmentation.
        first_view_plain: view 0 is the image itself.
        aspect_ratio: see `to_square`.
        keep_batch_size: the place of an image that cannot be used goes to the next one of the batch that can, in
            another view; otherwise it is left out, and the batch may even be empty.
    """

    source: Images
    image_size: int
    num_channels: int
    augmentation: AugmentationConfig | None = None
    seed: int = 0
    first_view_plain: bool = False
    aspect_ratio: AspectRatio = "crop"
    keep_batch_size: bool = False

    def __getitems__(self, keys: Sequence[ImageKey]) -> ImageBatch:
        """The batch of some keys, in order; it depends on nothing else.

        Raises:
            UndecodableImage: `keep_batch_size`, and none of the images can be used.
        """
        encoded = self._encoded(keys)
        pixels = torch.empty((len(keys), self.image_size, self.image_size, self.num_channels), dtype=torch.uint8)
        skipped = {}
        for place, key, draws in zip(range(len(keys)), keys, self._draws(keys), strict=True):
            if place == 0 or keys[place - 1].image != key.image:  # views of an image in a row: it is decoded once
                image = self._decode(encoded[place])
            if isinstance(image, UndecodableImage):
                skipped[place] = SkippedImage(key.image, encoded[place].name, str(image))
            else:
                pixels[place] = self._square(image, key, draws)
        images = [key.image for key in keys]
        if skipped:
            used = [place for place in range(len(keys)) if place not in skipped]
            if self.keep_batch_size:
                for place, stand_in, key in _stand_ins(keys, used, skipped):
                    image = decode_pixels(encoded[stand_in], self.num_channels)
                    pixels[place] = self._square(image, key, self._draws([key])[0])
                    images[place] = key.image
            else:
                pixels, images = pixels[used], [images[place] for place in used]
        indices = torch.tensor(images, dtype=torch.int64)
        return ImageBatch(pixels.permute(0, 3, 1, 2), indices, list(skipped.values()))

    def _encoded(self, keys: Sequence[ImageKey]) -> list[EncodedImage]:
        """The images themselves: from the keys of a stream, else from the source in one go."""
        numbers = [key.image for key in keys if key.encoded is None]
        read = iter(self.source.encoded(numbers) if isinstance(self.source, ImageSource) and numbers else ())
        return [next(read) if key.encoded is None else key.encoded for key in keys]

    def _draws(self, keys: Sequence[ImageKey]) -> np.ndarray:
        return keyed_draws(self.seed, np.array([key[:3] for key in keys], dtype=np.int64).reshape(-1, 3))

    def _decode(self, encoded: EncodedImage) -> Tensor | UndecodableImage:
        try:
            return decode_pixels(encoded, self.num_channels)
        except UndecodableImage as error:
            return error

    def _square(self, pixels: Tensor, key: ImageKey, draws: np.ndarray) -> Tensor:
        """uint8 `(H, W, C)` → uint8 `(image_size, image_size, C)`."""
        if self.augmentation is None or (self.first_view_plain and key.view == 0):
            return to_square(pixels, self.image_size, self.aspect_ratio)
        return augment(pixels, self.image_size, self.augmentation, draws, self.aspect_ratio)


def _stand_ins(
    keys: Sequence[ImageKey], used: Sequence[int], skipped: Mapping[int, SkippedImage]
) -> Iterator[tuple[int, int, ImageKey]]:
    """For each place that is free: the place of the next image that can be used, and the key of a new view of it."""
    if not used:
        listed = "\n".join(f"  {image.name}: {image.reason}" for image in skipped.values())
        raise UndecodableImage(f"none of the {len(keys)} images of a batch can be used:\n{listed}")
    times = Counter[int]()
    for place in skipped:
        stand_in = used[bisect(used, place) % len(used)]
        times[stand_in] += 1
        yield place, stand_in, keys[stand_in]._replace(view=keys[stand_in].view + times[stand_in])


class TrainingSampler(Sampler[list[ImageKey]]):
    """Batches of keys for one process, a pure function of (seed, step): nothing to save for an exact resume.

    Every epoch is a permutation; one batch of every process together is a slice of it, so no image comes twice in an
    epoch and at most one global batch is dropped at its end.

    Args:
        num_images: images in the split.
        batch_size: images in a batch of one process.
        start, stop: range of batches to yield.
        seed: of the permutations.
        rank, world_size: this process and how many there are.
    """

    def __init__(
        self, num_images: int, batch_size: int, start: int, stop: int, seed: int, rank: int = 0, world_size: int = 1
    ):
        if num_images < batch_size * world_size:
            raise ConfigError(
                [
                    Problem(
                        "per_device_train_batch_size",
                        f"received {batch_size} on {world_size} process(es), but there are only {num_images} training "
                        "images; use a smaller batch",
                    )
                ]
            )
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.start, self.stop, self.rank, self.world_size = start, stop, rank, world_size

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[ImageKey]]:
        global_batch = self.batch_size * self.world_size
        per_epoch = self.num_images // global_batch
        current, order = -1, np.empty(0, dtype=np.int64)
        for batch in range(self.start, self.stop):
            epoch, position = divmod(batch, per_epoch)
            if epoch != current:
                current, order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.num_images)
            first = position * global_batch + self.rank * self.batch_size
            yield [ImageKey(epoch, int(index)) for index in order[first : first + self.batch_size]]


# Batches that torch lets each worker prepare ahead.
PREFETCH = 2


class BatchInSlot(NamedTuple):
    """What a worker sends of an `ImageBatch`: where its pixels are."""

    slot: int
    images: list[int]
    skipped: list[SkippedImage]


class SharedSlots:
    """Memory for the pixels of some batches that workers and the training process share from the start.

    Shared memory made anew for every batch, torch's own way, costs a sixth of the time of loading (page faults). A
    worker uses its `PREFETCH + 1` slots in turn. When it is told to make a batch, the one `PREFETCH` batches before has
    arrived, so the one before that has been taken out, and its slot is free.
    """

    def __init__(self, shape: tuple[int, ...], num_workers: int):
        self.pixels = torch.empty((num_workers, PREFETCH + 1, *shape), dtype=torch.uint8).flatten(0, 1).share_memory_()
        self.turn = 0

    def put(self, batch: ImageBatch) -> BatchInSlot:
        """In a worker: the batch, its pixels left in the worker's next slot."""
        slot = cast(Any, get_worker_info()).id * (PREFETCH + 1) + self.turn
        self.turn = (self.turn + 1) % (PREFETCH + 1)
        self.pixels[slot, : len(batch.pixels)] = batch.pixels.permute(0, 2, 3, 1)
        return BatchInSlot(slot, batch.indices.tolist(), batch.skipped)

    def take(self, batch: BatchInSlot, pin_memory: bool) -> ImageBatch:
        """In the training process: the batch, in memory of its own."""
        pixels = self.pixels[batch.slot, : len(batch.images)]
        pixels = torch.empty_like(pixels, pin_memory=pin_memory).copy_(pixels)
        return ImageBatch(pixels.permute(0, 3, 1, 2), torch.tensor(batch.images, dtype=torch.int64), batch.skipped)


class BatchLoader(DataLoader):
    """Batches of an `ImageDataset`, made by workers or, without any, in this process.

    Args:
        dataset: the images.
        batch_sampler: the keys of each batch.
        batch_size: keys in the largest batch.
        num_workers: processes; 0 makes the batches in this one.
        pin_memory: whether batches lie where a GPU copies from without waiting.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batch_sampler: Sampler,
        batch_size: int,
        num_workers: int,
        pin_memory: bool,
    ):
        self._shape = (batch_size, dataset.image_size, dataset.image_size, dataset.num_channels)
        self._pins = pin_memory
        super().__init__(
            dataset,
            batch_sampler=batch_sampler,
            collate_fn=_leave,  # type: ignore[arg-type]
            num_workers=num_workers,
            worker_init_fn=leave_signals_to_main,
            prefetch_factor=PREFETCH if num_workers else None,
        )

    def __iter__(self) -> Iterator[ImageBatch]:  # type: ignore[override]
        if not self.num_workers:
            for batch in super().__iter__():
                yield batch._replace(pixels=batch.pixels.pin_memory()) if self._pins else batch
            return
        slots = SharedSlots(self._shape, self.num_workers)  # of this pass alone: another may be going on
        self.collate_fn = slots.put
        for message in super().__iter__():
            yield slots.take(message, self._pins)


def _leave(batch: ImageBatch) -> ImageBatch:
    """The batch is one already."""
    return batch


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
