"""How `datasets` reads a tar: it decodes only texts and whole numbers, and a damaged tar is refused."""

import os
import tarfile
from collections.abc import Iterator
from functools import cache
from typing import Any

from stage1_vqgan import compat

# Extensions of labels. `datasets` would decode others too, among them torch, NumPy and msgpack files.
DECODED = {"txt", "text", "transcript", "cls", "cls2", "index", "inx", "id"}
BLOCK = tarfile.BLOCKSIZE


@cache
def restrict_webdataset() -> None:
    """Restricts what `datasets` does with tars in this process.

    Files with another extension than DECODED stay bytes. So do compressed files (`0001.png.gz`), as they may unpack
    to any size.
    """
    compat.restrict_webdataset(DECODED, _checked)


def _checked(path: str, files: Any) -> Iterator[tuple[str, Any]]:
    """The files of a tar; those of a tar on this machine are compared with its size.

    Raises:
        ValueError: the tar is compressed, a file is larger than the tar, or the tar ends without an end mark. `tarfile`
            takes a damaged header for the end, so the images after it would be missing.
    """
    size, file = os.path.getsize(path) if os.path.isfile(path) else None, None
    for name, file in files:
        if file.raw.fileobj.comptype != "tar":
            raise ValueError(f"{path} is compressed; unpack it, because images hardly become smaller")
        if size is not None and file.raw.size > size:
            raise ValueError(f"{name} in {path} has {file.raw.size:,} bytes, more than the tar itself ({size:,})")
        yield name, file
    if size is not None and file is not None:
        _require_end_mark(path, file.raw.fileobj.pos - BLOCK)


def _require_end_mark(path: str, position: int) -> None:
    """Raises a ValueError unless the last header that was read, at `position`, is a block of zeros."""
    with open(path, "rb") as tar:
        tar.seek(position)
        if tar.read(BLOCK) != bytes(BLOCK):
            raise ValueError(f"{path} is cut short, or the header at byte {position:,} is damaged")
