"""Ends a group of processes of which one has stalled, and says which one and where.

A process that waits for the others in a collective operation of torch cannot tell who is missing. torch numbers these
operations. A thread of each process writes its number to the store of the group; the lowest numbers are the late ones.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from configs.groups import joined_group

EXIT_CODE = 6
PERIOD = 1.0  # seconds between two reports of a process
ANSWER = 10.0  # seconds; the store answers in milliseconds, unless the process that holds it has stalled
ROOT = f"{Path(__file__).parents[1]}{os.sep}"
PACKAGES = tuple(f"{ROOT}{name}{os.sep}" for name in ("configs", "pipelines", "stage1_vqgan", "stage2_prior"))


def library_timeout(seconds: int) -> timedelta:
    """The timeout of torch's own collectives. Its message names no process, so it comes later than ours."""
    return timedelta(seconds=2 * seconds + 60)


@contextmanager
def watched_for_stalls(seconds: int) -> Iterator[None]:
    """Inside this context, a process that waits for another one for so many seconds ends with exit code 6.

    All processes of a group must open it, after the group has connected. A process that computes is never ended.

    Raises:
        ConfigError: see `joined_group`.
    """
    from configs.compat import connect_to_store

    if joined_group() == 1:
        yield
        return
    store = connect_to_store()  # the main thread may wait on the other connection
    _report(store)  # at once: the process may stall in its first second
    stopped = threading.Event()
    thread = threading.Thread(target=_watch, args=(store, seconds, stopped), name="stalls", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def _watch(store: Any, seconds: int, stopped: threading.Event) -> None:
    from torch.distributed import get_rank, get_world_size

    rank, number, since = get_rank(), -1, 0.0
    while not stopped.wait(PERIOD):
        try:
            now = _report(store)
        except RuntimeError:  # the store died with its process, so torch's operations fail as well
            return
        if now != number:
            number, since = now, time.monotonic()
        if time.monotonic() - since >= seconds:
            _end_if_late(rank, number, _reports(store, get_world_size(), number), seconds)


def _report(store: Any) -> int:
    """Writes the number of operations and the place of this process to the store. Returns the number."""
    from torch.distributed import get_rank

    from configs.compat import operations_begun

    number = operations_begun()
    store.set(f"stalls/{get_rank()}", json.dumps([number, _place()]))
    return number


def _reports(store: Any, world_size: int, number: int) -> list[tuple[int, str]]:
    """The number of operations and the place of every process."""

    def ask(rank: int) -> tuple[int, str]:
        key = f"stalls/{rank}"
        return tuple(json.loads(store.get(key))) if store.check([key]) else (-1, "before its start")

    asking = ThreadPoolExecutor(1)  # without it, torch would wait for the store of a stopped process forever
    try:
        return list(asking.submit(lambda: [ask(rank) for rank in range(world_size)]).result(ANSWER))
    except TimeoutError:
        return [(-1, "as the holder of the group's store, which does not answer")] + [(number, "")] * (world_size - 1)


def _end_if_late(rank: int, number: int, reports: list[tuple[int, str]], seconds: int) -> None:
    late = [f"rank {other}, last seen {place}" for other, (done, place) in enumerate(reports) if done < number]
    if late:
        first = min(other for other, (done, _) in enumerate(reports) if done >= number)
        _end(seconds, ", ".join(late), _place() if rank == first else None)


def _end(seconds: int, late: str, place: str | None) -> None:
    """Ends this process at once: its main thread waits inside torch, where no exception reaches it."""
    if place is not None:
        cause = f"the other processes have waited for {seconds} seconds (ddp_timeout) {place}"
        message = f"\nstalled: {late}; {cause}. The same command resumes from what was saved\n"
        os.write(2, message.encode())
    os._exit(EXIT_CODE)


def _place() -> str:
    """The innermost line of this project that the main thread executes, or of any code if none is of this project."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    stack = [entry for entry in traceback.extract_stack(frame) if entry.filename != __file__]
    ours = [entry for entry in stack if entry.filename.startswith(PACKAGES)]
    innermost = (ours or stack)[-1]
    return f"in {innermost.name} ({innermost.filename.removeprefix(ROOT)}:{innermost.lineno})"
