"""Batches of labelled images, as a classifier of transformers takes them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from stage1_vqgan.data.dataset import ImageDataset
from stage1_vqgan.data.loading import BatchLoader
from stage1_vqgan.data.skipped import SkippedImages
from stage1_vqgan.networks.frozen import to_size


class LabelledBatches:
    """Batches for `ResNetForImageClassification`: `pixel_values` `(B, C, size, size)` in [-1, 1], and int64 `labels`.

    Args:
        loader: batches of images.
        dataset: the images of the loader; its source has labels.
        split: name of their split.
        size: side of the square to which images are brought, as `FrozenNetwork` brings them.
        device: of the batches.
        skipped: collects the images that cannot be decoded.
    """

    def __init__(
        self,
        loader: BatchLoader,
        dataset: ImageDataset,
        split: str,
        size: int,
        device: torch.device,
        skipped: SkippedImages,
    ):
        self.loader, self.split, self.size, self.device, self.skipped = loader, split, size, device, skipped
        self.labels = torch.from_numpy(dataset.source.labels)  # type: ignore[union-attr,arg-type]

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.skipped.watch(self.split, self.loader):
            if len(batch.indices):
                images = to_size(batch.images(self.device), self.size)
                yield {"pixel_values": images, "labels": self.labels[batch.indices].to(self.device)}
