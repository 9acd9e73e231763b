"""Pixels in, pixels out: images of any kind → what the tokenizer reads, and its output → images.

Shape letters: B batch, C channels, H W image size.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

# What shows through transparent pixels.
BACKGROUND = "white"


def to_pil(image: Any) -> Image.Image:
    """One image as PIL.

    Args:
        image: PIL image; array `(H, W)` or `(H, W, C)`; or tensor `(H, W)` or `(C, H, W)`. Arrays and tensors hold
            uint8 in [0, 255] or floats in [0, 1], which are rounded to 8 bits.

    Raises:
        ValueError: another type, shape, dtype or range.
    """
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = image.float() if image.is_floating_point() else image
        image = (image.permute(1, 2, 0) if image.ndim == 3 else image).numpy()
    if not isinstance(image, np.ndarray):
        raise ValueError(f"image: received {type(image).__name__}; needs a PIL image, an array or a tensor")
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        raise ValueError(f"image: received shape {image.shape}; needs (H, W) or 1, 3 or 4 channels")
    if np.issubdtype(image.dtype, np.floating):
        if not (image.min() >= 0 and image.max() <= 1):
            raise ValueError(f"image: received floats from {image.min()} to {image.max()}; needs [0, 1], or uint8")
        image = np.round(image * 255).astype(np.uint8)
    if image.dtype != np.uint8:
        raise ValueError(f"image: received dtype {image.dtype}; needs uint8 or floats in [0, 1]")
    return Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image)


def convert_mode(image: Image.Image, num_channels: int) -> Image.Image:
    """8-bit gray or RGB: EXIF orientation applied, 16-bit scaled down, transparency composited on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode == "I":
        image = Image.fromarray(np.clip(np.asarray(image, dtype=np.float64) / 257, 0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
    return image.convert("L" if num_channels == 1 else "RGB")


def resize_and_crop(
    image: Image.Image, size: int, zoom: float = 1.0, position: tuple[float, float] = (0.5, 0.5)
) -> Image.Image:
    """Resizes the shorter side to `zoom × size` (bicubic, antialiased) and crops a `size × size` square.

    Args:
        image: 8-bit image.
        size: side of the result in pixels.
        zoom: at least 1.
        position: where the square lies, from left to right and from top to bottom in [0, 1]; (0.5, 0.5) is the centre.
    """
    scale = round(zoom * size) / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round(position[0] * (width - size)), round(position[1] * (height - size))
    return image.crop((left, top, left + size, top + size)) if (width, height) != (size, size) else image


def to_uint8(image: Image.Image) -> np.ndarray:
    """8-bit image as uint8 `(C, H, W)`."""
    array = np.array(image)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def normalize(pixels: Tensor) -> Tensor:
    """uint8 in [0, 255] → float32 in [-1, 1], on whatever device the pixels are."""
    return pixels.float().div_(127.5).sub_(1.0)


class VQGANImageProcessor(BaseImageProcessor):
    r"""Prepares images for a [`VQGANModel`] and turns its output back into images.

    Orientation applied, transparency composited on white, shorter side resized to `image_size` (bicubic,
    antialiased), centre cropped, scaled to [-1, 1].

    Args:
        image_size: side of the square in pixels.
        num_channels: 1 (gray) or 3 (RGB).
    """

    model_input_names = ["pixel_values"]
    _auto_class = "AutoImageProcessor"

    def __init__(self, image_size: int = 256, num_channels: int = 3, **kwargs: Any):
        super().__init__(**kwargs)
        self.image_size = image_size
        self.num_channels = num_channels

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """Prepares one image or a list of them.

        Args:
            images: PIL images, arrays or tensors, see `to_pil`; a single one, a list, or a batched array or tensor.

        Returns:
            `pixel_values`: float32 `(B, C, image_size, image_size)` in [-1, 1].

        Raises:
            ValueError: an image of another type, shape or range, an empty list, or an unknown option.
        """
        if kwargs:
            raise ValueError(f"unknown options {sorted(kwargs)}; set image_size and num_channels on the processor")
        is_batch = isinstance(images, (list, tuple)) or (getattr(images, "ndim", 0) == 4)
        arrays = [to_uint8(self.prepare(image)) for image in (images if is_batch else [images])]
        if not arrays:
            raise ValueError("images: received an empty list; needs at least one image")
        pixel_values = normalize(torch.from_numpy(np.stack(arrays)))
        return BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)

    def prepare(self, image: Any) -> Image.Image:
        """One image as the 8-bit square that is normalised next."""
        return resize_and_crop(convert_mode(to_pil(image), self.num_channels), self.image_size)

    def postprocess(self, images: Tensor, output_type: str = "pil") -> Any:
        """Turns model output into images.

        Args:
            images: `(B, C, H, W)`; clamped to [-1, 1].
            output_type: "pil" (list of PIL images), "np" (float32 `(B, H, W, C)` in [0, 1]) or "pt" (float32
                `(B, C, H, W)` in [0, 1]).

        Raises:
            ValueError: another output type.
        """
        images = (images.detach().float().clamp(-1, 1) + 1) / 2
        if output_type == "pt":
            return images
        arrays = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "np":
            return arrays
        if output_type == "pil":
            return [to_pil(array) for array in arrays]
        raise ValueError(f"output_type: received {output_type!r}; allowed are 'pil', 'np', 'pt'")


def image_grid(images: Iterable[Image.Image], columns: int, min_tile: int = 0, gap: int = 2) -> Image.Image:
    """Puts images of one size in rows, enlarged by a whole number to at least `min_tile` pixels."""
    images = list(images)
    width, height = images[0].size
    factor = max(1, -(-min_tile // width))
    width, height = width * factor, height * factor
    rows = -(-len(images) // columns)
    grid = Image.new(images[0].mode, (columns * (width + gap) + gap, rows * (height + gap) + gap), BACKGROUND)
    for index, image in enumerate(images):
        tile = image.resize((width, height), Image.Resampling.NEAREST)
        grid.paste(tile, (gap + index % columns * (width + gap), gap + index // columns * (height + gap)))
    return grid


__all__ = ["VQGANImageProcessor"]
