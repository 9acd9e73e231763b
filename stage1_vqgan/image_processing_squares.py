"""Images as tensors of bytes: resized, cropped or padded to squares.

Shape letters: B batch, C channels, H W image size.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

BACKGROUND_LEVEL = 255  # at the sides of a padded image: white

AspectRatio = Literal["crop", "pad"]


def to_square(
    pixels: Tensor,
    size: int,
    aspect_ratio: AspectRatio = "crop",
    zoom: float = 1.0,
    position: tuple[float, float] = (0.5, 0.5),
    max_side: int = 0,
) -> Tensor:
    """Resizes and crops an image to a `size × size` square (bicubic, antialiased).

    "crop" resizes the shorter side to `zoom × size` and crops a square. "pad" resizes the longer side to
    `zoom × size`, pads the shorter side with the background, and crops a square.

    Args:
        pixels: uint8 `(H, W, C)`.
        size: side of the result in pixels.
        aspect_ratio: "crop" or "pad".
        zoom: size of the image as a multiple of the crop, at least 1.
        position: position of the crop from left to right and from top to bottom, in [0, 1]; (0.5, 0.5) is the centre.
        max_side: a crop that must only be reduced, and whose side is at most this, is returned without resizing. The
            caller then calls `resize`.

    Returns:
        uint8 `(size, size, C)`; or `(side, side, C)`, `size` < side ≤ `max_side`.
    """
    height, width = pixels.shape[:2]
    zoomed = round(zoom * size)
    if aspect_ratio == "pad":
        scale = zoomed / max(height, width)
        pixels = resize(pixels, max(1, round(height * scale)), max(1, round(width * scale)))
        return crop_square(pad(pixels, zoomed), size, position)
    # Crop on the finer grid: before resizing if the image is reduced, after it if the image is enlarged. So pixels
    # outside the crop have no influence.
    side = round(min(height, width) / zoom)
    if side >= size:
        square = crop_square(pixels, side, position)
        return square if side <= max_side else resize(square, size, size)
    return crop_square(resize(crop_square(pixels, min(height, width), position), zoomed, zoomed), size, position)


def resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """Resizes images (bicubic, antialiased), on any device: uint8 `(..., H, W, C)` → uint8 `(..., height, width, C)`.

    The result for an image does not depend on the other images of the batch.
    """
    if pixels.shape[-3:-1] == (height, width):
        return pixels
    # torch resizes uint8 images without a copy if they are channels-last in memory
    images = pixels.contiguous().view(-1, *pixels.shape[-3:]).permute(0, 3, 1, 2)
    if images.device.type == "cpu":
        images = F.interpolate(images, size=(height, width), mode="bicubic", antialias=True)
    else:
        images = resize_in_floats(images, height, width)
    return images.permute(0, 2, 3, 1).reshape(*pixels.shape[:-3], height, width, -1)


def resize_in_floats(images: Tensor, height: int, width: int) -> Tensor:
    """`resize` on a GPU, which has no uint8 kernel: uint8 `(B, C, H, W)` → uint8 `(B, C, height, width)`.

    It rounds to 8 bits after each of the two passes, as the CPU kernel does. One pixel in 150 of a photo differs from
    the CPU's result by 1 level, and rarely one by 2.
    """
    resized = images.float()
    for size in ((images.shape[2], width), (height, width)):
        resized = F.interpolate(resized, size=size, mode="bicubic", antialias=True).round_().clamp_(0, 255)
    return resized.to(torch.uint8)


def crop_square(pixels: Tensor, side: int, position: tuple[float, float]) -> Tensor:
    """Crops a `side × side` square at a position, see `to_square`; returns a view."""
    height, width = pixels.shape[:2]
    left, top = round(position[0] * (width - side)), round(position[1] * (height - side))
    return pixels[top : top + side, left : left + side]


def pad(pixels: Tensor, side: int) -> Tensor:
    """Pads an image, uint8 `(H, W, C)`, with the background to a `side × side` square; the image is in its centre."""
    height, width, channels = pixels.shape
    square = torch.full((side, side, channels), BACKGROUND_LEVEL, dtype=torch.uint8)
    interior = square[(side - height) // 2 :, (side - width) // 2 :][:height, :width]
    interior.copy_(pixels)
    return square


def normalize(pixels: Tensor) -> Tensor:
    """uint8 in [0, 255] → float32 in [-1, 1], on the same device."""
    return pixels.float().div_(127.5).sub_(1.0)
