"""Changes to training images; every random choice comes from numbers that are handed in."""

import math

import numpy as np
from PIL import Image
from torch import Tensor

from stage1_vqgan.data.config import AugmentationConfig
from stage1_vqgan.image_processing_vqgan import AspectRatio, crop_square, to_pil, to_pixels, to_square

# Random numbers that `augment` takes.
NUM_DRAWS = 8

# Corners and centre, in the order of torchvision's TenCrop, as `to_square` has positions.
FIVE_CROPS = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.5, 0.5))


def augment(
    pixels: Tensor,
    size: int,
    config: AugmentationConfig,
    draws: np.ndarray,
    aspect_ratio: AspectRatio = "crop",
    max_side: int = 0,
) -> tuple[Tensor, bool]:
    """Random resize, crop, flip and affine change of an image.

    Args:
        pixels: uint8 `(H, W, C)`.
        size: side of the result in pixels.
        config: what may be changed, and how far.
        draws: float `(NUM_DRAWS,)`, uniform in [0, 1).
        aspect_ratio, max_side: see `to_square`; before an affine change every square is resized.

    Returns:
        uint8 `(size, size, C)`, or `(side, side, C)`, `size` < side ≤ `max_side`, which is yet to be resized;
        and whether it is yet to be mirrored.
    """
    zoom, left, top, flip = draws[:4].tolist()
    zoom = 1 + zoom * (config.max_zoom - 1)
    position = (left, top) if config.random_crop else (0.5, 0.5)
    flips = config.horizontal_flip and flip < 0.5
    if not (config.rotate or config.translate or config.scale):
        return to_square(pixels, size, aspect_ratio, zoom, position, max_side), flips
    pixels = to_square(pixels, size, aspect_ratio, zoom, position)
    angle, shift_x, shift_y, scale = (2 * draws[4:] - 1).tolist()
    image = affine(
        to_pil((pixels.flip(1) if flips else pixels).numpy()),
        math.radians(angle * config.rotate),
        1 + scale * config.scale,
        (shift_x * config.translate * size, shift_y * config.translate * size),
    )
    return to_pixels(image), False


def ten_crop(square: Tensor, size: int, view: int) -> Tensor:
    """One of ten crops: the corners and the centre of an image, then those of its mirror image.

    Args:
        square: uint8 `(side, side, C)`, the image.
        size: side of the crop in pixels.
        view: which, 0 to 9.

    Returns:
        uint8 `(size, size, C)`.

    Source: Krizhevsky et al. 2012, "ImageNet classification with deep convolutional neural networks", section 4.1; for
    the codes of a prior with a square 1.1 times the size, Sun et al. 2024, "Autoregressive model beats diffusion".
    """
    mirrored, place = divmod(view, len(FIVE_CROPS))
    return crop_square(square.flip(1) if mirrored else square, size, FIVE_CROPS[place])


def affine(image: Image.Image, angle: float, scale: float, shift: tuple[float, float]) -> Image.Image:
    """Rotates by `angle` (radians) and scales about the centre, then shifts (pixels); the border is repeated."""
    size = image.size[0]
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    centre = size / 2
    # how far outside the image its corners are looked up, and two pixels more for the interpolation
    reach = centre * (abs(cos) + abs(sin)) + math.hypot(*shift) / scale
    margin = max(0, math.ceil(reach - centre)) + 2
    pixels = np.asarray(image)
    padded = Image.fromarray(np.pad(pixels, [(margin, margin)] * 2 + [(0, 0)] * (pixels.ndim - 2), mode="edge"))
    # PIL wants the map from result to source: undo the shift, rotate back about the centre, then the margin
    x, y = -centre - shift[0], -centre - shift[1]
    matrix = (
        cos, sin, cos * x + sin * y + centre + margin,
        -sin, cos, -sin * x + cos * y + centre + margin,
    )  # fmt: skip
    return padded.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
