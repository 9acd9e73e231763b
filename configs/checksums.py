"""Checksums of files, and of JSON objects: what is damaged, missing or exchanged is found before it is used.

They protect against damage and mixed-up files, not against a person who changes the files and the checksums.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from configs.files import read_json, write_json
from configs.problems import shown

CHECKSUMS_NAME = "checksums.json"
SEAL = "xxh3_128"  # key of the checksum in a JSON object that carries its own
CHECKED_SUFFIXES = {".json", ".safetensors"}

# Files that were already read in this process, by path, inode, size and time of change.
_known: dict[tuple[Any, ...], str] = {}


class Damaged(ValueError):
    """A file is missing, or it is not the file that was saved. The message names the file."""


def checksum(path: str | Path) -> str:
    """The XXH3-128 checksum of a file, as 32 hexadecimal digits. A process reads an unchanged file once."""
    path = Path(path)
    status = path.stat()
    identity = (str(path.resolve()), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if identity not in _known:
        with open(path, "rb") as file:
            _known[identity] = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()  # type: ignore[arg-type]
    return _known[identity]


def listing(paths: Iterable[Path], root: Path) -> dict[str, dict[str, Any]]:
    """`{path relative to root: {"size": bytes, "xxh3_128": checksum}}` of files."""
    return {
        path.relative_to(root).as_posix(): {"size": path.stat().st_size, "xxh3_128": checksum(path)}
        for path in sorted(paths)
    }


def is_inside(name: str, root: Path) -> bool:
    """Whether a name in a list of files stands for a file inside a folder, also after links to folders are followed."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or set(name) & set("\\:\0"):
        return False
    return (root / name).parent.resolve().is_relative_to(root.resolve())


def verify_listing(files: Any, root: Path) -> None:
    """Compares the files of a folder with a `listing`.

    Raises:
        Damaged: a listed file is missing or has changed, or the listing itself is malformed.
    """
    if not isinstance(files, dict):
        raise Damaged(f"{root}: received {files!r}; the list of its files must map names to sizes and checksums")
    for name, expected in files.items():
        path = root / name
        if not is_inside(name, root):
            raise Damaged(f"{root}: received {shown(name)}; the list of its files may name only files inside")
        if not path.is_file():
            raise Damaged(f"{path}: this file is missing")
        if not isinstance(expected, dict) or expected.keys() != {"size", "xxh3_128"}:
            raise Damaged(f"{path}: received {shown(expected)}; the list must hold the size and checksum of this file")
        if (size := path.stat().st_size) != expected["size"]:
            raise Damaged(f"{path}: this file has {size:,} bytes; {shown(expected['size'])} were saved")
        if checksum(path) != expected["xxh3_128"]:
            raise Damaged(f"{path}: the contents of this file have changed since it was saved")


def write_checksums(folder: str | Path) -> None:
    """Writes `checksums.json`, which lists the JSON and safetensors files that stand directly in a folder.

    It also lists the `checksums.json` of subfolders, which must exist before. So an exchanged part is noticed.
    """
    folder = Path(folder)
    paths = [path for path in folder.iterdir() if path.suffix in CHECKED_SUFFIXES and path.name != CHECKSUMS_NAME]
    write_json(folder / CHECKSUMS_NAME, listing([*paths, *folder.glob(f"*/{CHECKSUMS_NAME}")], folder))


def verify_checksums(folder: str | Path, needed: Iterable[str] = ()) -> None:
    """Compares the files of a folder with its `checksums.json`, if there is one.

    Args:
        folder: folder of a model.
        needed: names of files that the list must contain, if they exist.

    Raises:
        Damaged: a listed file is missing or has changed, or a needed file is not listed.
    """
    folder = Path(folder)
    if not (folder / CHECKSUMS_NAME).is_file():
        return
    try:
        files = read_json(folder / CHECKSUMS_NAME)
        verify_listing(files, folder)
        for name in needed:
            if name not in files and (folder / name).is_file():
                raise Damaged(f"{folder / name}: this file was added after the folder was saved")
    except ValueError as error:
        advice = f"save or download the folder again; if you changed it on purpose, remove {folder / CHECKSUMS_NAME}"
        raise Damaged(f"{error} ({advice})") from error


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """JSON values and, as the last key, their checksum."""
    return {**values, SEAL: xxhash.xxh3_128_hexdigest(json.dumps(values).encode())}


def unsealed(values: Any, source: Any) -> dict[str, Any]:
    """Inverse of `sealed`, after JSON was written and read.

    Args:
        values: what was read.
        source: names the file in messages.

    Raises:
        Damaged: the checksum is missing, or the values have changed.
    """
    if not isinstance(values, dict) or SEAL not in values:
        raise Damaged(f"{source}: its checksum is missing; another program or an earlier version wrote this file")
    rest = {name: value for name, value in values.items() if name != SEAL}
    if sealed(rest) != values:
        raise Damaged(f"{source}: the contents of this file have changed since it was written")
    return rest
