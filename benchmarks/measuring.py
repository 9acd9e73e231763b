"""What the benchmarks share: lanes that take turns, their ratios, peak memory in a fresh process, and the report."""

import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

# A lane whose median is so much above its minimum met others who use the machine.
CONTAMINATED = 1.3

PACKAGES = ("torch", "transformers", "accelerate", "lpips", "vector-quantize-pytorch")


class Times(NamedTuple):
    """Seconds of every call of a lane: on the clock, and of CPU time of all threads."""

    wall: list[float]
    cpu: list[float]


def interleaved(lanes: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, Times]:
    """Times of the lanes, which take turns, so that what else the machine does meets all of them."""
    times = {name: Times([], []) for name in lanes}
    for number in range(warmup + rounds):
        for name, lane in lanes.items():
            wall, cpu = time.perf_counter(), time.process_time()
            lane()
            if number >= warmup:
                times[name].wall.append(time.perf_counter() - wall)
                times[name].cpu.append(time.process_time() - cpu)
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


def lane_rows(
    result: Mapping[str, Any], head: Mapping[str, Any], more: Callable[[str, Mapping[str, Any]], Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Lines of the table of one result with its `threads` and `peak_memory_mb`: the columns of `head`, those that every
    benchmark has, and those of `more(name, lane)`."""
    return [
        {
            **head,
            "threads": count,
            "lane": name,
            "ms": lane["median_ms"],
            "min": lane["min_ms"],
            "p90": lane["p90_ms"],
            "time / tessella": "{median} ({p10}–{p90})".format(**lane["time_ratio"]),
            "by CPU": lane["time_ratio"]["by_cpu"],
            "by minima": lane["time_ratio"]["of_minima"],
            "MB": result["peak_memory_mb"][name],
            "tessella's memory": lane["memory_ratio"],
            **more(name, lane),
            "contaminated": "yes" if lane["contaminated"] else "",
        }
        for count, lanes in result["threads"].items()
        for name, lane in lanes.items()
        if name != "machine"
    ]


def quantile(values: Sequence[float], q: float) -> float:
    """Linear between the values."""
    return torch.tensor(values, dtype=torch.float64).quantile(q).item()


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
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)  # read by glibc when the process starts
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(_peak, (prepare, arguments))
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


def environment() -> dict[str, Any]:
    """What was measured, on which machine, and how busy others kept it."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    sha = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "commit": sha.stdout.strip() or None,
        "python": platform.python_version(),
        "versions": versions,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


@torch.no_grad()
def machine_speed(rounds: int = 5) -> dict[str, float]:
    """The best the machine does with the threads set: float32 matrix product, convolution, copy."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    image = torch.randn(4, 128, 32, 32).contiguous(memory_format=torch.channels_last)
    kernel = torch.randn(128, 128, 3, 3).contiguous(memory_format=torch.channels_last)
    source, target = torch.randn(2**25), torch.empty(2**25)
    lanes = {
        "matmul": lambda: a @ b,
        "conv": lambda: F.conv2d(image, kernel, padding=1),
        "copy": lambda: target.copy_(source),
    }
    least = {name: min(times.wall) for name, times in interleaved(lanes, rounds).items()}
    return {
        "matmul_gflops": round(2 * 1024**3 / least["matmul"] / 1e9, 1),
        "conv_gflops": round(2 * 9 * 128**2 * 4 * 32**2 / least["conv"] / 1e9, 1),
        "copy_gb_per_s": round(2 * 4 * 2**25 / least["copy"] / 1e9, 1),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as lines of aligned columns."""
    columns = list(rows[0])
    cells = [columns, *([str(row[column]) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def write(path: str, result: Mapping[str, Any]) -> None:
    """Saves a result as JSON."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {path}")
