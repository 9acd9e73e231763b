"""A lock on a folder, so that only one job writes to it."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from configs.files import make_folder, read_json, write_json
from configs.problems import ConfigError, Problem

LOCK_NAME = ".lock"
OWNER_NAME = ".holder.json"
ADVICE = "wait until it has ended, stop it, or choose another folder"


@contextmanager
def locked_folder(folder: str | Path, config_key: str) -> Iterator[None]:
    """Creates a folder if needed, and locks it. The operating system releases the lock however the process ends.

    Args:
        folder: the folder to lock.
        config_key: the key that names the folder in the configuration, for the error message.

    Raises:
        ConfigError: another process has locked the folder, or its lock is not a plain file.
        OSError: the folder cannot be created or written to.
    """
    folder = make_folder(folder)
    path = folder / LOCK_NAME
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ConfigError([Problem(config_key, f"{path} is a link or no plain file; remove it")])
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError([Problem(config_key, f"{folder} is in use by {_owner(folder)}; {ADVICE}")]) from None
    try:
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        write_json(folder / OWNER_NAME, owner)
        yield
    finally:
        (folder / OWNER_NAME).unlink(missing_ok=True)
        lock.release()


def _owner(folder: Path) -> str:
    try:
        owner = read_json(folder / OWNER_NAME)
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError):
        return "another process"
