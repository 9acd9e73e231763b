"""The processes that `tessella run` starts: one for each step, or one for each GPU."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from stage1_vqgan import import_own
from tessella.steps import Step

ROOT = Path(str(import_own("configs").__file__)).parents[1]
STOPPING = (signal.SIGINT, signal.SIGTERM)


def number_of_gpus() -> int:
    """GPUs of this machine that PyTorch can use."""
    import torch

    return torch.cuda.device_count()


class Child:
    """A step in a process of its own. Signals to this process reach it too.

    Args:
        step: what to run.
        gpus: GPUs that share the work, if they can.
        output: file for what it prints; by default it prints where this process prints.

    Attributes:
        stopped_by: the signal that came to this process in the meantime, if any.
    """

    def __init__(self, step: Step, gpus: int, output: IO[str] | None = None):
        self.stopped_by: int | None = None
        launcher = ["-m", "accelerate.commands.launch", *step.launcher(gpus)] if step.launcher(gpus) else []
        self._command = [sys.executable, *launcher, "-m", "tessella", step.name, *step.arguments]
        self._output = output

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen]:
        """Starts the process. When the context ends, so has the process."""
        # The process inherits that Ctrl-C is blocked, until it can end in one line. A launcher never hears of it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING[:1])
        handlers = {number: signal.getsignal(number) for number in STOPPING}
        process = subprocess.Popen(self._command, env=environment(), stdout=self._output, stderr=self._output)
        try:
            for number in STOPPING:
                signal.signal(number, lambda number, frame: self._forward(process, number))
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            yield process
            process.wait()
        finally:
            process.terminate()
            process.wait()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def exit_code(self, process: subprocess.Popen) -> int:
        """Waits for the end; the exit code as a shell gives it. A launcher has one of its own for a stopped job."""
        code = process.wait()
        return 128 + (self.stopped_by or -code) if code < 0 or (code and self.stopped_by) else code

    def _forward(self, process: subprocess.Popen, number: int) -> None:
        self.stopped_by = number
        process.send_signal(number)


def environment() -> dict[str, Any]:
    """Environment variables of a step. With them, Python finds no module in the folder where the user stands."""
    is_clone = Path.cwd().resolve() == ROOT.resolve()  # one that is not installed
    return dict(os.environ) if is_clone else {**os.environ, "PYTHONSAFEPATH": "1"}
