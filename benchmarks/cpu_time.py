"""CPU seconds of the parts of a run, also of one that was interrupted."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.files import write_json

SECONDS_NAME = "cpu_seconds.json"


def complete(folder: Path, result: str, work: Callable[[], object]) -> None:
    """Does a part of a run and counts its CPU seconds. If its result is there, `work` only compares the settings."""
    if (folder / result).is_file():
        work()
    else:
        with counted(folder):
            work()


@contextmanager
def counted(folder: Path) -> Iterator[None]:
    """Adds the CPU seconds spent inside to those of earlier attempts, in a file beside `folder`."""
    started = cpu_seconds()
    try:
        yield
    finally:
        spent, path = seconds_of(folder) + cpu_seconds() - started, folder.parent / SECONDS_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, known_seconds(folder) | {folder.name: round(spent, 1)})


def cpu_seconds() -> float:
    """CPU seconds of this process and of those that it has started and that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def seconds_of(folder: Path) -> float:
    """The CPU seconds that were counted for the part in this folder."""
    return known_seconds(folder).get(folder.name, 0.0)


def known_seconds(folder: Path) -> dict[str, float]:
    """The seconds of this part and of those in the folders beside it, by the name of the folder."""
    path = folder.parent / SECONDS_NAME
    return json.loads(path.read_text()) if path.is_file() else {}
