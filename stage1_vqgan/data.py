"""Images → uint8 batches.

Every random choice is keyed by (seed, epoch, index, view), never drawn from a global generator, so a batch does not
depend on workers, processes or interruptions.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from configs import ConfigError, Problem
from stage1_vqgan.augmentation import augment
from stage1_vqgan.data_config import AugmentationConfig
from stage1_vqgan.image_processing_vqgan import convert_mode, resize_and_crop, to_uint8
from stage1_vqgan.sources import ImageSource


@dataclass(frozen=True)
class ImageDataset(Dataset):
    """Images of one split as uint8 squares, augmented by key.

    Items are addressed by `(epoch, index, view)`; with `augmentation=None` only the index matters. With
    `first_view_plain` view 0 is the image itself.
    """

    source: ImageSource
    image_size: int
    num_channels: int
    augmentation: AugmentationConfig | None = None
    seed: int = 0
    first_view_plain: bool = False

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int, int]) -> Tensor:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[tuple[int, int, int]]) -> list[Tensor]:
        """uint8 tensors `(C, image_size, image_size)`, one for each key."""
        images = self.source.read([index for _, index, _ in keys])
        return [torch.from_numpy(to_uint8(self._transform(*pair))) for pair in zip(images, keys, strict=True)]

    def _transform(self, image: Image.Image, key: tuple[int, int, int]) -> Image.Image:
        image = convert_mode(image, self.num_channels)
        epoch, index, view = key
        if self.augmentation is None or (self.first_view_plain and view == 0):
            return resize_and_crop(image, self.image_size)
        rng = np.random.default_rng((self.seed, epoch, index, view))
        return augment(image, self.image_size, self.augmentation, rng)


class TrainingSampler(Sampler[list[tuple[int, int, int]]]):
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

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        global_batch = self.batch_size * self.world_size
        per_epoch = self.num_images // global_batch
        current, order = -1, np.empty(0, dtype=np.int64)
        for batch in range(self.start, self.stop):
            epoch, position = divmod(batch, per_epoch)
            if epoch != current:
                current, order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.num_images)
            first = position * global_batch + self.rank * self.batch_size
            yield [(epoch, int(index), 0) for index in order[first : first + self.batch_size]]


def training_loader(dataset: ImageDataset, sampler: TrainingSampler, num_workers: int, pin_memory: bool) -> DataLoader:
    """uint8 batches `(B, C, H, W)` in the sampler's order."""
    return DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers, pin_memory=pin_memory)


def keyed_loader(
    dataset: ImageDataset,
    keys: Iterable[tuple[int, int, int]],
    batch_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """uint8 batches of the given keys in order, each exactly once."""
    return DataLoader(
        dataset,
        sampler=list(keys),  # type: ignore[arg-type]
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
    )
