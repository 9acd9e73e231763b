"""One case of a benchmark: lanes that do the same work. Their results are compared before they are timed."""

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks.machine import Ceilings
from benchmarks.measuring import interleaved, peak_memory, ratio, repeats_for, seconds_of, summary

# Name of this project's lane. All other lanes are compared with it.
OURS = "tessella"

# Shortest time of a turn on a GPU. In a long turn, the synchronization takes a negligible part.
SHORTEST_TURN = 0.02

Prepared = Callable[[], Any]


@dataclass(kw_only=True)
class Case:
    """Lanes that do the same work.

    Attributes:
        row: name of the group of cases, for `--rows`.
        setting: description of the case within its row.
        lanes: functions that prepare a lane and return the function to time. They are functions of a module with bound
            arguments, because they also run in a new process. The first lane is this project's.
        agree: compares the results of the lanes before the measurement, and returns the differences found. It raises
            AssertionError if the lanes do not compute the same.
        unit, count: unit of the results of a call, and their number.
        operations: operations of matrix products and convolutions in an ideal call, or a function that returns them.
        floor: shortest possible seconds of a call, given the ceilings of the machine; by default from `operations`.
        dtype: dtype of the ceilings that apply.
        absent: peers that are not installed, and the reason.
        memory: whether the memory of a call can be measured.
        longest: limit of the seconds of all rounds together.
    """

    row: str
    setting: str
    lanes: Mapping[str, Callable[[], Prepared]]
    agree: Callable[[], Mapping[str, Any]]
    unit: str
    count: float
    operations: float | Callable[[], float] = 0.0
    floor: Callable[[Ceilings], float] | None = None
    dtype: torch.dtype = torch.float32
    absent: Mapping[str, str] = field(default_factory=dict)
    memory: bool = True
    longest: float = 30.0

    @property
    def name(self) -> str:
        """Row and setting."""
        return f"{self.row}, {self.setting}"


def measure(case: Case, device: torch.device, ceilings: Ceilings, rounds: int) -> dict[str, Any]:
    """Compares the results of the lanes, then times the lanes in turns.

    A peer's lane that fails is reported and skipped; a failure of this project's lane is an error.

    On a CPU, the memory of a call is the growth of the resident memory of a new process, at its peak. On a GPU, it is
    the growth of the memory of torch's allocator, from before the preparation of the lane to the peak of a call.

    Raises:
        AssertionError: the lanes do not compute the same.
    """
    found = dict(case.agree())
    calls, first, memory = dict[str, Prepared](), dict[str, float](), dict[str, float | None]()
    failed = dict[str, str]()
    for name, prepare in case.lanes.items():
        held = allocated(device)
        since = time.perf_counter()
        try:
            call = prepare()
            seconds_of(call, device)
            first[name] = time.perf_counter() - since
            memory[name] = _memory(prepare, call, device, held) if case.memory else None
        except Exception as error:  # the other lanes are measured anyway
            if name == OURS:
                raise
            failed[name] = f"{type(error).__name__}: {error}"
            continue
        calls[name] = call
    seconds = {name: seconds_of(call, device) for name, call in calls.items()}
    repeats = {name: repeats_for(each, SHORTEST_TURN if device.type != "cpu" else 0) for name, each in seconds.items()}
    turn = sum(seconds[name] * repeats[name] for name in calls)
    rounds = min(rounds, max(3, math.floor(case.longest / turn)))
    times = interleaved(calls, rounds, 1, device, repeats)
    operations = case.operations() if callable(case.operations) else case.operations
    floor = case.floor(ceilings) if case.floor is not None else ceilings.seconds(operations)
    lanes = {}
    for name, of_lane in times.items():
        summed = summary(of_lane)
        each = summed["median_ms"] / 1e3
        lanes[name] = {
            **summed,
            "per_second": case.count / each,
            "time_ratio": ratio(of_lane, times[OURS]),
            "of_floor": round(floor / each, 3) if floor else None,
            "mfu": round(operations / each / ceilings.matmul, 3) if operations else None,
            "peak_memory_mb": memory[name],
            "first_call_s": round(first[name], 2),
        }
    return {
        "row": case.row,
        "setting": case.setting,
        "unit": case.unit,
        "dtype": str(case.dtype).removeprefix("torch."),
        "rounds": rounds,
        "agreement": found,
        "floor_ms": round(1e3 * floor, 3),
        "lanes": lanes,
        "failed": failed,
        "absent": dict(case.absent),
    }


def allocated(device: torch.device) -> int:
    """Bytes that torch has allocated on a GPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _memory(prepare: Callable[[], Prepared], call: Prepared, device: torch.device, held: int) -> float:
    """Megabytes of 2²⁰ bytes, see `measure`."""
    if device.type != "cuda":
        whole = prepare if isinstance(prepare, partial) else partial(prepare)
        return round(peak_memory(whole.func, *whole.args) / 2**20, 1)
    torch.cuda.reset_peak_memory_stats(device)
    seconds_of(call, device)
    return round((torch.cuda.max_memory_allocated(device) - held) / 2**20, 1)


def forget(device: torch.device) -> None:
    """Frees the compiled code, graphs and memory of a case."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def lines(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the table for a case."""
    return [
        {
            "row": result["row"],
            "setting": result["setting"],
            "lane": name,
            "per second": f"{lane['per_second']:,.4g} {result['unit']}" if lane["per_second"] < 1000 else
            f"{lane['per_second']:,.0f} {result['unit']}",
            "ms": lane["median_ms"],
            "min": lane["min_ms"],
            "p90": lane["p90_ms"],
            "time / tessella": "{median} ({p10}–{p90})".format(**lane["time_ratio"]),
            "of floor": shown(lane["of_floor"]),
            "MFU": shown(lane["mfu"]),
            "MB": shown(lane["peak_memory_mb"]),
            "first call s": lane["first_call_s"],
            "contaminated": "yes" if lane["contaminated"] else "",
        }
        for name, lane in result["lanes"].items()
    ]  # fmt: skip


def shown(value: float | None) -> str:
    """A number as text; a dash for None."""
    return "–" if value is None else f"{value:g}"
