"""What identifies images: a checksum of their files and labels."""

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
import xxhash

from configs.checksums import checksum
from stage1_vqgan.data.dataset import ImageKey
from stage1_vqgan.data.decoding import EncodedImage
from stage1_vqgan.data.sources import Images, peek
from stage1_vqgan.data.streamed import ImageStream
from stage1_vqgan.pictures import spread

BATCH_SIZE = 256


def fingerprint_of_images(source: Images, count: int) -> str:
    """A checksum of the files and labels of `some_keys`, of the number of all images, and of the class names.

    The files are read, but not decoded.
    """
    digest = xxhash.xxh3_128(json.dumps([source.num_images, source.class_names]).encode())
    for _, items in groupby(enumerate(some_keys(source, count)), lambda item: item[0] // BATCH_SIZE):
        keys, labels = zip(*(item for _, item in items), strict=True)
        digest.update(json.dumps([[key.image for key in keys], labels]).encode())
        streamed = [key.encoded for key in keys if key.encoded is not None]
        for image in streamed or source.encoded([key.image for key in keys]):  # type: ignore[union-attr]
            digest.update(_bytes_of(image))
    return digest.hexdigest()


def some_keys(source: Images, count: int) -> Iterator[tuple[ImageKey, int | None]]:
    """Keys and labels of the images of `peek`, which are not read if they can be read later by their number."""
    if isinstance(source, ImageStream):
        for number, encoded, label in peek(source, count):
            yield ImageKey(0, number, encoded=encoded), label
        return
    for number in spread(len(source), count):
        yield ImageKey(0, number), None if source.labels is None else int(source.labels[number])


def _bytes_of(image: EncodedImage) -> bytes:
    """Bytes that identify an image; none if its file is missing, and so cannot be decoded."""
    content = image.content
    if isinstance(content, bytes):
        return xxhash.xxh3_128_digest(content)
    if isinstance(content, str):
        path = Path(content) if Path(content).exists() else Path(content.rpartition("::")[0])  # a slice of a volume
        return checksum(path).encode() if path.is_file() else b""
    pixels = np.asarray(content)
    return f"{pixels.shape} {pixels.dtype}".encode() + pixels.tobytes()
