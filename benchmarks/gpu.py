"""Uses minutes on a machine with one GPU and without a network: `python -m benchmarks.gpu PART...`.

The parts run in the given order, each as far as `--budget` allows:

- `check` names the GPU, the driver, the versions, and what is missing.
- `tests` runs the tests that need CUDA, the fastest and most telling first. Each test is a line of tests.jsonl.
- `rows` runs cases of `benchmarks.run`, the most important first, each row in a process of its own. rows.json is
  written after each row; row.json holds the cases of the row that runs.
- `recipe` trains and evaluates both stages of a preset, see `benchmarks.recipes`.

A row, or a group of tests, starts only if its limit fits into what is left of the budget; the others are named as not
run. One that exceeds its limit is stopped, and the next one starts. All that the programs print is in log.txt.

`--rehearse` runs the same programs with tiny models, also without a GPU, to find mistakes beforehand.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.inventory import inventory
from benchmarks.report import table, write

ROOT = Path(__file__).parents[1]


class Tests(NamedTuple):
    """A group of tests: arguments of pytest, seconds, and whether several processes share the GPU."""

    arguments: Sequence[str]
    limit: int
    is_parallel: bool = False


DEVICES, ATTENTION = "tests/test_devices.py", "tests/stage2_prior/sampling/test_attention.py"
GOLDEN = (
    "tests/stage1_vqgan/test_model.py",
    "tests/stage1_vqgan/training/test_losses.py",
    "tests/stage2_prior/convert/test_convert_priors.py",
)
NUMBERS = "random_numbers or those_of_the_cpu"
TESTS = {
    "numbers": Tests((DEVICES, ATTENTION, "-k", f"{NUMBERS} or attention", "-m", "slow or not slow"), 90),
    "golden": Tests((*GOLDEN, "-k", "originals_numbers or are_the_originals"), 90),
    "devices": Tests((DEVICES, "-k", f"not ({NUMBERS})"), 240, is_parallel=True),
}


class Row(NamedTuple):
    """Cases and lanes of `benchmarks.run`, by words of their names, and seconds."""

    cases: Sequence[str]
    lanes: Sequence[str]
    limit: int


MODES = ("eager", "without Triton")
ROWS = {
    "step": Row(("training step f16 batch 64", "training step f16 batch 32"), ("released",), 100),
    "encode": Row(("encode f16", "decode f16"), ("compiled", "shipped"), 150),
    "step-compiled": Row(("training step f16 batch 64",), ("compiled", "best"), 240),
    "modes-111M": Row(tuple(f"sampling 111M {batch}, 2, codes" for batch in (64, 256, 1)), MODES, 150),
    "modes-343M": Row(tuple(f"sampling 343M {batch}, 2, codes" for batch in (64, 256, 1)), MODES, 210),
    "generate": Row(("sampling 111M 64, 2, codes", "sampling 343M 64, 2, codes"), ("static", "compiled"), 240),
    "prior": Row(("prior training 111M", "prior training 343M"), ("compiled",), 210),
    "unguided": Row(tuple(f"sampling {b}, no guidance, codes" for b in (64, 256, 1)), MODES, 300),
    "step-compiled-32": Row(("training step f16 batch 32",), ("compiled", "best"), 240),
    "images": Row(("sampling 2, images",), ("compiled", "static"), 240),
    "attention": Row(("decode attention",), ("torch",), 60),
}


class Budget:
    """Seconds for everything, from now on."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """What is left of it."""
        return max(0.0, self.end - time.monotonic())


class Stage(NamedTuple):
    """What a part gets: the arguments of the command, the budget, and the log of all programs."""

    args: argparse.Namespace
    budget: Budget

    def path(self, name: str) -> Path:
        """A file of the results."""
        return Path(self.args.output) / name

    def run(self, name: str, limit: float, command: Sequence[str]) -> dict[str, Any]:
        """Runs a module of Python for at most `limit` seconds; returns how it ended. It does not start without them."""
        if limit > self.budget.left:
            said = f"not run: it may take {limit:.0f} s, and {self.budget.left:.0f} s are left"
            report(f"{name}: {said}")
            return {"ended": said}
        report(f"{name}: starts, for at most {limit:.0f} s")
        with self.path("log.txt").open("a") as log:
            log.write(f"\n==== {name}: python -m {' '.join(command)}\n")
            log.flush()
            ended = run_module(command, limit, log)
        report(f"{name}: {ended['ended']} after {ended['seconds']} s")
        return ended


def run_module(command: Sequence[str], limit: float, log: Any) -> dict[str, Any]:
    """Runs `python -m command` in a process group of its own, which is killed after `limit` seconds."""
    changes = {"HF_HUB_OFFLINE": "1", "TQDM_MININTERVAL": "30", "PYTHONUNBUFFERED": "1"}
    started = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, **changes},
        stdout=log,
        stderr=subprocess.STDOUT,
        process_group=0,
    )
    try:
        code = child.wait(limit)
        ended = "passed" if code == 0 else f"failed with exit code {code}"
    except BaseException as error:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        ended = "stopped"
    return {"ended": ended, "seconds": round(time.monotonic() - started, 1)}


def report(line: str) -> None:
    """Prints a line without buffering."""
    print(line, flush=True)


def check(stage: Stage) -> bool:
    """Prints and writes what the machine has; returns whether nothing is missing."""
    found, missing = inventory()
    for name, value in found.items():
        report(f"{name}: {value}")
    for one in missing:
        report(f"missing: {one}")
    write(stage.path("check.json"), found | {"missing": missing})
    return not missing


def tests(stage: Stage) -> bool:
    """Runs the groups of tests; returns whether all passed."""
    lines = stage.path("tests.jsonl")
    outcomes = []
    for name, group in asked(TESTS, stage.args.only).items():
        limits = ["--timeout", "100"] if importlib.util.find_spec("pytest_timeout") else []
        workers = min(6, (os.cpu_count() or 1) - 1)
        is_parallel = group.is_parallel and workers > 1 and importlib.util.find_spec("xdist")
        command = ["pytest", "-q", "-p", "benchmarks.test_log", "--log_to", str(lines.absolute()), *limits]
        command += ["-n", str(workers)] if is_parallel else []
        command += ["--device", "cpu" if stage.args.rehearse else "cuda", *group.arguments]
        outcomes.append(stage.run(f"tests {name}", group.limit, command)["ended"])
    ended = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    report(f"tests: {dict(Counter(line['outcome'] for line in ended))}")
    for reason, count in Counter(line["reason"] for line in ended if line["outcome"] == "skipped").items():
        report(f"skipped, {count}: {reason[-150:]}")
    for line in ended:
        if line["outcome"] == "failed":
            report(f"failed: {line['test']}: {line['reason'][-300:]}")
    return set(outcomes) == {"passed"}


def rows(stage: Stage) -> bool:
    """Measures the rows; returns whether all were measured without a failure."""
    results: dict[str, Any] = {}
    for name, row in asked(ROWS, stage.args.only).items():
        path = stage.path("row.json").absolute()
        path.unlink(missing_ok=True)
        command = ["benchmarks.run", "--suite", "tiny" if stage.args.rehearse else "gpu", "--output", str(path)]
        command += ["--rounds", "5", "--rows", *row.cases, "--lanes", *row.lanes]
        results[name] = stage.run(f"row {name}", row.limit, command)
        if path.exists():
            results[name] |= json.loads(path.read_text())
            report(figures(results[name]["cases"]))
        write(stage.path("rows.json"), results)
    stage.path("row.json").unlink(missing_ok=True)
    return {result["ended"] for result in results.values()} == {"passed"}


def figures(cases: Sequence[Mapping[str, Any]]) -> str:
    """A table of the measured lanes, and the errors."""
    errors = [f"{case['row']}, {case['setting']}: {case['error']}" for case in cases if "error" in case]
    errors += [f"{case['setting']}, {lane}: {why}" for case in cases for lane, why in case.get("failed", {}).items()]
    lanes = [
        {
            "case": f"{case['row']}, {case['setting']}",
            "lane": name,
            "per second": f"{lane['per_second']:,.4g} {case['unit']}",
            "time / tessella": lane["time_ratio"]["median"],
            "of floor": lane["of_floor"],
            "MFU": lane["mfu"],
        }
        for case in cases
        for name, lane in case.get("lanes", {}).items()
    ]
    return "\n".join(([table(lanes)] if lanes else []) + errors)


def recipe(stage: Stage) -> bool:
    """Runs a recipe; returns whether it ended well."""
    args = stage.args
    command = ["benchmarks.recipes", args.preset, "--data", args.data, "--minutes", str(args.minutes)]
    command += ["--output_dir", str(stage.path("recipes").absolute())]
    if args.rehearse:
        command += ["--probe_steps", "4", "--num_workers", "0"]
    # measuring the speeds, starting processes and drawing pictures take more than the minutes
    return bool(stage.run(f"recipe {args.preset}", 60 * args.minutes + 120, command)["ended"] == "passed")


def asked(known: Mapping[str, Any], only: Sequence[str]) -> dict[str, Any]:
    """The entries that `--only` names, in its order; all if it names none of them."""
    return {name: known[name] for name in only if name in known} or dict(known)


PARTS: dict[str, Callable[[Stage], bool]] = {"check": check, "tests": tests, "rows": rows, "recipe": recipe}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--budget", type=float, default=900.0, metavar="SECONDS", help="for all parts together")
    parser.add_argument("--output", default="runs/gpu", metavar="FOLDER", help="folder of the results")
    names = [*TESTS, *ROWS]
    parser.add_argument("--only", nargs="+", default=[], choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--preset", default="fashion_mnist", help="of the recipe")
    parser.add_argument("--data", help="of the recipe: a folder of parquet files")
    parser.add_argument("--minutes", type=float, default=6.0, help="of the recipe")
    parser.add_argument("--rehearse", action="store_true", help="tiny models, on any device")
    args = parser.parse_args(arguments)
    if "recipe" in args.parts and args.data is None:
        parser.error("--data: the recipe needs it; name a folder of parquet files")
    Path(args.output).mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running program is stopped too
    stage = Stage(args, Budget(args.budget))
    failed = [part for part in args.parts if not PARTS[part](stage)]
    report(f"not well: {', '.join(failed)}" if failed else "all is well")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
