"""Random changes to training images; every choice comes from the generator that is handed in."""

import math

import numpy as np
from PIL import Image

from stage1_vqgan.data_config import AugmentationConfig
from stage1_vqgan.image_processing_vqgan import resize_and_crop


def augment(image: Image.Image, size: int, config: AugmentationConfig, rng: np.random.Generator) -> Image.Image:
    """Random resize, crop, flip and affine change of an 8-bit image; the result is a `size × size` square."""
    zoom, left, top, flip = rng.random(4)
    position = (left, top) if config.random_crop else (0.5, 0.5)
    image = resize_and_crop(image, size, 1 + zoom * (config.max_zoom - 1), position)
    if config.horizontal_flip and flip < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if config.rotate or config.translate or config.scale:
        angle, shift_x, shift_y, scale = rng.uniform(-1, 1, 4)
        image = affine(
            image,
            math.radians(angle * config.rotate),
            1 + scale * config.scale,
            (shift_x * config.translate * size, shift_y * config.translate * size),
        )
    return image


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
