"""Ctrl-C outside of a training loop ends a command in one line, from its first imports on.

This file is imported before all others, and imports little itself.
"""

import os
import signal
import sys
import time
from contextlib import suppress
from types import FrameType

# The terminal sends one Ctrl-C to all processes, and a launcher forwards it to its workers once more. So a SIGINT that
# follows the first one this soon is not a second Ctrl-C.
SAME_KEYSTROKE_SECONDS = 1.0
# A KeyboardInterrupt that reaches no `except` of a command in this time was lost. Cleaning up takes less.
LOST_AFTER_SECONDS = 10.0
STDERR = 2


class CtrlC:
    """A handler of SIGINT that ends a command in one line, also while Python imports modules.

    During an import the process ends at once, because an import may swallow a KeyboardInterrupt, or print it and go on.
    This is as safe as SIGKILL, which no file of ours is lost by. At other times KeyboardInterrupt is raised, and the
    code that it passes cleans up. It may get lost on its way: Python ignores exceptions in destructors, and that of a
    data loader waits for its workers. So the process ends after LOST_AFTER_SECONDS, unless `arrived` is called. A
    signal within the next second does nothing, a later one ends the process at once.
    """

    exit_code = 128 + signal.SIGINT
    message = "stopped at once; the same command resumes from what was saved"

    def __init__(self) -> None:
        self.happened, self._process, self._since = False, 0, 0.0

    def install(self) -> None:
        """Replaces Python's own handler. One of a caller, or the decision to ignore Ctrl-C, stays."""
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            with suppress(ValueError):  # only the main thread of a process can handle signals
                signal.signal(signal.SIGINT, self)
            self.happened, self._process = False, os.getpid()
        # `tessella run` blocks the signal in the processes that it starts, until here.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a data loader's worker that has not called `leave_signals_to_main` yet
            return
        first, now = not self.happened, time.monotonic()
        if first:
            self.happened, self._since = True, now
            if not _is_importing(frame):
                signal.signal(signal.SIGALRM, lambda number, frame: self._end(True))
                signal.setitimer(signal.ITIMER_REAL, LOST_AFTER_SECONDS)
                raise KeyboardInterrupt
        elif now - self._since <= SAME_KEYSTROKE_SECONDS:
            return
        self._end(first)

    def arrived(self) -> None:
        """Says that the command ends: its KeyboardInterrupt was not lost."""
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _end(self, first: bool) -> None:
        """Ends the process at once; says so if `first`."""
        with suppress(RuntimeError, OSError):  # the signal may have interrupted a print()
            sys.stdout.flush()
        if first and os.environ.get("RANK", "0") == "0":
            os.write(STDERR, f"\n{self.message}\n".encode())
        os._exit(self.exit_code)


def _is_importing(frame: FrameType | None) -> bool:
    """Whether a frame, or one that called it, is Python's import system."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


ctrl_c = CtrlC()
# A command of ours begins: `python -m`, which first imports the packages of its module, or the console script.
if [os.path.basename(name) for name in sys.argv[:1]] in (["-m"], ["tessella"]):
    ctrl_c.install()
