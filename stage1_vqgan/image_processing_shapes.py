"""Images as tensors of bytes: resized, cropped or padded to a height and a width.

Shape letters: B batch, C channels, H W image size.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

BACKGROUND_LEVEL = 255  # at the sides of a padded image: white

AspectRatio = Literal["crop", "pad"]


def to_shape(
    pixels: Tensor,
    shape: tuple[int, int],
    aspect_ratio: AspectRatio = "crop",
    zoom: float = 1.0,
    position: tuple[float, float] = (0.5, 0.5),
    max_shape: tuple[int, int] = (0, 0),
) -> Tensor:
    """Resizes and crops an image to a height and a width (bicubic, antialiased).

    "crop" resizes the image so that it covers `zoom × shape`, and crops. "pad" resizes it so that it fits into
    `zoom × shape`, pads its sides with the background, and crops.

    Args:
        pixels: uint8 `(H, W, C)`.
        shape: height and width of the result in pixels.
        aspect_ratio: "crop" or "pad".
        zoom: size of the image as a multiple of the crop, at least 1.
        position: position of the crop from left to right and from top to bottom, in [0, 1]; (0.5, 0.5) is the centre.
        max_shape: a crop that must only be reduced, and is at most so large, is returned without resizing. The caller
            then calls `resize`.

    Returns:
        uint8 `(*shape, C)`; or larger, up to `max_shape`.
    """
    zoomed = round(zoom * shape[0]), round(zoom * shape[1])
    if aspect_ratio == "pad":
        scale = min(zoomed[0] / pixels.shape[0], zoomed[1] / pixels.shape[1])
        pixels = resize(pixels, *(max(1, round(side * scale)) for side in pixels.shape[:2]))
        return crop(pad(pixels, zoomed), shape, position)
    # Crop on the finer grid: before resizing if the image is reduced, after it if the image is enlarged. So pixels
    # outside the crop have no influence.
    largest = _largest_region(pixels.shape[0], pixels.shape[1], shape)
    height, width = (round(side / zoom) for side in largest)
    if height >= shape[0] and width >= shape[1]:
        region = crop(pixels, (height, width), position)
        return region if height <= max_shape[0] and width <= max_shape[1] else resize(region, *shape)
    covering = crop(pixels, (max(1, round(largest[0])), max(1, round(largest[1]))), position)
    return crop(resize(covering, *zoomed), shape, position)


def _largest_region(height: int, width: int, shape: tuple[int, int]) -> tuple[float, float]:
    """Height and width of the largest region of an image that has the aspect ratio of `shape`."""
    if height * shape[1] <= width * shape[0]:
        return height, height * shape[1] / shape[0]
    return width * shape[0] / shape[1], width


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


def crop(pixels: Tensor, shape: tuple[int, int], position: tuple[float, float]) -> Tensor:
    """Crops an image to a height and a width at a position, see `to_shape`; returns a view."""
    left, top = round(position[0] * (pixels.shape[1] - shape[1])), round(position[1] * (pixels.shape[0] - shape[0]))
    return pixels[top : top + shape[0], left : left + shape[1]]


def pad(pixels: Tensor, shape: tuple[int, int]) -> Tensor:
    """Pads an image, uint8 `(H, W, C)`, with the background to a height and a width; the image is in the centre."""
    height, width, channels = pixels.shape
    padded = torch.full((*shape, channels), BACKGROUND_LEVEL, dtype=torch.uint8)
    interior = padded[(shape[0] - height) // 2 :, (shape[1] - width) // 2 :][:height, :width]
    interior.copy_(pixels)
    return padded


def normalize(pixels: Tensor) -> Tensor:
    """uint8 in [0, 255] → float32 in [-1, 1], on the same device."""
    return pixels.float().div_(127.5).sub_(1.0)
