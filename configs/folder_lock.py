"""One job at a time in a folder."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from configs.problems import ConfigError, Problem

LOCK_NAME = ".lock"
HOLDER_NAME = ".holder.json"
ADVICE = "wait until it has ended, stop it, or choose another folder"


@contextmanager
def held(folder: str | Path, key: str) -> Iterator[None]:
    """Holds a folder, which is made if need be; the system lets go of it when the process ends, however it ends.

    Args:
        folder: to be written in.
        key: of the configuration that names the folder, for the message.

    Raises:
        ConfigError: another process holds it.
        OSError: it cannot be made or written in.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_NAME, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError([Problem(key, f"{folder} is in use by {_holder(folder)}; {ADVICE}")]) from None
    try:
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        (folder / HOLDER_NAME).write_text(json.dumps(holder) + "\n")
        yield
    finally:
        (folder / HOLDER_NAME).unlink(missing_ok=True)
        lock.release()


def _holder(folder: Path) -> str:
    try:
        holder = json.loads((folder / HOLDER_NAME).read_text())
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError):
        return "another process"
