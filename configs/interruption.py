"""Stopping on request: SIGTERM or the first Ctrl-C ends a run after the current step, a second Ctrl-C at once.

Exit codes of every command: 0 done, 2 configuration error, 3 diverged, 4 disk full, 5 out of memory, 6 another process
stalled, 130 stopped by Ctrl-C, 143 stopped by SIGTERM. The last two are 128 + signal number, as in shells.
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

from configs.ctrl_c import SAME_KEYSTROKE_SECONDS, STDERR


class Stopped(Exception):
    """A signal stopped the run, and a checkpoint was saved. The message says how to resume."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


class Diverged(RuntimeError):
    """A loss or a weight is no longer finite. The message says which, at which step, and what to do."""

    exit_code = 3


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Inside this context, SIGTERM raises `Stopped`, so that the code inside can clean up.

    A training loop uses `StopRequest` instead.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped("stopped by SIGTERM; the same command resumes from what was saved", number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class StopRequest:
    """Records SIGTERM and Ctrl-C while it is open. A training loop calls `agreed_signal` after every step.

    Python delivers signals to the main thread only; in another thread this records nothing.
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

    def agreed_signal(self) -> int | None:
        """The signal that any process has received, the same value on all processes; None without a signal.

        All processes must call this after the same steps.
        """
        from torch import distributed, tensor

        if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
            return self.signal_number
        if self._group is None:  # gloo reduces on the CPU, so the host does not wait for the GPU
            self._group = distributed.new_group(backend="gloo")
        numbers = tensor(self.signal_number or 0)
        distributed.all_reduce(numbers, distributed.ReduceOp.MAX, group=self._group)
        return int(numbers) or None

    def _request(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a data loader's worker that has not called `leave_signals_to_main` yet
            return
        now = time.monotonic()
        if self.signal_number is None:
            self.signal_number, self._since = number, now
            if os.environ.get("RANK", "0") == "0":
                name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
                message = f"\n{name}: stopping after this step; Ctrl-C stops at once\n"
                os.write(STDERR, message.encode())  # the signal may have interrupted a print()
        elif number == signal.SIGINT and now - self._since > SAME_KEYSTROKE_SECONDS:
            raise KeyboardInterrupt


def leave_signals_to_main(worker_id: int) -> None:
    """`worker_init_fn` of a data loader: its workers ignore signals that are sent to the whole job.

    The main process still needs their batches for the current step. A SIGTERM to the worker itself still ends it,
    because the data loader stops its workers in this way. A worker whose parent died during the start ends here:
    torch watches the parent only later, so the worker would wait forever. torch watches the process that forked the
    worker. If that is a server process, the worker itself waits for the end of its parent.
    """
    parent = multiprocessing.parent_process()
    is_forked = multiprocessing.get_start_method() == "fork"
    if parent is not None and is_forked and os.getppid() != parent.pid:
        os._exit(1)
    if parent is not None and not is_forked:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)
