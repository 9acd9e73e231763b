"""Runs of every stage that can be killed or interrupted at a chosen point, and comparisons of their results.

For tests/test_kills.py and tests/test_signals.py.
"""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from configs import Section, checkpoints, command_line, staging, states
from configs.checkpoints import complete_checkpoints
from pipelines import VQGANPipeline
from pipelines.build import BuildConfig, build
from stage1_vqgan import load_tokenizer
from stage1_vqgan.training import run as stage1
from stage1_vqgan.training.step import VQGANTrainer
from stage2_prior import code_store, load_prior, tokenization
from stage2_prior.training import run as stage2
from tests import forks, process_runs
from tests.tiny import tensors

COMMON = {"dataloader_num_workers": 2, "logging_steps": 7, "save_steps": 4, "save_total_limit": 2}
SHARD_ROWS = 400
REACHED = "\n<the point is reached>\n"


def run_stage1(folder: Path, max_steps: int = 18, **changes: Any) -> None:
    """18 steps over 14 batches an epoch, with augmentation, dropout, k-means, restarts and the adversarial loss."""
    config = process_runs.stage1_config(folder, max_steps=max_steps, global_batch_size=96, **COMMON, **changes)
    config.model |= {"dropout": 0.1, "image_size": 8}
    config.discriminator.num_layers = 1
    config.eval_steps = 12
    stage1.train(config)


def run_stage2(folder: Path, max_steps: int = 30, **others: Any) -> None:
    """30 steps over 22 batches an epoch, with dropout of conditions and of attention."""
    changes = {"max_steps": max_steps, "global_batch_size": 128, "eval_steps": 12, **COMMON, "save_steps": 6, **others}
    config = process_runs.stage2_config(folder, **changes)
    config.model["attention_dropout"] = 0.1
    stage2.train(config)


def run_stage1_longer(folder: Path) -> None:
    """Lengthens the run of `run_stage1`."""
    run_stage1(folder, max_steps=20, allow_config_changes=True)


def run_stage2_longer(folder: Path) -> None:
    """Lengthens the run of `run_stage2`."""
    run_stage2(folder, max_steps=32, allow_config_changes=True)


def run_tokenize(folder: Path) -> None:
    """Writes a code store of several shards."""
    tokenization.tokenize(process_runs.stage2_config(folder, **COMMON, tokenize_batch_size=64))


def run_build(folder: Path) -> None:
    """Joins tokenizer and prior."""
    parts = {"tokenizer": "vqgan", "prior": "prior", "output_dir": "pipeline"}
    build(BuildConfig(**{key: str(folder / name) for key, name in parts.items()}))


def run_build_other(folder: Path) -> None:
    """The same, with weights of the prior that stand for another training."""
    shutil.copytree(folder / "prior", folder / "other", dirs_exist_ok=True)
    weights = {name: -weight for name, weight in load_file(folder / "other" / "model.safetensors").items()}
    save_file(weights, folder / "other" / "model.safetensors", {"format": "pt"})
    (folder / "other" / "checksums.json").unlink(missing_ok=True)
    values = {"tokenizer": "vqgan", "prior": "other", "output_dir": "pipeline"}
    build(BuildConfig(**{key: str(folder / name) for key, name in values.items()}))


RUNS = {"stage1": run_stage1, "stage2": run_stage2, "tokenize": run_tokenize, "build": run_build}
CHANGED = {"stage1": run_stage1_longer, "stage2": run_stage2_longer, "build": run_build_other}
# the output folder of each run, and the results of earlier stages that it needs
FOLDERS = {"stage1": "vqgan", "stage2": "prior", "tokenize": "codes", "build": "pipeline"}
NEEDED = {"stage1": [], "tokenize": ["vqgan"], "stage2": ["vqgan", "codes"], "build": ["vqgan", "prior"]}

# Functions whose calls are counted for each point. The process kills itself when the count is reached.
POINTS = {
    "step": [(VQGANTrainer, "_update"), (stage2.PriorTrainer, "training_step")],  # before or after the optimizer step
    "write": [(os, "fsync"), (checkpoints.Path, "rename")],  # a checkpoint is partly on the disk
    "save": [(states, "save_file")],  # the files of a checkpoint are partly written
    "shard": [(tokenization, "write_shard"), (os, "replace")],
    # a model is partly written, or its files have partly replaced those of an older one
    "final": [
        *((staging, name) for name in ("write_checksums", "write_json", "new_file_mode", "sync_tree", "sync_folder")),
        *((staging, name) for name in ("finish_interrupted", "read_json", "rename", "replace")),
        (PreTrainedModel, "save_pretrained"),
    ],
}


@dataclass(kw_only=True)
class Nothing(Section):
    """An empty configuration, because the runs above build their own."""


def _child(name: str, folder: Path, point: str | None, count: float, pause: float, largest_file: int | None) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT
    multiprocessing.set_start_method("fork", force=True)  # start method of data loader workers
    for module in (code_store, tokenization):
        module.SHARD_ROWS = SHARD_ROWS  # type: ignore[attr-defined]
    if largest_file is not None:
        COMMON["dataloader_num_workers"] = 0  # their shared memory is a file too
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if point == "seconds":
        threading.Timer(count, os.kill, (os.getpid(), signal.SIGKILL)).start()
    elif point is not None:
        left = [count]
        for owner, function in POINTS[point]:
            setattr(owner, function, _counting(getattr(owner, function), left, pause))
    exit_code = 0
    try:
        main = CHANGED[name.removesuffix("/changed")] if name.endswith("/changed") else RUNS[name]
        command_line.run(Nothing, lambda _: main(folder), name, [])
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


def run(
    name: str,
    folder: Path,
    point: str | None = None,
    count: float = 0,
    largest_file: int | None = None,
    log: Path | None = None,
) -> int | None:
    """Runs until the end or until it is killed; returns the exit code (-9 if it was killed).

    Args:
        name: a name in RUNS, or one in CHANGED with "/changed" behind it.
        folder: where the results of all stages lie.
        point, count: where the run is killed.
        largest_file: bytes; writing more into one file fails.
        log: file of the output, by default log.txt in the folder.
    """
    log = log or folder / "log.txt"
    return forks.end(_start(name, folder, point, count, 0, log, largest_file), log)


def interrupt(
    name: str, folder: Path, signals: list[tuple[int, float]], point: str, count: float, pause: float
) -> int | None:
    """Sends signals to a run's process group, as a terminal does, and returns the exit code.

    The first signal follows when the run reaches a point and pauses there. Each further one follows after some seconds.
    """
    log = folder / "log.txt"
    process = _start(name, folder, point, count, pause, log)
    while REACHED not in log.read_text():
        assert process.is_alive(), log.read_text()
        time.sleep(0.01)
    for number, seconds in signals:
        time.sleep(seconds)
        os.killpg(process.pid, number)
    return forks.end(process, log)


def prepare(name: str, undisturbed: Path, folder: Path) -> None:
    """Copies the results of earlier stages that a run needs."""
    for needed in NEEDED[name]:
        shutil.copytree(undisturbed / needed, folder / needed)


def differences(name: str, undisturbed: Path, folder: Path) -> list[str]:
    """The results of a run that differ from those of the undisturbed run."""
    expected, found = contents(name, undisturbed), contents(name, folder)
    assert expected.keys() == found.keys() and len(expected) >= {"tokenize": 6, "build": 9}.get(name, 60)
    return [path for path in expected if expected[path] != found[path]]


def weights(name: str, folder: Path) -> bytes | None:
    """The weights of the model in a run's folder, as its loader reads them; None if there is no model yet."""
    made = folder / FOLDERS[name]
    if not any(
        (made / index).is_file() for index in ("config.json", "model_index.json", f"{staging.SAVED}/files.json")
    ):
        return None
    if name == "build":
        pipeline = VQGANPipeline.from_pretrained(made)
        models = [pipeline.vqgan, pipeline.prior]
    else:
        models = [load_tokenizer(str(made)) if name == "stage1" else load_prior(str(made))]
    return b"".join(tensor.numpy().tobytes() for model in models for tensor in model.state_dict().values())


def contents(name: str, folder: Path) -> dict[str, Any]:
    """The results of a run: models, moving average, codebook and optimizer states; or the files of the code store."""
    made = folder / FOLDERS[name]
    if name == "build":
        paths = [path for path in sorted(made.rglob("*")) if path.is_file() and not path.name.startswith(".")]
        return {str(path.relative_to(made)): path.read_bytes() for path in paths}
    if name == "tokenize":
        manifest = json.loads((made / "manifest.json").read_text())
        del manifest["seconds"], manifest["xxh3_128"]
        return {"manifest": str(manifest), **{path.name: path.read_bytes() for path in sorted(made.glob("*.arrow"))}}
    checkpoint = complete_checkpoints(made)[-1].path
    found: dict[str, Any] = {"model": load_file(made / "model.safetensors")}
    for path in sorted(checkpoint.iterdir()):
        if path.suffix == ".safetensors":
            found[path.name] = load_file(path)
        elif path.name.startswith("optimizer"):
            found[path.name] = json.loads(path.read_text())
    return {path: leaf.numpy().tobytes() for path, leaf in tensors(found).items()}


def _start(
    name: str, folder: Path, point: str | None, count: float, pause: float, log: Path, largest_file: int | None = None
) -> Any:
    return forks.start(_child, (name, folder, point, count, pause, largest_file), log)
