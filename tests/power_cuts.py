"""A power cut: what is on the disk, if the system keeps only what a program has asked it to sync.

The model is stricter than most file systems. A file has the contents of its last fsync, or none. A folder has the names
that it had at its own last fsync.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class Disk:
    """Records the state on the disk of everything below a folder, by following every `os.fsync`.

    Args:
        root: exists, and is on the disk as it is now.
        monkeypatch: replaces `os.fsync`.
        after_sync: called after each fsync, with this object.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, after_sync: Callable[["Disk"], None] | None = None):
        self.root, self.after_sync = root, after_sync
        self._contents: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}
        self._held: dict[int, int] = {}  # open files by their number: the system gives no number to a second file
        self._synced = os.fsync
        for path in [*root.rglob("*"), root]:
            self._record(path)
        monkeypatch.setattr(os, "fsync", self._fsync)

    def _fsync(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_relative_to(self.root):
            self._record(path)
            if self.after_sync is not None:
                self.after_sync(self)

    def _record(self, path: Path) -> None:
        number = self._hold(path)
        if path.is_dir():
            self._names[number] = {entry.name: self._hold(entry.path) for entry in os.scandir(path)}
            for entry in os.scandir(path):
                if entry.is_dir():
                    self._names.setdefault(entry.inode(), {})
        else:
            self._contents[number] = path.read_bytes()

    def _hold(self, path: str | Path) -> int:
        number = os.stat(path).st_ino
        if number not in self._held:
            self._held[number] = os.open(path, os.O_RDONLY)
        return number

    def __del__(self) -> None:
        for descriptor in self._held.values():
            os.close(descriptor)

    def restore(self, folder: Path) -> Path:
        """Writes what is on the disk into a new folder, as a restart after a power cut would find it."""
        shutil.rmtree(folder, ignore_errors=True)
        self._write(self.root.stat().st_ino, folder)
        return folder

    def _write(self, number: int, path: Path) -> None:
        if number not in self._names:
            path.write_bytes(self._contents.get(number, b""))
            return
        path.mkdir()
        for name, child in self._names[number].items():
            self._write(child, path / name)


class Crash(BaseException):
    """The end of a process at a chosen operation."""


def crash_after(calls: int, operations: list[tuple[Any, str]], patch: pytest.MonkeyPatch) -> None:
    """Replaces functions, given as `(owner, name)`, by ones that raise `Crash` after so many calls of all together."""
    left = [calls]

    def crashing(function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not left[0]:
                raise Crash
            left[0] -= 1
            return function(*args, **kwargs)

        return call

    for owner, name in operations:
        patch.setattr(owner, name, crashing(getattr(owner, name)))
