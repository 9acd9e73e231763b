"""Images of any kind → upright 8-bit pixels with the channels of a tokenizer.

Shape letters: C channels, H W image size.
"""

from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageSequence
from torch import Tensor

from .image_processing_values import ValueRange, to_levels

BACKGROUND = "white"  # behind transparent pixels

# Channels → the mode of Pillow. An image with other channels is no picture, but data.
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}

# EXIF orientation → the transposition that turns the image upright.
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def pixels_of(image: Image.Image | np.ndarray, num_channels: int, value_range: ValueRange | None = None) -> Tensor:
    """Converts an image to 8-bit pixels with `num_channels` channels; see `convert_mode` and `to_levels`.

    The gray pages of a TIFF are its channels if they are as many as `num_channels`. For gray or RGB, the first page of
    another file with several pages is the image.

    Args:
        image: image in any mode of Pillow, or array `(H, W)` or `(H, W, C)`.
        num_channels: number of channels of the result. Gray, RGB and RGBA are converted into each other, as far as
            `convert_mode` says. An array with 4 channels is RGBA if 1 or 3 are wanted. Other conversions do not exist.
        value_range: see `to_levels`.

    Returns:
        uint8 `(H, W, num_channels)`.

    Raises:
        ValueError: the image has no pixels, other channels, or values that `to_levels` refuses.
    """
    if isinstance(image, Image.Image):
        pages = _gray_pages(image, num_channels)
        if pages is None:
            return _picture_pixels(image, num_channels, value_range)
        image = pages
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or not image.size:
        raise ValueError(f"image: received shape {image.shape}; needs (H, W) or (H, W, channels), none of them 0")
    levels, channels = to_levels(image, value_range), image.shape[2]
    if channels == num_channels:
        return torch.from_numpy(np.array(levels, order="C"))  # a copy: the array may be read-only
    if num_channels not in (1, 3) or channels not in (1, 3, 4):
        raise ValueError(_channels_problem(channels, num_channels))
    return to_pixels(convert_mode(to_pil(levels), num_channels))


def _picture_pixels(image: Image.Image, num_channels: int, value_range: ValueRange | None) -> Tensor:
    if value_range is not None and loses_bits(image):
        raise ValueError("image: received 16-bit colours, which Pillow reads as 8 bits; give an array")
    of_bytes = value_range is not None and value_range.of_bytes and not _is_deep(image)
    if of_bytes and image.has_transparency_data:
        raise ValueError("image: received transparency, which has no place in a value_range; remove it")
    pixels = to_pixels(convert_mode(image, num_channels, value_range))
    return torch.from_numpy(to_levels(pixels.numpy(), value_range)) if of_bytes else pixels


def _gray_pages(image: Image.Image, num_channels: int) -> np.ndarray | None:
    """The gray pages of a TIFF as an array `(H, W, C)`; None if they are not `num_channels`, at least 2.

    Raises:
        ValueError: the gray pages are fewer or more, and gray is not converted to so many channels.
    """
    count = getattr(image, "n_frames", 1) if image.format == "TIFF" and num_channels > 1 else 1
    if count == 1 or not _is_gray(image) or count != num_channels == 3:
        return None
    if count != num_channels:
        raise ValueError(f"image: received {count} gray pages, but the tokenizer has {num_channels} channels")
    kinds, pages = zip(*((_is_gray(page), values_of(page)) for page in ImageSequence.Iterator(image)), strict=True)
    image.seek(0)  # type: ignore[attr-defined]
    is_stack = all(kinds) and len({page.shape for page in pages}) == 1
    if not is_stack and num_channels != 3:
        raise ValueError("image: received pages of several sizes or colours, which cannot be the channels of an image")
    return np.stack(pages, -1) if is_stack else None


def values_of(image: Image.Image) -> np.ndarray:
    """The stored values of an image: `(H, W)` for gray and `(H, W, C)` for colour."""
    if image.mode in ("1", "L", "RGB", "LA", "RGBA", "F") or image.mode.startswith("I;16"):
        values = np.array(image)
        return values.astype(values.dtype.newbyteorder("=")) if values.dtype.byteorder == ">" else values
    if image.mode == "I":
        return _narrowed(np.array(image))
    return np.array(image.convert("RGBA" if image.has_transparency_data else "RGB"))


def _narrowed(values: np.ndarray) -> np.ndarray:
    """Pillow reads some 16-bit files as 32 bits: int32 in [0, 65535] → uint16. Other values stay int32."""
    return values.astype(np.uint16) if values.size and values.min() >= 0 and values.max() <= 65535 else values


def _is_gray(image: Image.Image) -> bool:
    return image.mode in ("1", "L") or _is_deep(image)


def _is_deep(image: Image.Image) -> bool:
    """Whether an image has more than 8 bits, which Pillow supports for gray only."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def loses_bits(image: Image.Image) -> bool:
    """Whether Pillow will reduce colours of 16 bits to 8 when it loads an image. It says nothing of a loaded image."""
    tiles = getattr(image, "tile", None) or []
    return not _is_deep(image) and any(";16" in str(tile[3]) for tile in tiles)


def _channels_problem(channels: int, num_channels: int) -> str:
    known = "gray, RGB and RGBA become gray or RGB, and pictures without transparency become opaque"
    return f"image: received {channels} channels, but the tokenizer has {num_channels} (in_channels); only {known}"


def to_array(image: Any) -> np.ndarray:
    """An array or a tensor `(C, H, W)` as an array `(H, W)` or `(H, W, C)` on the CPU.

    Raises:
        ValueError: the image has another type or shape.
    """
    if isinstance(image, Tensor):
        if image.is_meta or image.layout != torch.strided:
            raise ValueError(f"image: received a tensor of {image.layout} on {image.device}; needs a dense one")
        image = image.detach().cpu()
        image = image.float() if image.is_floating_point() else image
        image = (image.permute(1, 2, 0) if image.ndim == 3 else image).numpy(force=True)
    if not isinstance(image, np.ndarray):
        raise ValueError(f"image: received {type(image).__name__}; needs a PIL image, an array or a tensor")
    if image.ndim not in (2, 3):
        raise ValueError(f"image: received shape {image.shape}; needs (H, W) or (H, W, channels)")
    if not image.size:
        raise ValueError(f"image: received shape {image.shape}; needs at least one pixel")
    return image


def floats_to_levels(image: np.ndarray) -> np.ndarray:
    """Rounds floats in [0, 1], as `postprocess` returns them, to 8 bits; other arrays stay as they are.

    Raises:
        ValueError: a float is outside [0, 1] or not a number.
    """
    if not np.issubdtype(image.dtype, np.floating):
        return image
    if not (image.min() >= 0 and image.max() <= 1):
        raise ValueError(f"image: received floats from {image.min()} to {image.max()}; needs [0, 1], or uint8")
    return np.round(image * 255).astype(np.uint8)


def to_pil(image: Any) -> Image.Image:
    """Converts one image to PIL.

    Args:
        image: PIL image; array `(H, W)` or `(H, W, C)`; or tensor `(H, W)` or `(C, H, W)`, with 1 to 4 channels. Arrays
            and tensors hold uint8 in [0, 255] or floats in [0, 1], which are rounded to 8 bits.

    Raises:
        ValueError: the image has another type, shape, dtype or range.
    """
    if isinstance(image, Image.Image):
        return image
    image = to_array(image)
    if image.ndim == 3 and image.shape[2] not in MODES:
        raise ValueError(f"image: received shape {image.shape}; needs (H, W) or 1 to 4 channels")
    image = floats_to_levels(image)
    if image.dtype != np.uint8:
        raise ValueError(f"image: received dtype {image.dtype}; needs uint8 or floats in [0, 1]")
    return Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image)


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 (upright) if it is missing or unreadable."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # broken EXIF raises exceptions of many types, and the pixels may still be intact
        return 1
    return value if value in TRANSPOSITIONS else 1


def convert_mode(image: Image.Image, num_channels: int, value_range: ValueRange | None = None) -> Image.Image:
    """Converts an image to 8-bit gray, gray with alpha, RGB or RGBA.

    Applies the EXIF orientation, and scales more than 8 bits down. Without an alpha channel in the result,
    transparency is composited on white. With one, an image without transparency is opaque.

    Args:
        image: image in any mode of Pillow.
        num_channels: 1 (gray), 2 (gray, alpha), 3 (RGB) or 4 (RGBA).
        value_range: see `to_levels`, for images of more than 8 bits; None takes 0 to 65535.

    Raises:
        ValueError: the image has no pixels, values that `to_levels` refuses, or too few channels.
    """
    if not all(image.size):
        raise ValueError(f"image: received {image.width}×{image.height} pixels; needs at least one")
    if num_channels not in MODES:
        raise ValueError(_channels_problem(len(image.getbands()), num_channels))
    image.load()  # some formats store EXIF after the pixels, and TIFF applies it while loading
    if (value := orientation(image)) != 1:
        image = image.transpose(TRANSPOSITIONS[value])
    if _is_deep(image):
        image = Image.fromarray(to_levels(values_of(image), value_range))
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        if num_channels in (1, 3):
            image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
    elif image.mode not in ("1", "L"):
        image = image.convert("RGB")  # Pillow cannot convert LAB to gray directly
    if num_channels == 1 and image.mode == "RGBA":
        image = image.convert("RGB")
    return image.convert(MODES[num_channels])


def to_pixels(image: Image.Image) -> Tensor:
    """Copies an 8-bit image into a tensor, uint8 `(H, W, C)`."""
    pixels = torch.from_numpy(np.array(image))
    return pixels if pixels.ndim == 3 else pixels[..., None]


__all__ = [
    "convert_mode",
    "floats_to_levels",
    "loses_bits",
    "orientation",
    "pixels_of",
    "to_array",
    "to_pil",
    "to_pixels",
    "values_of",
]
