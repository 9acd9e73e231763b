"""How it is measured: lanes that take turns, their times and ratios, and the memory of a call."""

import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from stage2_prior.training.throughput import synchronize

# A lane whose median is so much above its minimum met others who use the machine.
CONTAMINATED = 1.3

CPU = torch.device("cpu")

# Modules that import what lanes need.
HEAVY = [f"benchmarks.{name}" for name in ("training_step", "tokenizer", "prior_training", "sampling")]


class Times(NamedTuple):
    """Seconds of every call of a lane: on the clock, and of CPU time of all threads."""

    wall: list[float]
    cpu: list[float]


def interleaved(
    lanes: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    device: torch.device = CPU,
    repeats: Mapping[str, int] | None = None,
) -> dict[str, Times]:
    """Times of the lanes, which take turns, so that what else the machine does meets all of them.

    Args:
        lanes: what is called.
        rounds: turns of each lane that count.
        warmup: turns before them.
        device: that is waited for before the clock is read.
        repeats: calls in one turn, whose mean is kept; waiting for the device costs less then. One by default.
    """
    times = {name: Times([], []) for name in lanes}
    for number in range(warmup + rounds):
        for name, lane in lanes.items():
            calls = repeats[name] if repeats else 1
            synchronize(device)
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(calls):
                lane()
            synchronize(device)
            if number >= warmup:
                times[name].wall.append((time.perf_counter() - wall) / calls)
                times[name].cpu.append((time.process_time() - cpu) / calls)
    return times


def summary(times: Times) -> dict[str, float | bool]:
    """Median, minimum and 90th percentile on the clock in milliseconds, and whether the lane was disturbed."""
    median, least = statistics.median(times.wall), min(times.wall)
    return {
        "median_ms": round(1e3 * median, 3),
        "min_ms": round(1e3 * least, 3),
        "p90_ms": round(1e3 * quantile(times.wall, 0.9), 3),
        "contaminated": median / least > CONTAMINATED,
    }


def ratio(numerator: Times, denominator: Times) -> dict[str, float]:
    """Of two lanes, round by round: the median, the range that holds 80 % of the rounds, and the median by CPU time,
    which others on the machine hardly change; and of the two minima."""
    by_wall, by_cpu = ([a / b for a, b in zip(*pair, strict=True)] for pair in zip(numerator, denominator, strict=True))
    return {
        "median": round(statistics.median(by_wall), 2),
        "p10": round(quantile(by_wall, 0.1), 2),
        "p90": round(quantile(by_wall, 0.9), 2),
        "by_cpu": round(statistics.median(by_cpu), 2),
        "of_minima": round(min(numerator.wall) / min(denominator.wall), 2),
    }


def quantile(values: Sequence[float], q: float) -> float:
    """Linear between the values."""
    return torch.tensor(values, dtype=torch.float64, device="cpu").quantile(q).item()


def repeats_for(seconds: float, least: float) -> int:
    """Calls of so many seconds each that take at least a certain time together."""
    return max(1, math.ceil(least / max(seconds, 1e-6)))


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Of one call."""
    return interleaved({"": call}, 1, 0, device)[""].wall[0]


def peak_memory(prepare: Callable[..., Callable[[], Any]], *arguments: Any) -> int:
    """Bytes of resident memory that a call needs beyond what its process held before, at its peak, in a fresh process.

    The kernel counts, so memory of the math libraries is in it, which torch's allocator does not see. Blocks above
    64 KB go back to the system when they are freed (`MALLOC_MMAP_THRESHOLD_`), so that what was used before does
    not hide what is needed now. Linux only.

    Args:
        prepare: a function of a module, called in the process with `arguments`; what it returns is measured.

    Raises:
        OSError: the kernel's high-water mark cannot be reset here.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)  # imported once, not by every process
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)  # read by glibc when the server of processes starts
    try:
        with ProcessPoolExecutor(1, context) as pool:
            return pool.submit(_peak, prepare, arguments).result()
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]


def _peak(prepare: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]) -> int:
    torch.set_num_threads(1)
    call = prepare(*arguments)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    """Bytes, of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
