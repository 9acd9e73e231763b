"""The processes that `tessella run` starts: one for each step, or one for each GPU."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import psutil

from configs.ctrl_c import STDERR, ctrl_c
from stage1_vqgan import import_own
from tessella.steps import Step

ROOT = Path(str(import_own("configs").__file__)).parents[1]
POLL_SECONDS = 0.05
STOPPING = (signal.SIGINT, signal.SIGTERM)


def number_of_gpus() -> int:
    """GPUs of this machine that PyTorch can use."""
    import torch

    return torch.cuda.device_count()


class Child:
    """A step in a process of its own, or in one for each GPU. Signals to this process are passed on to them.

    Args:
        step: what to run.
        gpus: GPUs that share the work, if they can.
        output: file for what it prints; by default it prints where this process prints.

    Attributes:
        stopped_by: the signal that came to this process in the meantime, if any.
    """

    def __init__(self, step: Step, gpus: int, output: IO[str] | None = None):
        self.stopped_by: int | None = None
        self._launcher, self._output = step.launcher(gpus), output
        start = ["-m", "accelerate.commands.launch", *self._launcher] if self._launcher else []
        self._command = [sys.executable, *start, "-m", "tessella", step.name, *step.arguments]

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen]:
        """Starts the process. When the context ends, so has the process."""
        # A process inherits that Ctrl-C is blocked, until it can end in one line.
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
        while self._launcher and process.poll() is None:
            if self.stopped_by is not None and not running_workers(process):
                process.kill()
            time.sleep(POLL_SECONDS)
        code = process.wait()
        return 128 + (self.stopped_by or -code) if code < 0 or (code and self.stopped_by) else code

    def _forward(self, process: subprocess.Popen, number: int) -> None:
        """Passes a signal on. A launcher is halted, because it would report a failure while its processes save."""
        self.stopped_by = number
        if not self._launcher:
            process.send_signal(number)
            return
        process.send_signal(signal.SIGSTOP)
        workers = running_workers(process)
        for worker in workers:
            worker.send_signal(number)
        if not workers:  # it has not started them yet, so nobody else says it
            os.write(STDERR, f"\n{ctrl_c.message}\n".encode())


def running_workers(launcher: subprocess.Popen) -> list[psutil.Process]:
    """The processes of a job that have not ended. Their launcher may be halted, and those that ended be zombies."""
    children = psutil.Process(launcher.pid).children() if launcher.poll() is None else []
    return [child for child in children if child.status() != psutil.STATUS_ZOMBIE and "tessella" in child.cmdline()]


def environment() -> dict[str, Any]:
    """Environment variables of a step. With them, Python finds no module in the folder where the user stands."""
    is_clone = Path.cwd().resolve() == ROOT.resolve()  # one that is not installed
    return dict(os.environ) if is_clone else {**os.environ, "PYTHONSAFEPATH": "1"}
