"""Compares this project with other libraries: `python -m benchmarks.run --suite cpu`, or `--suite gpu` on one GPU.

`--suite tiny` has the cases and lanes of gpu with tiny models. It runs anywhere, to try the code. Its figures mean
nothing.

A case has several lanes that do the same work. Their results are compared first. Then the lanes are timed in turns,
and the median of the ratios of each round is reported. The same run measures the peak performance of the machine. "of
floor" is the shortest time of the ideal work on this machine divided by the measured time. "MFU" is the number of ideal
operations divided by the number of operations of a large matrix product in the same time. Ideal work computes nothing
twice; only matrix products and convolutions count as operations.

`pip install 'tessella[bench]'` installs the other libraries. A library that is not installed is reported and skipped.
Results are written after each case. A case that fails does not stop the next one.
"""

import argparse
import contextlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import (
    code_search,
    cold_start,
    decode_attention,
    prior_training,
    sampling,
    tokenization,
    tokenizer,
    training_step,
)
from benchmarks.case import OURS, Case, forget, lines, measure
from benchmarks.machine import ceilings, environment
from benchmarks.report import table, write

RESULTS = Path(__file__).parent / "results"

# In the order of measurement: functions of suite, device and `--data` that yield the cases of a row.
ROWS: list[Callable[[str, torch.device, str | None], Iterator[Case]]] = [
    training_step.cases,
    tokenizer.encode_cases,
    tokenizer.decode_cases,
    code_search.cases,
    prior_training.cases,
    decode_attention.cases,
    sampling.cases,
    tokenization.cases,
    cold_start.cases,
]


def cases_of(suite: str, device: torch.device, data: str | None = None) -> list[Case]:
    """All cases of a suite. The memory of a tiny model is not measured."""
    cases = [case for cases in ROWS for case in cases(suite, device, data)]
    return [replace(case, memory=False) for case in cases] if suite == "tiny" else cases


def chosen(cases: Sequence[Case], rows: Sequence[str] | None, lanes: Sequence[str] | None) -> Sequence[Case]:
    """The cases of `--rows`, in the order of `--rows`, with the lanes of `--lanes`; by default all.

    Raises:
        ValueError: nothing has such a name.
    """
    if rows:
        cases = [cases[place] for words in rows for place in named(words, [case.name for case in cases])]
    if lanes:
        names = [*dict.fromkeys(lane for case in cases for lane in case.lanes)]
        kept = {OURS} | {names[place] for words in lanes for place in named(words, names)}
        cases = [replace(case, lanes={lane: case.lanes[lane] for lane in case.lanes if lane in kept}) for case in cases]
    return cases


def named(words: str, names: Sequence[str]) -> list[int]:
    """The places of the names that contain all of these words."""
    found = [place for place, name in enumerate(names) if all(word in name for word in words.split())]
    if not found:
        raise ValueError(f"--rows or --lanes: no name has the words {words!r}; names are: {'; '.join(names)}")
    return found


def compilation(suite: str) -> contextlib.AbstractContextManager[Any]:
    """Inside this context, torch.compile of tiny models on a CPU generates no code, which would take minutes."""
    if suite != "tiny" or device_of(suite).type != "cpu":
        return contextlib.nullcontext()
    compiled = torch.compile
    return patch.object(torch, "compile", lambda *args, **how: compiled(*args, **{**how, "backend": "aot_eager"}))


def device_of(suite: str) -> torch.device:
    """A GPU for the suite gpu, and for tiny if there is one."""
    on_gpu = suite == "gpu" or (suite == "tiny" and torch.cuda.is_available())
    return torch.device("cuda" if on_gpu else "cpu")


def run(args: argparse.Namespace, cases: Sequence[Case]) -> int:
    """Measures cases; returns the number of failed lanes and cases."""
    device = device_of(args.suite)
    if args.threads:
        torch.set_num_threads(args.threads)
    started = perf_counter()
    result: dict[str, Any] = {"suite": args.suite, "environment": environment(device), "ceilings": {}, "cases": []}
    output = Path(args.output) if args.output else RESULTS / f"{args.suite}-{result['environment']['date']}.json"
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    limits = {}
    for case in cases:
        if args.minutes and perf_counter() - started > 60 * args.minutes:
            print(f"{case.name}: no time left", flush=True)
            result["cases"].append({"row": case.row, "setting": case.setting, "error": "no time left"})
            continue
        try:
            if case.dtype not in limits:
                limits[case.dtype] = ceilings(device, case.dtype)
                result["ceilings"][str(case.dtype).removeprefix("torch.")] = limits[case.dtype].as_json()
            measured = measure(case, device, limits[case.dtype], args.rounds)
            result["cases"].append(measured)
            rows += lines(measured)
            failed += [f"{case.name}, {lane}: {reason}" for lane, reason in measured["failed"].items()]
            print(f"\n{case.name}: {measured['agreement']}\n{table(lines(measured))}", flush=True)
        except Exception as error:  # the other cases are measured anyway
            traceback.print_exc()
            failed.append(case.name)
            result["cases"].append({"row": case.row, "setting": case.setting, "error": repr(error)})
        finally:
            forget(device)
        result["seconds"] = round(perf_counter() - started, 1)
        write(output, result)
    if rows:
        print(f"\n{result['environment']}\nceilings, in 10⁹ a second: {result['ceilings']}\n\n{table(rows)}")
    for peer, reason in sorted({pair for case in result["cases"] for pair in case.get("absent", {}).items()}):
        print(f"absent: {peer}: {reason}")
    for name in failed:
        print(f"failed: {name}")
    return len(failed)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=["cpu", "gpu", "tiny"], default="cpu")
    parser.add_argument(
        "--rows", nargs="+", metavar="WORDS", help="cases whose names have all these words, by default all"
    )
    parser.add_argument(
        "--lanes", nargs="+", metavar="WORDS", help="lanes whose names have all these words, and ours; by default all"
    )
    parser.add_argument("--list", action="store_true", help="only list the names of the cases")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="number of CPU threads")
    parser.add_argument("--minutes", type=float, help="start no case after this time")
    parser.add_argument("--data", help="folder or parquet file of JPEGs, for tokenization")
    parser.add_argument("--output", help="JSON file, by default benchmarks/results/SUITE-DATE.json")
    args = parser.parse_args()
    if args.suite == "gpu" and not torch.cuda.is_available():
        parser.error("--suite gpu: torch finds no CUDA device here; --suite cpu runs anywhere")
    try:
        cases = chosen(cases_of(args.suite, device_of(args.suite), args.data), args.rows, args.lanes)
    except ValueError as error:
        parser.error(str(error))
    if args.list:
        print(*(case.name for case in cases), sep="\n")
        return
    with compilation(args.suite):
        raise SystemExit(1 if run(args, cases) else 0)


if __name__ == "__main__":
    main()
