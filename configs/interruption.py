"""Stopping on request: SIGTERM and the first Ctrl-C end a run after its step; a second Ctrl-C ends it at once.

Exit codes of every command: 0 done, 2 a mistake in the configuration, 3 the numbers went wrong, 130 stopped by Ctrl-C,
143 stopped by SIGTERM (by 128 + number of the signal, as shells have it).
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# A launcher passes on the Ctrl-C that the terminal has sent to its workers already: that is not a second one.
SAME_KEYSTROKE_SECONDS = 1.0
STDERR = 2


class Stopped(Exception):
    """The run ended on request, with everything saved; the message says how to go on."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


class Diverged(RuntimeError):
    """The numbers went wrong; the message says which, when, and what to do."""

    exit_code = 3


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Makes SIGTERM end what runs inside as an exception, so that it is cleaned up; where it is, see `StopRequest`."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped("stopped by SIGTERM; the same command goes on from what has been saved", number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class StopRequest:
    """Catches SIGTERM and Ctrl-C while it is open, for a loop to ask after every step.

    Outside the main thread, where Python delivers no signals, nothing is caught.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._process = os.getpid()
        self._since = 0.0
        self._previous: dict[int, Any] = {}
        self._group: Any = None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def agreed(self) -> int | None:
        """The signal that asks to stop, once any process has got one; all processes must ask after the same steps."""
        from torch import distributed, tensor

        if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
            return self.signal_number
        if self._group is None:  # on the CPU: asking needs nothing from a GPU's queue
            self._group = distributed.new_group(backend="gloo")
        numbers = tensor(self.signal_number or 0)
        distributed.all_reduce(numbers, distributed.ReduceOp.MAX, group=self._group)
        return int(numbers) or None

    def _request(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker process before `leave_signals_to_main`
            return
        now = time.monotonic()
        if self.signal_number is None:
            self.signal_number, self._since = number, now
            if os.environ.get("RANK", "0") == "0":
                name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
                message = f"\n{name}: stopping after this step; Ctrl-C stops at once\n"
                os.write(STDERR, message.encode())  # print() may be what was interrupted, and cannot be entered twice
        elif number == signal.SIGINT and now - self._since > SAME_KEYSTROKE_SECONDS:
            raise KeyboardInterrupt


def leave_signals_to_main(worker_id: int) -> None:
    """For the start of a data loader's worker: a signal for the whole job is not for it, its batches are still needed.

    A SIGTERM that is sent to the worker itself ends it: so the data loader does. A worker whose run was killed while it
    started ends here: torch looks for the death of its parent only from then on, and would let it wait for ever.
    """
    parent = multiprocessing.parent_process()
    is_forked = multiprocessing.get_start_method() == "fork"
    if parent is not None and is_forked and os.getppid() != parent.pid:
        os._exit(1)
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
