"""Images of any kind → the input of the tokenizer, and its output → images.

Shape letters: B batch, C channels, H W image size.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from .image_processing_pixels import MODES, floats_to_levels, pixels_of, to_array, to_pil
from .image_processing_shapes import AspectRatio, normalize, to_shape
from .image_processing_values import ValueRange, read_range

LARGEST_SIDE = 2**16  # pixels
MOST_CHANNELS = 2**10


class VQGANImageProcessor(BaseImageProcessor):
    r"""Prepares images for a [`VQGANModel`] and converts its output back into images.

    It applies the EXIF orientation, composites transparency on white unless there is a channel for it, scales the
    values to 256 levels, resizes and crops to one size (bicubic, antialiased), and scales to [-1, 1].

    Args:
        size: the side of a square in pixels, or {"height": …, "width": …}, which is stored, or [height, width]. 256 by
            default. A file of an earlier version has the side of a square as `image_size` instead.
        num_channels: 1 (gray), 2 (gray, alpha), 3 (RGB), 4 (RGBA), or more for data that are no pictures.
        aspect_ratio: "crop" resizes the image so that it covers `size`, and crops the centre; "pad" resizes it so that
            it fits into `size`, and fills the sides with white (the highest level of every channel).
        value_range: `[low, high]`, the values that become black and white, as in the training of the tokenizer. It
            holds for images of more than 8 bits, for floats, and for arrays of other numbers than uint8. None takes
            the range of the dtype: uint16 in [0, 65535], float arrays in [0, 1].
        value_range_of_bytes: whether `value_range` holds for 8-bit images too, because the tokenizer was trained on
            such images. If not, their 0 is black and their 255 white, as in the images that `postprocess` returns.

    Raises:
        ValueError: `aspect_ratio` has another value.
    """

    model_input_names = ["pixel_values"]
    _auto_class = "AutoImageProcessor"

    def __init__(
        self,
        size: int | Mapping[str, int] | Sequence[int] | None = None,
        num_channels: int = 3,
        aspect_ratio: AspectRatio = "crop",
        value_range: list[float] | None = None,
        value_range_of_bytes: bool = False,
        image_size: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        _choice("aspect_ratio", aspect_ratio, get_args(AspectRatio))
        if size is not None and image_size is not None:
            raise ValueError("image_size: received a number beside size; leave it out")
        height, width = _sides(size if image_size is None else image_size)
        _whole("num_channels", num_channels, MOST_CHANNELS)
        if type(value_range_of_bytes) is not bool or (value_range_of_bytes and value_range is None):
            allowed = "true or false; true needs a value_range"
            raise ValueError(f"value_range_of_bytes: received {value_range_of_bytes!r:.60}; allowed is {allowed}")
        read = read_range(value_range)
        self.size = {"height": height, "width": width}
        self.num_channels = num_channels
        self.aspect_ratio = aspect_ratio
        self.value_range = None if read is None else [read.low, read.high]
        self.value_range_of_bytes = value_range_of_bytes

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) of the prepared images in pixels."""
        return self.size["height"], self.size["width"]

    @property
    def values(self) -> ValueRange | None:
        """`value_range` and `value_range_of_bytes` in one."""
        return read_range(self.value_range, self.value_range_of_bytes)

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """Prepares one image or a list of them.

        Args:
            images: one PIL image; array `(H, W)` or `(H, W, C)`; tensor `(H, W)` or `(C, H, W)`; a list of them, or a
                batched array or tensor. With a `value_range`, floats are values of this range. Without one they are in
                [0, 1].

        Returns:
            `pixel_values`: float32 `(B, C, *image_shape)` in [-1, 1].

        Raises:
            ValueError: an image has another type, shape or range, or cannot be read, the list is empty, or an option is
                unknown.
        """
        if kwargs:
            raise ValueError(f"unknown options {sorted(kwargs)}; they are fields of the processor")
        if return_tensors is not None:
            _choice("return_tensors", return_tensors, ("pt", "np"))
        prepared = [to_shape(pixels, self.image_shape, self.aspect_ratio) for pixels in self.read(images)]
        pixel_values = normalize(torch.stack(prepared).permute(0, 3, 1, 2)).contiguous()
        return BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)

    def read(self, images: Any) -> Iterator[Tensor]:
        """Yields the levels of each image in its own size, upright, uint8 `(H, W, C)`; see `preprocess`."""
        is_batch = isinstance(images, (list, tuple)) or (getattr(images, "ndim", 0) == 4)
        if is_batch and not len(images):
            raise ValueError("images: received an empty list; needs at least one image")
        for number, image in enumerate(images if is_batch else [images]):
            yield self._levels(image, f"images[{number}]" if is_batch else "images")

    def postprocess(self, images: Tensor, output_type: str = "pil") -> Any:
        """Converts model output into images.

        Args:
            images: `(B, C, H, W)`; clamped to [-1, 1].
            output_type: "pil" (list of PIL images), "np" (float32 `(B, H, W, C)` in [0, 1]) or "pt" (float32
                `(B, C, H, W)` in [0, 1]). PIL images with 2 channels have mode LA, with 4 mode RGBA. Of 5 and more
                channels, PIL images show the first three as RGB; the other types hold all of them.

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
        if output_type == "np":
            return arrays
        return [to_pil(array if self.num_channels in MODES else array[..., :3]) for array in arrays]

    def to_values(self, images: Any) -> Any:
        """Converts arrays or tensors in [0, 1], as `postprocess` returns them, into the values of `value_range`.

        0 becomes its lower value, 1 its upper value. Without a range the images stay as they are.
        """
        if self.value_range is None:
            return images
        low, high = self.value_range
        return images * (high - low) + low

    def _levels(self, image: Any, name: str) -> Tensor:
        """Pixels of one image, uint8 `(H, W, C)`; an error names the image."""
        try:
            if not isinstance(image, Image.Image):
                image = to_array(image) if self.value_range else floats_to_levels(to_array(image))
            return pixels_of(image, self.num_channels, self.values)
        except MemoryError:
            raise
        except Exception as error:  # Pillow raises errors of many types for damaged files
            reason = str(error).removeprefix("image: ").partition("\n")[0][:200]
            raise ValueError(f"{name}: {reason or type(error).__name__}") from error

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


def _sides(size: Any) -> tuple[int, int]:
    """Height and width that a `size` stands for."""
    sides = size
    if isinstance(size, Mapping) and size.keys() == {"height", "width"}:
        sides = size["height"], size["width"]
    elif size is None or not isinstance(size, list | tuple):
        sides = (256, 256) if size is None else (size, size)
    if len(sides) != 2:
        raise ValueError(f"size: received a list of {len(sides)}; allowed is [height, width]")
    for side in sides:
        _whole("size", side, LARGEST_SIDE)
    return sides[0], sides[1]


def _whole(name: str, value: Any, most: int) -> None:
    """Refuses all but a whole number from 1 to `most`."""
    if type(value) is not int or not 1 <= value <= most:
        received = repr(value) if type(value) is int and -(2**63) < value < 2**63 else type(value).__name__
        raise ValueError(f"{name}: received {received}; allowed is a whole number from 1 to {most}")


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Refuses all but one of the allowed texts."""
    if not isinstance(value, str) or value not in allowed:
        received = repr(value)[:60] if isinstance(value, str) else type(value).__name__
        raise ValueError(f"{name}: received {received}; allowed are {', '.join(map(repr, allowed))}")


__all__ = ["VQGANImageProcessor"]
