"""Encoded images → PIL images; what cannot be decoded is told by one exception, with the reason."""

import io
from typing import NamedTuple

from PIL import Image


class EncodedImage(NamedTuple):
    """An image as its source holds it.

    Attributes:
        name: for messages: a path, or where it lies in the source.
        content: the bytes of a file, the path of one, or an image that is decoded already.
    """

    name: str
    content: bytes | str | Image.Image


class SkippedImage(NamedTuple):
    """An image that was left out of a batch: its number in the source, its name, and why."""

    image: int
    name: str
    reason: str


class UndecodableImage(ValueError):
    """An image that cannot be used; the message is the reason."""


def decode(encoded: EncodedImage) -> Image.Image:
    """The decoded image.

    Raises:
        UndecodableImage: it cannot be decoded.
    """
    if isinstance(encoded.content, Image.Image):
        return encoded.content
    try:
        image = Image.open(io.BytesIO(encoded.content) if isinstance(encoded.content, bytes) else encoded.content)
        image.load()
    except Exception as error:  # decoders raise many kinds
        raise UndecodableImage(f"{type(error).__name__}: {error}") from error
    return image
