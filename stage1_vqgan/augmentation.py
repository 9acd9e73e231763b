"""Random changes to training images; every choice comes from the generator that is handed in."""

import math

import numpy as np
from PIL import Image
from torch import Tensor

from stage1_vqgan.data_config import AugmentationConfig
from stage1_vqgan.image_processing_vqgan import AspectRatio, to_pil, to_pixels, to_square


def augment(
    pixels: Tensor,
    size: int,
    config: AugmentationConfig,
    rng: np.random.Generator,
    aspect_ratio: AspectRatio = "crop",
) -> Tensor:
    """Random resize, crop, flip and affine change of an image: uint8 `(H, W, C)` → uint8 `(size, size, C)`."""
    zoom, left, top, flip = rng.random(4)
    position = (left, top) if config.random_crop else (0.5, 0.5)
    pixels = to_square(pixels, size, aspect_ratio, 1 + zoom * (config.max_zoom - 1), position)
    if config.horizontal_flip and flip < 0.5:
        pixels = pixels.flip(1)
    if config.rotate or config.translate or config.scale:
        angle, shift_x, shift_y, scale = rng.uniform(-1, 1, 4)
        image = affine(
            to_pil(pixels.numpy()),
            math.radians(angle * config.rotate),
            1 + scale * config.scale,
            (shift_x * config.translate * size, shift_y * config.translate * size),
        )
        pixels = to_pixels(image)
    return pixels


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
