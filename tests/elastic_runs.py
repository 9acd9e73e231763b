"""Runs of tests/kill_runs.py under a launcher, with faults of one rank; for tests/test_elastic.py.

    torchrun … -m tests.elastic_runs NAME FOLDER [RANK:FAULT:POINT:COUNT …]

RANK is killed, stopped, or sleeps, at its COUNT-th call of a function of kill_runs.POINTS, or at its start. A file in
FOLDER records that this has happened, so that it happens once.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.devices import ON_CPU

STALL_SECONDS = 60  # far longer than a step, or the start of the workers, on a busy machine
ROOT = str(Path(__file__).parents[1])
ENVIRONMENT = {**os.environ, **ON_CPU, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}
HOW: dict[str, Callable[[], Any]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda: time.sleep(10**6),
}


def free_port() -> int:
    """A port on which nothing listens now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def main(name: str, folder: Path, faults: list[str]) -> None:
    from configs import command_line
    from stage2_prior import code_store, tokenization
    from tests import kill_runs

    for fault in faults:
        rank, how, point, count = fault.split(":")
        happened = folder / f"happened {fault}"
        if rank != os.environ["RANK"] or happened.exists():
            continue
        left = [int(count)]
        if point == "start":
            _call(happened, how)
        for owner, function in kill_runs.POINTS.get(point, []):
            setattr(owner, function, _with_fault(getattr(owner, function), left, happened, how))
    kill_runs.COMMON["ddp_timeout"] = STALL_SECONDS
    for module in (code_store, tokenization):
        module.SHARD_ROWS = kill_runs.SHARD_ROWS  # type: ignore[attr-defined]
    command_line.run(kill_runs.Nothing, lambda _: kill_runs.RUNS[name](folder), name, [])


def _with_fault(function: Callable, left: list[int], happened: Path, how: str) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            _call(happened, how)
        return function(*args, **kwargs)

    return call


def _call(happened: Path, how: str) -> None:
    happened.touch()
    os.write(2, f"\n{how} at {happened.name}\n".encode())
    HOW[how]()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
