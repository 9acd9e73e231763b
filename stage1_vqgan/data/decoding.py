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
from typing import NamedTuple

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import decode_jpeg

from stage1_vqgan.image_processing_vqgan import convert_mode, orientation, to_pixels

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
        content: the bytes of a file, the path of a file, or a decoded image.
    """

    name: str
    content: bytes | str | Image.Image


class SkippedImage(NamedTuple):
    """An image that was left out of a batch: its number in the source, its name, and the reason."""

    image: int
    name: str
    reason: str


class UndecodableImage(ValueError):
    """An image cannot be decoded; the message is the reason, in one line."""


def decode(encoded: EncodedImage) -> Image.Image:
    """Decodes an image; of an animation or a file of several pages, the first one.

    Raises:
        UndecodableImage: the file cannot be decoded, or declares more than `PIL.Image.MAX_IMAGE_PIXELS` pixels.
    """
    if isinstance(encoded.content, Image.Image):
        return encoded.content
    with _undecodable():
        image = _open(read(encoded.content))
        image.load()
        return image


def decode_pixels(encoded: EncodedImage, num_channels: int) -> Tensor:
    """Decodes an image into upright 8-bit pixels, see `convert_mode`.

    torchvision decodes plain JPEGs, because it is faster than Pillow and returns the same pixels. Pillow decodes all
    other files, and the JPEGs that torchvision refuses.

    Args:
        encoded: image to decode.
        num_channels: 1 (gray) or 3 (RGB).

    Returns:
        uint8 `(H, W, C)`.

    Raises:
        UndecodableImage: the file cannot be decoded, declares more than `PIL.Image.MAX_IMAGE_PIXELS` pixels, or has
            values out of range.
    """
    with _undecodable():
        if isinstance(encoded.content, Image.Image):
            return to_pixels(convert_mode(encoded.content, num_channels))
        content = read(encoded.content)
        image = None if _is_bare_jpeg(content, num_channels) else _open(content)
        if image is None or _is_plain_jpeg(image, num_channels):
            try:
                pixels = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8)).permute(1, 2, 0)
            except RuntimeError:
                pass  # Pillow decodes the file, or states why it cannot
            else:
                return pixels if pixels.shape[2] == num_channels else pixels.expand(-1, -1, num_channels)
        return to_pixels(convert_mode(image or _open(content), num_channels))


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
    """The formats of Pillow that are read, the most common ones first."""
    Image.init()
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
