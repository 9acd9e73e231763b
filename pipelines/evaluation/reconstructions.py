"""Images as a tokenizer gives them back."""

import torch
from torch import Tensor

from pipelines.evaluation.image_set import ImageSet
from stage1_vqgan import VQGANModel


class Reconstructions:
    """An `ImageSet` of the tokenizer's reconstructions of images, computed when they are read.

    Args:
        images: the images.
        model: the tokenizer. It computes on the device where it lies.
    """

    def __init__(self, images: ImageSet, model: VQGANModel):
        self.images, self.model, self.labels = images, model, images.labels

    def __len__(self) -> int:
        return len(self.images)

    @torch.no_grad()
    def read(self, rows: range) -> Tensor:
        """Reconstructions of these rows, float32 `(B, C, H, W)` in [-1, 1] on the CPU, rounded to 8 bits."""
        return eight_bits(self.model(self.images.read(rows).to(self.model.device)).reconstruction)


def eight_bits(images: Tensor) -> Tensor:
    """Images of a decoder as PNG files hold them: float32 on the CPU, each value one of 256 in [-1, 1]."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().cpu() / 127.5 - 1
