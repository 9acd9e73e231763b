"""Memory: what is free below all limits, what does not fit, and the message when it runs out."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configs import memory
from configs.memory import cgroup_free, is_out_of_memory, out_of_memory_advice, shortage

CPU = torch.device("cpu")


def group(folder: Path, names: tuple[str, str, str], limit: object, used: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    limit_name, used_name, cache_name = names
    (folder / limit_name).write_text(f"{limit}\n")
    (folder / used_name).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{cache_name} {cached}\n")


def test_the_smallest_control_group_of_version_2_counts(tmp_path):
    names = ("memory.max", "memory.current", "inactive_file")
    group(tmp_path / "pod" / "box", names, "max", 10, 0)
    group(tmp_path / "pod", names, 1000, 300, 50)
    assert list(cgroup_free("0::/pod/box\n", tmp_path)) == [750]


def test_the_control_groups_of_version_1_count(tmp_path):
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    group(tmp_path / "memory" / "job", names, 500, 100, 20)
    group(tmp_path / "memory", names, 2**63 - 4096, 100, 0)
    assert min(cgroup_free("4:cpu:/job\n3:memory:/job\n", tmp_path)) == 420


def test_a_limit_that_psutil_does_not_see_bounds_the_free_memory(monkeypatch):
    assert memory.free_memory(CPU) > 10**6
    monkeypatch.setattr(memory, "_limits", lambda: iter([10**6]))
    assert memory.free_memory(CPU) == 10**6


def test_what_does_not_fit_is_stated_in_numbers(monkeypatch):
    monkeypatch.setattr(memory, "_limits", lambda: iter([2 * 10**9]))
    monkeypatch.setattr(memory.psutil, "swap_memory", lambda: type("Swap", (), {"free": 10**9}))
    assert shortage(3 * 10**9, CPU) is None
    assert shortage(4 * 10**9, CPU) == "needs at least 4.0 GB of memory, but 3.0 GB are free on cpu"


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), True),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError(28, "No space left on device"), False),
        (ValueError("out of memory"), False),
    ],
    ids=str,
)
def test_which_errors_mean_that_memory_ran_out(error, is_one):
    assert is_out_of_memory(error) is is_one
    wrapped = KeyError("outer")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped) is is_one


def test_the_advice_names_the_keys_to_lower():
    values = {"per_device_train_batch_size": 64, "dataloader_num_workers": 0, "model": {"hidden_size": 9}, "seed": 1}
    text = out_of_memory_advice(MemoryError("Unable to allocate 9 GiB"), values)
    assert text.splitlines() == [
        "out of memory: Unable to allocate 9 GiB",
        "Lower per_device_train_batch_size (64), model, or free memory. What was saved before is intact; the same "
        "command continues from it.",
    ]
    text = out_of_memory_advice(MemoryError("x"), {"global_batch_size": 64})
    assert "Double gradient_accumulation_steps, which keeps the batch, or lower global_batch_size (64)" in text
    text = out_of_memory_advice(MemoryError("x"), {"model": "a/folder", "image_size": [4096, 8192]})
    assert "Lower image_size ([4096, 8192]), or free memory" in text


COMMAND = """
import resource
from dataclasses import dataclass
from configs import Section
from configs.command_line import run

@dataclass(kw_only=True)
class Config(Section):
    '''A command.

    per_device_eval_batch_size: images
    '''
    per_device_eval_batch_size: int = 7

def main(config):
    {body}

run(Config, main, "command", [])
"""
BODIES = {
    "torch": "import torch; resource.setrlimit(resource.RLIMIT_AS, (2**35, 2**35)); torch.ones(2**34)",
    "numpy": "import numpy; resource.setrlimit(resource.RLIMIT_AS, (2**35, 2**35)); numpy.ones(2**34)",
    "python": "resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31)); bytearray(2**33)",
}


@pytest.mark.parametrize("library", ["python", pytest.param("torch", marks=pytest.mark.slow), "numpy"])
def test_a_command_that_runs_out_of_memory_ends_with_one_message(library):
    """The limit makes the allocation fail for real, whatever the machine has."""
    done = subprocess.run(
        [sys.executable, "-c", COMMAND.format(body=BODIES[library])], capture_output=True, text=True, check=False
    )
    assert done.returncode == memory.OUT_OF_MEMORY == 5, done.stderr[-2000:]
    assert "Traceback" not in done.stderr and "out of memory: " in done.stderr
    assert "Lower per_device_eval_batch_size (7)" in done.stderr
