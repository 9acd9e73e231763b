"""What the fuzz tests share: seeded cases, damage to files, and a watch over what a case does.

A case passes if it is refused with one of our errors, or gives the same numbers as the undamaged input. It fails on any
other exception, after SECONDS, above MEMORY, or if it executes or writes something.
"""

import multiprocessing
import os
import pickle
import random
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SECONDS = 10  # far above any case, even on a busy machine: a case takes milliseconds
MEMORY = 2**30  # bytes by which one case may raise the peak of this process's memory

# Audit events of Python that run code, or reach other processes or machines.
EXECUTING = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn", "socket.connect")

_watches: list["Watch"] = []


def cases(short: int, long: int) -> pytest.MarkDecorator:
    """Parametrizes `numbers` of a test: the first `short` cases by default, all `long` ones with `-m slow`."""
    sets = [pytest.param(range(short), id="short"), pytest.param(range(long), id="long", marks=pytest.mark.slow)]
    return pytest.mark.parametrize("numbers", sets)


def generator(name: str, number: int) -> random.Random:
    """The random numbers of a case, the same in every run."""
    return random.Random(f"{name}/{number}")


class TooSlow(Exception):
    """A case took longer than SECONDS."""


class Watch:
    """Records what code inside the context executes, connects to, or opens for writing outside `allowed` folders."""

    def __init__(self, *allowed: Path):
        self.allowed = [str(path.resolve()) for path in allowed] + ["/dev/", "/proc/"]
        self.found: list[str] = []
        self._thread = threading.get_ident()

    def __enter__(self) -> "Watch":
        if not _watches:
            _install()
        _watches.append(self)
        return self

    def __exit__(self, *exception: Any) -> None:
        _watches.remove(self)

    def record(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Called for every audit event of Python."""
        if threading.get_ident() != self._thread:
            return
        if event.startswith(EXECUTING):
            self.found.append(f"{event} {arguments[:1]!r}")
        elif event == "open":
            path, mode, flags = (*arguments, None, 0)[:3]
            writes = bool(set(mode or "") & set("wax+")) or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if writes and isinstance(path, str | os.PathLike):
                name = os.path.realpath(os.fspath(path))
                if not name.startswith(tuple(self.allowed)) and "__pycache__" not in name:
                    self.found.append(f"writes {name}")


_installed = False


def _install() -> None:
    global _installed
    if not _installed:  # an audit hook cannot be removed
        sys.addaudithook(lambda event, arguments: [watch.record(event, arguments) for watch in list(_watches)])
        _installed = True


@contextmanager
def limits() -> Iterator[None]:
    """Raises `TooSlow` after SECONDS, and fails if the peak memory of the process grows by more than MEMORY."""

    def stop(number: int, frame: Any) -> None:
        raise TooSlow(f"more than {SECONDS} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MEMORY, f"the peak of the memory grew by {grown:,} bytes"


def outcome(call: Callable[[], Any], refusals: tuple[type[BaseException], ...], *allowed: Path) -> Any:
    """Runs one case: its result, or the refusal that it raised, as an exception object.

    Args:
        call: the case.
        refusals: exceptions that count as a refusal; any other one fails the test.
        allowed: folders in which the case may write.
    """
    with Watch(*allowed) as watch, limits():
        try:
            result = call()
        except refusals as error:
            result = error
    assert not watch.found, watch.found
    return result


def in_processes(check: Callable[..., None], numbers: range, *arguments: Any, chunk: int = 50) -> None:
    """Calls `check(numbers, *arguments)`; chunks of a long range in a process each, so that a crash fails one test."""
    if len(numbers) <= 2 * chunk:
        check(numbers, *arguments)
        return
    for first in range(0, len(numbers), chunk):
        part = numbers[first : first + chunk]
        process = multiprocessing.get_context("spawn").Process(target=check, args=(part, *arguments))
        process.start()
        process.join()
        assert process.exitcode == 0, f"exit code {process.exitcode} in cases {part[0]} to {part[-1]}"


def damaged(data: bytes, draw: random.Random) -> bytes:
    """One damaged version of a file's bytes: flipped, cut, zeroed, repeated, moved, inserted or emptied."""
    kind = draw.choice(["flip", "byte", "cut", "zero", "repeat", "swap", "insert", "empty", "garbage"])
    if not data or kind == "empty":
        return b""
    place = draw.randrange(len(data))
    end = min(len(data), place + draw.choice([1, 4, 16, 512]))
    if kind == "flip":
        return data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]
    if kind == "byte":
        return data[:place] + bytes([draw.randrange(256)]) + data[place + 1 :]
    if kind == "cut":
        return data[:place]
    if kind == "zero":
        return data[:place] + bytes(end - place) + data[end:]
    if kind == "repeat":
        return data[:end] + data[place:]
    if kind == "swap":
        return data[end:] + data[:end]
    if kind == "insert":
        return data[:place] + draw.randbytes(end - place) + data[place:]
    return draw.randbytes(len(data))


class Planted:
    """Unpickling this object creates the file `canary`."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.canary,)


def planted_pickle(canary: Path) -> bytes:
    """A pickle that creates the file `canary` when it is loaded, in the protocol of torch.save."""
    return pickle.dumps(Planted(canary), protocol=2)
