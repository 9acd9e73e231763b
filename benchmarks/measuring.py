"""Methods of measurement: times of lanes that take turns, ratios of times, and the memory of a call."""

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

# If the median of a lane exceeds its minimum by this factor, other load has disturbed it.
CONTAMINATED = 1.3

CPU = torch.device("cpu")

# Modules to import once in the process from which new processes are forked.
HEAVY = [f"benchmarks.{name}" for name in ("training_step", "tokenizer", "prior_training", "sampling")]


class Times(NamedTuple):
    """Seconds of every call of a lane: wall-clock time, and CPU time of all threads."""

    wall: list[float]
    cpu: list[float]


def interleaved(
    lanes: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    device: torch.device = CPU,
    repeats: Mapping[str, int] | None = None,
) -> dict[str, Times]:
    """Times lanes that take turns, so that other load on the machine affects all of them.

    Args:
        lanes: the functions to call.
        rounds: number of measured turns of each lane.
        warmup: number of turns before the measurement.
        device: the device to wait for before the clock is read.
        repeats: number of calls in one turn, whose mean is recorded. More calls reduce the cost of waiting for the
            device. By default 1.
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
    """Median, minimum and 90th percentile of the wall-clock time in ms, and whether other load disturbed the lane."""
    median, least = statistics.median(times.wall), min(times.wall)
    return {
        "median_ms": round(1e3 * median, 3),
        "min_ms": round(1e3 * least, 3),
        "p90_ms": round(1e3 * quantile(times.wall, 0.9), 3),
        "contaminated": median / least > CONTAMINATED,
    }


def ratio(numerator: Times, denominator: Times) -> dict[str, float]:
    """Ratio of the times of two lanes, round by round: median, 10th and 90th percentile, and median of the CPU times.

    Also the ratio of the minima. Other load hardly changes the CPU times.
    """
    by_wall, by_cpu = ([a / b for a, b in zip(*pair, strict=True)] for pair in zip(numerator, denominator, strict=True))
    return {
        "median": round(statistics.median(by_wall), 2),
        "p10": round(quantile(by_wall, 0.1), 2),
        "p90": round(quantile(by_wall, 0.9), 2),
        "by_cpu": round(statistics.median(by_cpu), 2),
        "of_minima": round(min(numerator.wall) / min(denominator.wall), 2),
    }


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile of values, with linear interpolation."""
    return torch.tensor(values, dtype=torch.float64, device="cpu").quantile(q).item()


def repeats_for(seconds: float, least: float) -> int:
    """Number of calls of `seconds` each that take at least `least` seconds together."""
    return max(1, math.ceil(least / max(seconds, 1e-6)))


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock seconds of one call."""
    return interleaved({"": call}, 1, 0, device)[""].wall[0]


def peak_memory(prepare: Callable[..., Callable[[], Any]], *arguments: Any) -> int:
    """Bytes by which a call raises the resident memory of a new process, at the peak.

    Resident memory includes the memory of the math libraries, which torch's allocator does not count. Freed blocks
    above 64 KB return to the system (`MALLOC_MMAP_THRESHOLD_`). Otherwise the call could reuse memory that was freed
    before, and the measurement would miss it. Linux only.

    Args:
        prepare: a function of a module. The new process calls it with `arguments`, and measures a call of its result.

    Raises:
        OSError: the kernel's high-water mark cannot be reset here.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)  # imported once, not in every process
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)  # glibc reads it when the fork server starts
    try:
        with ProcessPoolExecutor(1, context) as pool:
            return pool.submit(_peak, prepare, arguments).result()
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]


def _peak(prepare: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]) -> int:
    torch.set_num_threads(1)
    call = prepare(*arguments)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
