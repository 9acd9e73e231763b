"""Atomic writes: a file is complete or absent, even after a power cut.

It is written under another name, synced to disk, and then renamed. Syncing the folder makes the new name permanent.
"""

import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from configs.disk_space import naming_full_disk

# Largest JSON file in bytes. Its values take up to twenty times as much memory.
LARGEST_JSON = 2**24

# Errors of writing into a folder that exists.
NO_WRITING = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """Opens a binary file that replaces `path` at the end of the context. Until then, an older file of the name stays.

    After an error nothing has changed, and the unfinished file is removed.

    Raises:
        DiskFull: the message names the file.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)  # a link of this name would be written through
        with naming_full_disk(path), open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def append_line(path: str | Path, line: str) -> None:
    """Appends a line to a text file, which is created if needed. Never writes through a link or into a pipe.

    Raises:
        OSError: the path is a link, a pipe without a reader, or cannot be written.
    """

    def plain(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)

    with open(path, "a", opener=plain) as file:
        file.write(line + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file atomically, in UTF-8."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: str | Path, values: dict[str, Any]) -> None:
    """Writes a JSON file atomically."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_png(path: str | Path, image: Any) -> None:
    """Writes a PIL image atomically, as PNG."""
    with replacing(path) as file:
        image.save(file, "PNG")


def read_json(path: str | Path) -> dict[str, Any]:
    """Reads a file that holds a JSON object.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file holds something else, or is larger than LARGEST_JSON.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"{path}: this is not a regular file; remove it")
    if (size := Path(path).stat().st_size) > LARGEST_JSON:
        raise ValueError(f"{path}: this file has {size:,} bytes; JSON files are read up to at most {LARGEST_JSON:,}")
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: this file is not JSON ({error}); download or save it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: received a {type(values).__name__}; the file must hold a JSON object")
    return values


def make_folder(folder: str | Path) -> Path:
    """Creates a folder and its missing parents; their names are on disk afterwards. Returns the folder."""
    folder = Path(folder)
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for created in missing:
        sync_folder(created.parent)
    return folder


def remove_tree(path: str | Path) -> None:
    """Removes a folder and everything in it, or a file, or a link but not what it leads to."""
    path = Path(path)
    if path.is_symlink() or path.is_file():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def sync_folder(folder: str | Path) -> None:
    """Waits until the names of a folder's files are on disk."""
    if os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: str | Path) -> None:
    """Waits until a folder and everything in it are on disk."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            with open(Path(parent, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(parent)


def new_file_mode(folder: str | Path) -> None:
    """Gives every file in a folder the permissions of a new file; the safetensors library allows only the owner."""
    folder = Path(folder)
    with tempfile.TemporaryDirectory(dir=folder) as empty:
        sample = Path(empty, "sample")
        sample.touch()
        mode = stat.S_IMODE(sample.stat().st_mode)
    for path in folder.rglob("*"):
        if path.is_file() and stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)
