"""Encoded images → pixels. Every failure becomes an `UndecodableImage` that states the reason."""

import io
import math
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from struct import unpack_from
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg, decode_png

from stage1_vqgan.data.arrays import channels_last, missing_plugin, read_array, read_slice
from stage1_vqgan.image_processing_pixels import loses_bits, orientation, pixels_of, values_of
from stage1_vqgan.image_processing_values import ADVICE, ValueRange, described, to_levels

# Markers of a JPEG: start of a frame (sequential, progressive) and of its pixels.
START_OF_FRAME, START_OF_SCAN = (0xC0, 0xC2), 0xDA
# A file may have this many bytes for each pixel of the largest allowed image: 16 bits, four channels.
MAX_PIXEL_BYTES = 8
# Pillow starts another program, Ghostscript, for these files.
REFUSED_FORMATS = {"EPS"}
# The other segments of a bare header (JFIF, comment, tables, restart interval), each with its minimum length in bytes.
BARE_SEGMENTS = {0xE0: 16, 0xFE: 2, 0xDB: 67, 0xC4: 19, 0xDD: 4}


class EncodedImage(NamedTuple):
    """An image as its source stores it.

    Attributes:
        name: name for messages: its path, or its number in the source.
        content: the bytes of a file, the path of a file, or a decoded image: of Pillow, or an array `(H, W)`,
            `(H, W, C)` or `(C, H, W)`.
        columns: of a stream, the values of the columns that `data.columns` keeps; an `ImageSource` has them itself.
    """

    name: str
    content: bytes | str | Image.Image | np.ndarray
    columns: dict[str, Any] | None = None


class SkippedImage(NamedTuple):
    """An image that was left out of a batch: its number in the source, its name, and the reason."""

    image: int
    name: str
    reason: str


class UndecodableImage(ValueError):
    """An image cannot be decoded; the message is the reason, in one line."""


def decode(encoded: EncodedImage) -> Image.Image:
    """Decodes an image that Pillow reads; of an animation or a file of several pages, the first one.

    Raises:
        UndecodableImage: the file cannot be decoded, or declares more than `PIL.Image.MAX_IMAGE_PIXELS` pixels.
    """
    with _undecodable():
        if isinstance(encoded.content, np.ndarray):
            return Image.fromarray(encoded.content)
        if isinstance(encoded.content, Image.Image):
            return encoded.content
        content = read(encoded.content)
        image = _open(content)
        loses = loses_bits(image)
        image.load()
        return _open(content) if loses else image  # after loading, the image processor could not see it and refuse


def decode_pixels(encoded: EncodedImage, num_channels: int, value_range: ValueRange | None = None) -> Tensor:
    """Decodes an image into upright 8-bit pixels, see `pixels_of`.

    torchvision decodes plain JPEGs, because it is faster than Pillow and returns the same pixels. Pillow decodes all
    other files, and the JPEGs that torchvision refuses.

    Args:
        encoded: image to decode.
        num_channels: number of channels of the result.
        value_range: the values that become black and white; None takes the range of the dtype.

    Returns:
        uint8 `(H, W, C)`.

    Raises:
        UndecodableImage: the file cannot be decoded, declares more than `PIL.Image.MAX_IMAGE_PIXELS` pixels, or has
            other channels, or values without a range.
    """
    with _undecodable():
        content = _content(encoded)
        if isinstance(content, bytes):
            pixels = _plain_jpeg(content, num_channels)
            if pixels is not None:
                is_in_range = value_range is not None and value_range.of_bytes
                return torch.from_numpy(to_levels(pixels.numpy(), value_range)) if is_in_range else pixels
        image = _decoded(content, num_channels, keep_bits=value_range is not None)
        if isinstance(image, np.ndarray) and value_range is None:
            image = _small_numbers(image)
        return pixels_of(image, num_channels, value_range)


def decode_values(encoded: EncodedImage, num_channels: int) -> np.ndarray:
    """Decodes the values of an image as they are stored, which `decode_pixels` scales; of several pages the first.

    Returns:
        Numbers of any type, `(H, W)` or `(H, W, C)`.

    Raises:
        UndecodableImage: see `decode_pixels`.
    """
    with _undecodable():
        content = _content(encoded)
        image = _decoded(content, num_channels, keep_bits=True)
        values = values_of(image) if isinstance(image, Image.Image) else image
        if values.dtype.kind not in "buif":
            to_levels(values)  # states the problem
        return values


def mode_of(encoded: EncodedImage) -> str:
    """Pillow's mode of an image, such as "RGB"; "array" for numbers that Pillow does not read."""
    try:
        with _undecodable():
            content = _content(encoded)
            image = _open(content) if isinstance(content, bytes) else content
            return image.mode if isinstance(image, Image.Image) else "array"
    except UndecodableImage:
        return "array"


def _content(encoded: EncodedImage) -> bytes | Image.Image | np.ndarray:
    """The bytes of a file, or a decoded image."""
    if not isinstance(encoded.content, str):
        return encoded.content
    array = read_slice(encoded.content)
    return read(encoded.content) if array is None else array


def _decoded(content: bytes | Image.Image | np.ndarray, num_channels: int, keep_bits: bool) -> Image.Image | np.ndarray:
    """An image of Pillow, or an array with its channels last.

    `keep_bits` reads colours of 16 bits as such; Pillow alone reduces them to 8 bits.
    """
    array = read_array(content) if isinstance(content, bytes) else content
    if isinstance(array, np.ndarray):
        return channels_last(array, num_channels)
    if not isinstance(content, bytes):
        return content
    image = _open(content)
    return _deep_colours(content, image.format) if keep_bits and loses_bits(image) else image


def _deep_colours(content: bytes, file_format: str | None) -> np.ndarray:
    """The colours of a 16-bit PNG, uint16 `(H, W, C)`.

    Raises:
        ValueError: it is another file, of which nothing here reads 16 bits.
    """
    if file_format != "PNG":
        advice = "save it as 16-bit PNG or as .npy, or one file for each channel"
        raise ValueError(f"image: received 16-bit colours in {file_format}, which are read as 8 bits; {advice}")
    stored = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return decode_png(stored, ImageReadMode.UNCHANGED).permute(1, 2, 0).numpy()


def _small_numbers(image: np.ndarray) -> np.ndarray:
    """Numbers of 32 or 64 bits, as lists of Python numbers become, in [0, 255] → uint8.

    Raises:
        ValueError: a number is outside [0, 255].
    """
    if image.dtype.kind not in "iu" or image.dtype.itemsize < 4 or not image.size:
        return image
    if image.min() < 0 or image.max() > 255:
        raise ValueError(
            f"image: received {described(image)}; whole numbers are taken as 8 bits, 0 to 255, unless their column "
            f"declares uint16: {ADVICE}"
        )
    return image.astype(np.uint8)


def _plain_jpeg(content: bytes, num_channels: int) -> Tensor | None:
    """The pixels of a plain JPEG, uint8 `(H, W, C)`, decoded by torchvision; None if Pillow must decode the file."""
    if num_channels not in (1, 3) or not content.startswith(b"\xff\xd8"):
        return None
    if not _is_bare_jpeg(content, num_channels) and not _is_plain_jpeg(_open(content), num_channels):
        return None
    try:
        pixels = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8)).permute(1, 2, 0)
    except RuntimeError:
        return None  # Pillow decodes the file, or states why it cannot
    return pixels if pixels.shape[2] == num_channels else pixels.expand(-1, -1, num_channels)


def _is_bare_jpeg(content: bytes, num_channels: int) -> bool:
    """Whether a file is certainly a plain JPEG: its header holds only what decoding needs.

    False means that Pillow must read the header. Doing that for every JPEG raises the CPU time of loading by 8 to 12 %
    (256-pixel crops; median of interleaved batches).
    """
    if not content.startswith(b"\xff\xd8"):
        return False
    position, bare = 2, False
    while position + 10 <= len(content) and content[position] == 0xFF:
        marker, length = content[position + 1], content[position + 2] << 8 | content[position + 3]
        if marker == START_OF_SCAN:
            return bare
        if marker in START_OF_FRAME:
            bits, height, width, colours = unpack_from(">BHHB", content, position + 4)
            bare = bits == 8 and height * width <= (Image.MAX_IMAGE_PIXELS or math.inf) and colours in (1, num_channels)
        elif marker not in BARE_SEGMENTS or length < BARE_SEGMENTS[marker]:
            return False
        position += 2 + length
    return False


def _is_plain_jpeg(image: Image.Image, num_channels: int) -> bool:
    """Whether the stored pixels of a JPEG need no conversion: they have the wanted channels and are upright."""
    if image.format != "JPEG" or not (image.mode == "L" or (image.mode == "RGB" and num_channels == 3)):
        return False
    return image.info.keys().isdisjoint(("exif", "xmp")) or orientation(image) == 1


def read(content: bytes | str) -> bytes:
    """The bytes of a file, given as bytes or as its path.

    Raises:
        UndecodableImage: the path is that of a device, a pipe or a folder, or the file is larger than any image.
    """
    if not isinstance(content, str):
        return content
    status, limit = Path(content).stat(), MAX_PIXEL_BYTES * (Image.MAX_IMAGE_PIXELS or math.inf)
    if not stat.S_ISREG(status.st_mode):
        raise UndecodableImage("this is not a file but a device, a pipe or a folder")
    if status.st_size > limit:
        raise UndecodableImage(f"the file has {status.st_size:,} bytes; allowed are {limit:,}")
    return Path(content).read_bytes()


def _open(content: bytes) -> Image.Image:
    if not content:
        raise UndecodableImage("the file is empty")
    return Image.open(io.BytesIO(content), formats=readable_formats())


@cache
def readable_formats() -> list[str]:
    """The formats of Pillow that are read, the most common ones first; HEIC too if pillow-heif is installed."""
    Image.init()
    if missing_plugin(".heic") is None:
        from pillow_heif import register_heif_opener

        register_heif_opener()
    return [name for name in Image.ID if name in Image.OPEN and name not in REFUSED_FORMATS]


@cache
def readable_extensions() -> set[str]:
    """Extensions of these formats, such as ".png"."""
    formats = readable_formats()
    return {extension for extension, name in Image.registered_extensions().items() if name in formats}


@contextmanager
def _undecodable() -> Iterator[None]:
    """Turns every exception inside into an `UndecodableImage`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about unusual files that it can read
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except UndecodableImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = f"{Image.MAX_IMAGE_PIXELS:,} (PIL.Image.MAX_IMAGE_PIXELS)"
        raise UndecodableImage(
            f"decompression bomb: the file declares more pixels than the limit of {limit}"
        ) from error
    except UnidentifiedImageError as error:
        refused = ", ".join(REFUSED_FORMATS)
        raise UndecodableImage(
            f"the file is in no image format that Pillow knows, or in one that is never read ({refused})"
        ) from error
    except ValueError as error:
        raise UndecodableImage(_one_line(error)) from error
    except Exception as error:  # decoders raise exceptions of many types
        raise UndecodableImage(f"{type(error).__name__}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
