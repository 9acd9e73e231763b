"""How a tar of webdataset's layout is read: files of one name are a sample, and a damaged tar is refused.

`0001.jpg` and `0001.cls` are the sample 0001 with the fields jpg and cls. By webdataset's rule, a field begins at the
first dot of a file's name. In `scan.v1.0001.png` it begins at the last one; the names in the tar show which rule fits.
"""

import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import groupby, islice
from typing import Any

from stage1_vqgan import compat
from stage1_vqgan.data.decoding import readable_extensions

# Fields that are texts; all others stay bytes. `datasets` would decode torch, NumPy and msgpack files among others.
TEXTS = {"txt", "text", "transcript", "cls", "cls2", "index", "inx", "id", "json"}
BLOCK = tarfile.BLOCKSIZE
IMAGE = "image"  # the field of the only image of a sample, where some are .jpg and others .png
MOST_PEEKED = 256  # files whose names show the rule

Rule = Callable[[str], tuple[str, str]]


@cache
def restrict_webdataset() -> None:
    """Lets `datasets` read tars by this module in this process.

    Compressed files (`0001.png.gz`) stay as they are, because they may unpack to any size.
    """
    compat.replace_webdataset_reader(samples, IMAGE)


def samples(path: str, files: Any) -> Iterator[dict[str, Any]]:
    """The samples of a tar: `{field: text or bytes}`, with `__key__` and `__url__`.

    Args:
        path: path of the tar.
        files: its pairs of a name and an open file.

    Raises:
        ValueError: a sample has a field twice, a text is not UTF-8, or the tar is damaged, see `_checked`.
    """
    rule = _fitting_rule(_first_names(path))
    named = ((*rule(name), file) for name, file in _checked(path, files) if "." in os.path.basename(name))
    for key, members in groupby(named, key=lambda member: member[0]):
        sample: dict[str, Any] = {}
        for _, field, file in members:
            if field in sample:
                raise ValueError(f"{path} holds two files {key}.{field}")
            sample[field] = _text_or_bytes(field.rpartition(".")[2].lower(), file.read())
        yield {**sample, "__key__": key, "__url__": path}


def _text_or_bytes(extension: str, content: bytes) -> str | bytes:
    """The content of a file; JSON that is no UTF-8 is refused later, if its labels are wanted."""
    if extension not in TEXTS:
        return content
    return content.decode("utf-8-sig", errors="replace" if extension == "json" else "strict").strip()


def _first_dot(name: str) -> tuple[str, str]:
    folder, slash, file = name.rpartition("/")
    stem, _, field = file.partition(".")
    return folder + slash + stem, field


def _last_dot(name: str) -> tuple[str, str]:
    key, _, field = name.rpartition(".")
    return key, field


def _one_image(rule: Rule) -> Rule:
    """The rule that gives images of any extension one field."""

    def changed(name: str) -> tuple[str, str]:
        key, field = rule(name)
        return key, IMAGE if f".{field.lower()}" in readable_extensions() else field

    return changed


RULES: list[Rule] = [_first_dot, _last_dot, _one_image(_first_dot), _one_image(_last_dot)]


def _fitting_rule(names: Sequence[str]) -> Rule:
    """The first of the rules by which most samples have the same fields."""

    def fit(rule: Rule) -> float:
        fields = [tuple(rule(name)[1] for name in group) for _, group in groupby(names, key=lambda name: rule(name)[0])]
        return Counter(fields).most_common(1)[0][1] / len(fields) if len(fields) > 1 else 0

    return max(RULES, key=fit)


def _first_names(path: str) -> list[str]:
    """Names of the first files of a tar on this machine; none of a remote or damaged one, which reading will refuse."""
    if not os.path.isfile(path):
        return []
    try:
        with tarfile.open(path, "r:") as tar:
            names = [member.name for member in islice(tar, MOST_PEEKED) if member.isfile()]
    except (tarfile.TarError, OSError, ValueError, EOFError):
        return []
    return [name for name in names if "." in os.path.basename(name) and not os.path.basename(name).startswith(".")]


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
