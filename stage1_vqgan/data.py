"""Images → uint8 batches.

Every random choice is keyed by (seed, epoch, index, view), never drawn from a global generator, so a batch does not
depend on workers, processes or interruptions.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from configs import ConfigError, Problem
from stage1_vqgan.augmentation import augment
from stage1_vqgan.data_config import AugmentationConfig
from stage1_vqgan.decoding import EncodedImage, SkippedImage, UndecodableImage, decode
from stage1_vqgan.image_processing_vqgan import convert_mode, resize_and_crop, to_uint8
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
        pixels: uint8 `(B, C, H, W)`.
        indices: int64 `(B,)`, of the images in the source.
        skipped: images that could not be used.
    """

    pixels: Tensor
    indices: Tensor
    skipped: list[SkippedImage]


@dataclass(frozen=True)
class ImageDataset(Dataset):
    """Images of one split as uint8 squares, augmented by key; `__getitems__` makes the batch, `collate` leaves it.

    With `augmentation=None` only the index matters. With `first_view_plain` view 0 is the image itself.
    """

    source: Images
    image_size: int
    num_channels: int
    augmentation: AugmentationConfig | None = None
    seed: int = 0
    first_view_plain: bool = False

    def __getitems__(self, keys: Sequence[ImageKey]) -> ImageBatch:
        """The batch of some keys, in order, without the images that cannot be used."""
        kept, pixels, skipped = [], [], []
        for key, encoded in zip(keys, self._encoded(keys), strict=True):
            try:
                pixels.append(torch.from_numpy(to_uint8(self._transform(decode(encoded), key))))
                kept.append(key.image)
            except UndecodableImage as error:
                skipped.append(SkippedImage(key.image, encoded.name, str(error)))
        shape = (0, self.num_channels, self.image_size, self.image_size)
        stacked = torch.stack(pixels) if pixels else torch.empty(shape, dtype=torch.uint8)
        return ImageBatch(stacked, torch.tensor(kept, dtype=torch.int64), skipped)

    def _encoded(self, keys: Sequence[ImageKey]) -> list[EncodedImage]:
        """The images themselves: from the keys of a stream, else from the source in one go."""
        numbers = [key.image for key in keys if key.encoded is None]
        read = iter(self.source.encoded(numbers) if isinstance(self.source, ImageSource) else ())
        return [next(read) if key.encoded is None else key.encoded for key in keys]

    def _transform(self, image: Image.Image, key: ImageKey) -> Image.Image:
        image = convert_mode(image, self.num_channels)
        if self.augmentation is None or (self.first_view_plain and key.view == 0):
            return resize_and_crop(image, self.image_size)
        rng = np.random.default_rng((self.seed, key.epoch, key.image, key.view))
        return augment(image, self.image_size, self.augmentation, rng)


def collate(batch: Any) -> ImageBatch:
    """The batch is one already."""
    return batch


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


def training_loader(
    dataset: ImageDataset, sampler: Sampler[list[ImageKey]], num_workers: int, pin_memory: bool
) -> DataLoader:
    """Batches in the sampler's order."""
    return DataLoader(
        dataset, batch_sampler=sampler, collate_fn=collate, num_workers=num_workers, pin_memory=pin_memory
    )


def keyed_loader(
    dataset: ImageDataset,
    keys: Iterable[ImageKey],
    batch_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """Batches of the given keys in order, each exactly once; keys are taken as batches are wanted."""
    return DataLoader(
        dataset,
        sampler=keys,
        batch_size=batch_size,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
    )
