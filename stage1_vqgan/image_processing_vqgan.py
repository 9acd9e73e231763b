"""Images of any kind → the input of the tokenizer, and its output → images.

Shape letters: B batch, C channels, H W image size.
"""

from typing import Any, get_args

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from .image_processing_squares import AspectRatio, normalize, to_square

BACKGROUND = "white"  # behind transparent pixels

LARGEST_SIDE = 2**16  # pixels of a square

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


def to_pil(image: Any) -> Image.Image:
    """Converts one image to PIL.

    Args:
        image: PIL image; array `(H, W)` or `(H, W, C)`; or tensor `(H, W)` or `(C, H, W)`. Arrays and tensors hold
            uint8 in [0, 255] or floats in [0, 1], which are rounded to 8 bits.

    Raises:
        ValueError: the image has another type, shape, dtype or range.
    """
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, Tensor):
        if image.is_meta or image.layout != torch.strided:
            raise ValueError(f"image: received a tensor of {image.layout} on {image.device}; needs a dense one")
        image = image.detach().cpu()
        image = image.float() if image.is_floating_point() else image
        image = (image.permute(1, 2, 0) if image.ndim == 3 else image).numpy(force=True)
    if not isinstance(image, np.ndarray):
        raise ValueError(f"image: received {type(image).__name__}; needs a PIL image, an array or a tensor")
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        raise ValueError(f"image: received shape {image.shape}; needs (H, W) or 1, 3 or 4 channels")
    if not image.size:
        raise ValueError(f"image: received shape {image.shape}; needs at least one pixel")
    if np.issubdtype(image.dtype, np.floating):
        if not (image.min() >= 0 and image.max() <= 1):
            raise ValueError(f"image: received floats from {image.min()} to {image.max()}; needs [0, 1], or uint8")
        image = np.round(image * 255).astype(np.uint8)
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


def to_8_bit(image: Image.Image) -> Image.Image:
    """Converts gray with more than 8 bits to 8-bit gray.

    White is 65535 for integers. For floats, it depends on the range: 1 if all values are within [0, 1], else 255 if
    they are within [0, 255], else 65535.

    Raises:
        ValueError: a value is negative, above 65535 or not a number.
    """
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 65535):
        raise ValueError(f"image: received pixels from {low} to {high}; needs [0, 1], [0, 255] or [0, 65535]")
    if image.mode == "F":
        values = np.rint(values * np.float32(255 if high <= 1 else 1 if high <= 255 else 1 / 257))
    else:
        values = (values.astype(np.int32) + 128) // 257
    return Image.fromarray(values.astype(np.uint8))


def convert_mode(image: Image.Image, num_channels: int) -> Image.Image:
    """Converts an image to 8-bit gray or RGB.

    Applies the EXIF orientation, scales more than 8 bits down, and composites transparency on white.

    Args:
        image: image in any mode of Pillow.
        num_channels: 1 (gray) or 3 (RGB).

    Raises:
        ValueError: the image has no pixels, or values out of range, see `to_8_bit`.
    """
    if not all(image.size):
        raise ValueError(f"image: received {image.width}×{image.height} pixels; needs at least one")
    image.load()  # some formats store EXIF after the pixels, and TIFF applies it while loading
    if (value := orientation(image)) != 1:
        image = image.transpose(TRANSPOSITIONS[value])
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = to_8_bit(image)
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
    if num_channels == 1 and image.mode not in ("1", "L"):
        image = image.convert("RGB")  # Pillow cannot convert LAB to gray directly
    return image.convert("L" if num_channels == 1 else "RGB")


def to_pixels(image: Image.Image) -> Tensor:
    """Copies an 8-bit image into a tensor, uint8 `(H, W, C)`."""
    pixels = torch.from_numpy(np.array(image))
    return pixels if pixels.ndim == 3 else pixels[..., None]


class VQGANImageProcessor(BaseImageProcessor):
    r"""Prepares images for a [`VQGANModel`] and converts its output back into images.

    It applies the EXIF orientation, composites transparency on white, resizes and crops to a square (bicubic,
    antialiased), and scales values to [-1, 1].

    Args:
        image_size: side of the square in pixels.
        num_channels: 1 (gray) or 3 (RGB).
        aspect_ratio: "crop" resizes the shorter side to `image_size` and crops the centre; "pad" resizes the longer
            side to it and fills the square with white.

    Raises:
        ValueError: `aspect_ratio` has another value.
    """

    model_input_names = ["pixel_values"]
    _auto_class = "AutoImageProcessor"

    def __init__(self, image_size: int = 256, num_channels: int = 3, aspect_ratio: AspectRatio = "crop", **kwargs: Any):
        super().__init__(**kwargs)
        _choice("aspect_ratio", aspect_ratio, get_args(AspectRatio))
        sizes = {"image_size": (image_size, range(1, LARGEST_SIDE + 1)), "num_channels": (num_channels, (1, 3))}
        for name, (value, allowed) in sizes.items():
            if type(value) is not int or value not in allowed:
                received = repr(value) if type(value) is int and -(2**63) < value < 2**63 else type(value).__name__
                raise ValueError(f"{name}: received {received}; allowed is a whole number of {allowed}")
        self.image_size = image_size
        self.num_channels = num_channels
        self.aspect_ratio = aspect_ratio

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """Prepares one image or a list of them.

        Args:
            images: one PIL image, array or tensor (see `to_pil`), a list of them, or a batched array or tensor.

        Returns:
            `pixel_values`: float32 `(B, C, image_size, image_size)` in [-1, 1].

        Raises:
            ValueError: an image has another type, shape or range, or cannot be read, the list is empty, or an option is
                unknown.
        """
        if kwargs:
            raise ValueError(f"unknown options {sorted(kwargs)}; they are fields of the processor")
        if return_tensors is not None:
            _choice("return_tensors", return_tensors, ("pt", "np"))
        is_batch = isinstance(images, (list, tuple)) or (getattr(images, "ndim", 0) == 4)
        squares = [
            self._square(image, f"images[{number}]" if is_batch else "images")
            for number, image in enumerate(images if is_batch else [images])
        ]
        if not squares:
            raise ValueError("images: received an empty list; needs at least one image")
        pixel_values = normalize(torch.stack(squares).permute(0, 3, 1, 2)).contiguous()
        return BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)

    def postprocess(self, images: Tensor, output_type: str = "pil") -> Any:
        """Converts model output into images.

        Args:
            images: `(B, C, H, W)`; clamped to [-1, 1].
            output_type: "pil" (list of PIL images), "np" (float32 `(B, H, W, C)` in [0, 1]) or "pt" (float32
                `(B, C, H, W)` in [0, 1]).

        Raises:
            ValueError: `output_type` has another value, the images have another shape or dtype, or a value is not
                finite.
        """
        _choice("output_type", output_type, ("pil", "np", "pt"))
        self._check_output(images)
        images = (images.detach().float().clamp(-1, 1) + 1) / 2
        if output_type == "pt":
            return images
        arrays = images.permute(0, 2, 3, 1).cpu().numpy()
        return arrays if output_type == "np" else [to_pil(array) for array in arrays]

    def _square(self, image: Any, name: str) -> Tensor:
        """Pixels of one image, uint8 `(image_size, image_size, C)`; an error names the image."""
        try:
            pixels = to_pixels(convert_mode(to_pil(image), self.num_channels))
        except MemoryError:
            raise
        except Exception as error:  # Pillow raises errors of many types for damaged files
            reason = str(error).removeprefix("image: ").partition("\n")[0][:200]
            raise ValueError(f"{name}: {reason or type(error).__name__}") from error
        return to_square(pixels, self.image_size, self.aspect_ratio)

    def _check_output(self, images: Any) -> None:
        """Refuses all but finite floats `(B, C, H, W)`. Waits once for a GPU."""
        if not isinstance(images, Tensor) or images.is_meta or images.layout != torch.strided:
            raise ValueError(f"images: received {type(images).__name__}; needs a dense tensor")
        shape = tuple(images.shape)
        if not images.is_floating_point() or len(shape) != 4 or shape[1] != self.num_channels or not all(shape[2:]):
            raise ValueError(
                f"images: received {images.dtype} {shape}; needs floats (B, {self.num_channels}, H, W) in [-1, 1]"
            )
        if not images.isfinite().all():
            advice = "compute in float32, or check whether the weights are damaged"
            raise ValueError(f"images: received NaN or infinite values in {images.dtype}; {advice}")


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Refuses all but one of the allowed texts."""
    if not isinstance(value, str) or value not in allowed:
        received = repr(value)[:60] if isinstance(value, str) else type(value).__name__
        raise ValueError(f"{name}: received {received}; allowed are {', '.join(map(repr, allowed))}")


__all__ = ["VQGANImageProcessor"]
