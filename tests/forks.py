"""Starts processes quickly: each is forked from a process that has already imported all modules."""

import faulthandler
import gc
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState, GradientState

from tests.devices import ON_CPU

CONTEXT = multiprocessing.get_context("forkserver")
# All that runs import, even late. The import of scikit-learn's data sets alone takes longer than a run.
PRELOADED = ["sklearn.datasets", "pydantic.dataclasses", "transformers.models.llama.modeling_llama"]
CONTEXT.set_forkserver_preload([*PRELOADED, "tests.kill_runs", "tests.sharded_runs"])
LONGEST = 240  # seconds; a run on a busy machine takes a small part of this
STDERR = 2


def start(function: Callable[..., None], arguments: tuple, log: Path) -> Any:
    """Starts a process that calls a function on the CPU and writes its output to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    log.touch()
    process = CONTEXT.Process(target=_child, args=(function, arguments, log))
    process.start()
    return process


def end(process: Any, log: Path) -> int | None:
    """Waits for a process and its child processes; returns its exit code (-9 if it was killed).

    Raises:
        AssertionError: the process hangs. The message shows its output and the stack of each thread.
    """
    process.join(LONGEST)
    if process.is_alive():
        for number in (signal.SIGUSR1, signal.SIGKILL):
            os.killpg(process.pid, number)
            time.sleep(1)
        raise AssertionError(f"still running after {LONGEST} seconds:\n{log.read_text()}")
    return process.exitcode


def run_on_two_processes(
    function: Callable[..., None], *arguments: Any, log: Path, environment: dict[str, str] | None = None
) -> None:
    """Calls a function in two processes of one job, with environment variables as `accelerate launch` sets them."""
    process = start(launch_two, (function, arguments, environment or {}), log)
    assert end(process, log) == 0, log.read_text()[-4000:]


def _child(function: Callable[..., None], arguments: tuple, log: Path) -> None:
    os.environ.update(ON_CPU)
    torch.set_num_threads(1)
    gc.freeze()  # as in tests/conftest.py
    os.fsync = lambda descriptor: None
    os.setpgrp()
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, STDERR)
    faulthandler.register(signal.SIGUSR1, STDERR)
    function(*arguments)


def launch_two(function: Callable[..., None], arguments: tuple, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    debug_launcher(_rank, (function, arguments, port), num_processes=2)


def _rank(function: Callable[..., None], arguments: tuple, port: str) -> None:
    # PyTorch replaces its pool of threads in the first call after a fork. Two threads that call at once find none.
    torch.set_num_threads(1)
    os.environ["MASTER_PORT"] = port  # that of debug_launcher is always the same, also in other jobs on the machine
    AcceleratorState._reset_state(reset_partial_state=True)  # the fork copied the state of its parent
    GradientState._reset_state()
    function(*arguments)
