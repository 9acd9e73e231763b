"""Runs of every stage that can be killed or interrupted at a chosen point, and comparisons of their results.

For tests/test_kills.py and tests/test_signals.py.
"""

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from configs import Section, checkpoints, command_line, states
from configs.checkpoints import complete_checkpoints
from stage1_vqgan.training import run as stage1
from stage1_vqgan.training.step import VQGANTrainer
from stage2_prior import code_store, tokenization
from stage2_prior.training import run as stage2
from tests import forks, process_runs
from tests.tiny import tensors

COMMON = {"dataloader_num_workers": 2, "logging_steps": 7, "save_steps": 4, "save_total_limit": 2}
SHARD_ROWS = 400
REACHED = "\n<the point is reached>\n"


def run_stage1(folder: Path) -> None:
    """18 steps over 14 batches an epoch, with augmentation, dropout, k-means, restarts and the adversarial loss."""
    config = process_runs.stage1_config(folder, max_steps=18, global_batch_size=96, **COMMON)
    config.model |= {"dropout": 0.1, "image_size": 8}
    config.discriminator.num_layers = 1
    config.eval_steps = 12
    stage1.train(config)


def run_stage2(folder: Path) -> None:
    """30 steps over 22 batches an epoch, with dropout of conditions and of attention."""
    changes = {"max_steps": 30, "global_batch_size": 128, "eval_steps": 12, **COMMON, "save_steps": 6}
    config = process_runs.stage2_config(folder, **changes)
    config.model["attention_dropout"] = 0.1
    stage2.train(config)


def run_tokenize(folder: Path) -> None:
    """Writes a code store of several shards."""
    tokenization.tokenize(process_runs.stage2_config(folder, **COMMON, tokenize_batch_size=64))


RUNS = {"stage1": run_stage1, "stage2": run_stage2, "tokenize": run_tokenize}
FOLDERS = {"stage1": "vqgan", "stage2": "prior", "tokenize": "codes"}  # the output folder of each run

# Functions whose calls are counted for each point. The process kills itself when the count is reached.
POINTS = {
    "step": [(VQGANTrainer, "_update"), (stage2.PriorTrainer, "training_step")],  # before or after the optimizer step
    "write": [(os, "fsync"), (checkpoints.Path, "rename")],  # a checkpoint is partly on the disk
    "save": [(states, "save_file")],  # the files of a checkpoint are partly written
    "shard": [(tokenization, "write_shard"), (os, "replace")],
}


@dataclass(kw_only=True)
class Nothing(Section):
    """An empty configuration, because the runs above build their own."""


def _child(name: str, folder: Path, point: str | None, count: float, pause: float) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT
    multiprocessing.set_start_method("fork", force=True)  # start method of data loader workers
    for module in (code_store, tokenization):
        module.SHARD_ROWS = SHARD_ROWS  # type: ignore[attr-defined]
    if point == "seconds":
        threading.Timer(count, os.kill, (os.getpid(), signal.SIGKILL)).start()
    elif point is not None:
        left = [count]
        for owner, function in POINTS[point]:
            setattr(owner, function, _counting(getattr(owner, function), left, pause))
    exit_code = 0
    try:
        command_line.run(Nothing, lambda _: RUNS[name](folder), name, [])
    except SystemExit as error:
        exit_code = int(error.code or 0)
    os._exit(exit_code)


def _counting(function: Callable, left: list[float], pause: float) -> Callable:
    """Counts the calls of a function. The last call kills the process, or reports that it is reached and pauses."""

    def call(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0 and not pause:
            os.kill(os.getpid(), signal.SIGKILL)
        elif left[0] == 0:
            os.write(forks.STDERR, REACHED.encode())
            time.sleep(pause)
        return function(*args, **kwargs)

    return call


def run(name: str, folder: Path, point: str | None = None, count: float = 0) -> int | None:
    """Runs until the end or until it is killed; returns the exit code (-9 if it was killed)."""
    return _end(_start(name, folder, point, count, pause=0), folder)


def interrupt(
    name: str, folder: Path, signals: list[tuple[int, float]], point: str, count: float, pause: float
) -> int | None:
    """Sends signals to a run's process group, as a terminal does, and returns the exit code.

    The first signal follows when the run reaches a point and pauses there. Each further one follows after some seconds.
    """
    process = _start(name, folder, point, count, pause)
    while REACHED not in (folder / "log.txt").read_text():
        assert process.is_alive(), (folder / "log.txt").read_text()
        time.sleep(0.01)
    for number, seconds in signals:
        time.sleep(seconds)
        os.killpg(process.pid, number)
    return _end(process, folder)


def prepare(name: str, undisturbed: Path, folder: Path) -> None:
    """Copies the results of earlier stages that a run needs."""
    for needed in {"stage1": [], "tokenize": ["vqgan"], "stage2": ["vqgan", "codes"]}[name]:
        shutil.copytree(undisturbed / needed, folder / needed)


def differences(name: str, undisturbed: Path, folder: Path) -> list[str]:
    """The results of a run that differ from those of the undisturbed run."""
    expected, found = contents(name, undisturbed), contents(name, folder)
    assert expected.keys() == found.keys() and len(expected) >= (6 if name == "tokenize" else 60)
    return [path for path in expected if expected[path] != found[path]]


def contents(name: str, folder: Path) -> dict[str, Any]:
    """The results of a run: models, moving average, codebook and optimizer states; or the files of the code store."""
    made = folder / FOLDERS[name]
    if name == "tokenize":
        manifest = json.loads((made / "manifest.json").read_text())
        del manifest["seconds"]
        return {"manifest": str(manifest), **{path.name: path.read_bytes() for path in sorted(made.glob("*.arrow"))}}
    checkpoint = complete_checkpoints(made)[-1].path
    found: dict[str, Any] = {"model": load_file(made / "model.safetensors")}
    for path in sorted(checkpoint.iterdir()):
        if path.suffix == ".safetensors":
            found[path.name] = load_file(path)
        elif path.name.startswith("optimizer"):
            found[path.name] = json.loads(path.read_text())
    return {path: leaf.numpy().tobytes() for path, leaf in tensors(found).items()}


def _start(name: str, folder: Path, point: str | None, count: float, pause: float) -> Any:
    return forks.start(_child, (name, folder, point, count, pause), folder / "log.txt")


def _end(process: Any, folder: Path) -> int | None:
    return forks.end(process, folder / "log.txt")
