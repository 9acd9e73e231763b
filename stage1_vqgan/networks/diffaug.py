"""Differentiable augmentation: random changes of the images that a discriminator sees, real ones and fakes alike.

Source: Zhao et al. 2020, "Differentiable augmentation for data-efficient GAN training", with the policy "color,
translation, cutout" and the ranges of its code. There the numbers come from a global generator.

Shape letters: B batch, C channels, H W image size.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.randomness import seed_from, uniform
from stage1_vqgan.data.transfer import to_device

LARGEST_SHIFT = 1 / 8  # of the image's side
CUTOUT = 1 / 2
NUMBERS = 7  # random numbers that an image takes


Augmentation = Callable[[Tensor, Sequence[int], int], Tensor]


def unchanged(images: Tensor, seeds: Sequence[int], draw: int = 0) -> Tensor:
    """The images themselves: no augmentation."""
    return images


def augment(images: Tensor, seeds: Sequence[int], draw: int = 0) -> Tensor:
    """Changes brightness, saturation and contrast, shifts the image and cuts a rectangle out; gradients flow through.

    Args:
        images: float `(B, C, H, W)` in [-1, 1]. What is shifted in or cut out becomes 0.
        seeds: one for each image.
        draw: number of the draw; each gives an image other random numbers.
    """
    own = torch.tensor([seed_from(seed, 2, draw) for seed in seeds])  # the quantizer draws from the same seeds
    numbers = uniform(to_device(own, images.device)[:, None], torch.arange(NUMBERS, device=images.device))
    return cut_out(shift(recolour(images, numbers[:, :3]), numbers[:, 3:5]), numbers[:, 5:])


def recolour(images: Tensor, numbers: Tensor) -> Tensor:
    """Brightness + [-½, ½); then saturation × [0, 2); then contrast × [½, 1½). Numbers `(B, 3)` in (0, 1)."""
    brightness, saturation, contrast = numbers.to(images.dtype).view(len(images), 3, 1, 1, 1).unbind(1)
    images = images + (brightness - 0.5)
    gray = images.mean(1, keepdim=True)
    images = (images - gray) * (saturation * 2) + gray
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) * (contrast + 0.5) + mean


def shift(images: Tensor, numbers: Tensor) -> Tensor:
    """Shifts each image by whole pixels, at most an eighth of its side. Numbers `(B, 2)` in (0, 1)."""
    down, right = (_shifted(side, numbers[:, axis]) for axis, side in enumerate(images.shape[2:]))
    padded = F.pad(images, (1, 1, 1, 1)).movedim(1, -1)  # a position outside of the image lies in the padding
    batch = torch.arange(len(images), device=images.device)
    return padded[batch[:, None, None], down[:, :, None], right[:, None, :]].movedim(-1, 1)


def cut_out(images: Tensor, numbers: Tensor) -> Tensor:
    """Sets a rectangle of half the sides to 0; it may lie partly outside. Numbers `(B, 2)` in (0, 1)."""
    rows, columns = (_cut(side, numbers[:, axis]) for axis, side in enumerate(images.shape[2:]))
    return images * ~(rows[:, None, :, None] & columns[:, None, None, :])


def _shifted(side: int, numbers: Tensor) -> Tensor:
    """The index, in the padded image, of the pixel that each position shows, int64 `(B, side)`."""
    most = int(side * LARGEST_SHIFT + 0.5)
    steps = (numbers * (2 * most + 1)).long() - most
    return (torch.arange(1, side + 1, device=numbers.device) + steps[:, None]).clamp(0, side + 1)


def _cut(side: int, numbers: Tensor) -> Tensor:
    """Whether a position lies in the part of the side that is cut out, boolean `(B, side)`."""
    length = int(side * CUTOUT + 0.5)
    centres = (numbers * (side + 1 - length % 2)).long()
    distances = torch.arange(side, device=numbers.device) - (centres - length // 2)[:, None]
    return (distances >= 0) & (distances < length)
