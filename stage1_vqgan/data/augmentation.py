"""Augmentation of training images. The caller passes all random numbers, so nothing here draws any."""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stage1_vqgan.data.config import AugmentationConfig
from stage1_vqgan.image_processing_pixels import to_pil, to_pixels
from stage1_vqgan.image_processing_shapes import AspectRatio, crop, to_shape

# Number of random numbers that `augment` uses.
NUM_DRAWS = 8

# Positions (see `to_shape`) of the corners and the centre, in the order of torchvision's TenCrop.
FIVE_CROPS = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.5, 0.5))


def augment(
    pixels: Tensor,
    shape: tuple[int, int],
    config: AugmentationConfig,
    draws: np.ndarray,
    aspect_ratio: AspectRatio = "crop",
    max_shape: tuple[int, int] = (0, 0),
) -> tuple[Tensor, bool]:
    """Resizes, crops, flips and transforms an image at random.

    Args:
        pixels: uint8 `(H, W, C)`.
        shape: height and width of the result in pixels.
        config: kinds and ranges of the changes.
        draws: float `(NUM_DRAWS,)`, uniform in [0, 1).
        aspect_ratio: see `to_shape`.
        max_shape: see `to_shape`; ignored if the image is rotated, shifted or scaled, which needs the final size.

    Returns:
        The crop, and whether the caller must still mirror it. The crop is uint8 `(*shape, C)`, or larger, up to
        `max_shape`; then the caller must still resize it.
    """
    zoom, left, top, flip = draws[:4].tolist()
    zoom = 1 + zoom * (config.max_zoom - 1)
    position = (left, top) if config.random_crop else (0.5, 0.5)
    flips = config.horizontal_flip and flip < 0.5
    if not (config.rotate or config.translate or config.scale):
        return to_shape(pixels, shape, aspect_ratio, zoom, position, max_shape), flips
    pixels = to_shape(pixels, shape, aspect_ratio, zoom, position)
    angle, shift_x, shift_y, scale = (2 * draws[4:] - 1).tolist()
    pixels = pixels.flip(1) if flips else pixels
    # Pillow would multiply colours by alpha, so channels that are not gray or RGB are transformed one by one
    parts = [pixels] if pixels.shape[2] in (1, 3) else pixels.split(1, 2)
    moved = [
        affine(
            to_pil(part.numpy()),
            math.radians(angle * config.rotate),
            1 + scale * config.scale,
            (shift_x * config.translate * shape[1], shift_y * config.translate * shape[0]),
        )
        for part in parts
    ]
    return torch.cat([to_pixels(image) for image in moved], 2), False


def ten_crop(pixels: Tensor, shape: tuple[int, int], view: int) -> Tensor:
    """One of ten crops: the corners and the centre of an image, then those of its mirror image.

    Args:
        pixels: uint8 `(H, W, C)`, the image.
        shape: height and width of the crop in pixels.
        view: number of the crop, 0 to 9.

    Returns:
        uint8 `(*shape, C)`.

    Source: Krizhevsky et al. 2012, "ImageNet classification with deep convolutional neural networks", section 4.1. Sun
    et al. 2024, "Autoregressive model beats diffusion", train a prior on the codes of these crops of a square 1.1 times
    the image size.
    """
    mirrored, place = divmod(view, len(FIVE_CROPS))
    return crop(pixels.flip(1) if mirrored else pixels, shape, FIVE_CROPS[place])


def affine(image: Image.Image, angle: float, scale: float, shift: tuple[float, float]) -> Image.Image:
    """Rotates by `angle` (radians) and scales about the centre, then shifts (pixels). Border pixels fill the gaps."""
    (width, height), distance = image.size, math.hypot(*shift) / scale
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    centre_x, centre_y = width / 2, height / 2
    # the distance at which the corners of the result are looked up, plus two pixels for the interpolation
    reach_x = centre_x * (abs(cos) + abs(sin) * (height / width)) + distance
    reach_y = centre_y * (abs(cos) + abs(sin) * (width / height)) + distance
    margin = max(0, math.ceil(reach_x - centre_x), math.ceil(reach_y - centre_y)) + 2
    pixels = np.asarray(image)
    padded = Image.fromarray(np.pad(pixels, [(margin, margin)] * 2 + [(0, 0)] * (pixels.ndim - 2), mode="edge"))
    # PIL expects the map from result to source: undo the shift, rotate back about the centre, add the margin
    x, y = -centre_x - shift[0], -centre_y - shift[1]
    matrix = (
        cos, sin, cos * x + sin * y + centre_x + margin,
        -sin, cos, -sin * x + cos * y + centre_y + margin,
    )  # fmt: skip
    return padded.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
