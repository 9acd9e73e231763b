"""How much memory a device has left, what does not fit, and advice when memory runs out."""

import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from configs.problems import in_bytes

if TYPE_CHECKING:
    import torch

# Fraction of the free memory that one batch may fill. The rest is a reserve, because the estimates are not exact.
USABLE = 0.6

SMALLER_BATCH = "choose a smaller batch, or raise gradient_accumulation_steps to split the global_batch_size"

OUT_OF_MEMORY = 5  # exit code of a command that ran out of memory

# Keys that determine how much memory a command needs, the most effective first.
LOWER = (
    "per_device_train_batch_size",
    "global_batch_size",
    "per_device_eval_batch_size",
    "tokenize_batch_size",
    "samples_per_class",
    "max_real_images",
    "num_sample_images",
    "image_size",
    "dataloader_num_workers",
    "model",
)

# Words of the errors that torch, CUDA and the system raise when an allocation fails.
WORDS = ("out of memory", "not enough memory", "defaultcpuallocator", "alloc_failed", "cannot allocate memory")


def free_memory(device: "torch.device") -> int:
    """Bytes that this process can still allocate on a device."""
    if device.type != "cuda":
        return max(0, min(psutil.virtual_memory().available, *_limits()))
    import torch

    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + cached


def shortage(needed: int, device: "torch.device") -> str | None:
    """Why `needed` bytes cannot be allocated on a device, in words; None if they can.

    Swap space counts as free, so nothing is refused that would run slowly.
    """
    free = free_memory(device) + (0 if device.type == "cuda" else psutil.swap_memory().free)
    if needed <= free:
        return None
    return f"needs at least {in_bytes(needed)} of memory, but {in_bytes(free)} are free on {device.type}"


def total_memory() -> int:
    """Bytes of memory and swap."""
    return int(psutil.virtual_memory().total + psutil.swap_memory().total)


def _limits() -> Iterator[int]:
    """Bytes that this process may still allocate below the limits that psutil does not see."""
    try:
        yield from cgroup_free(Path("/proc/self/cgroup").read_text())
    except OSError:  # not Linux
        return
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        yield limit - psutil.Process().memory_info().vms


def cgroup_free(membership: str, root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Bytes left below the memory limit of each control group of a process, such as that of its container.

    Args:
        membership: text of /proc/self/cgroup.
        root: where the control groups are mounted.
    """
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            top, limit, used, cache = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                yield from _free_below(folder, limit, used, cache)


def _free_below(folder: Path, limit: str, used: str, cache: str) -> Iterator[int]:
    try:
        most, current = (int((folder / name).read_text()) for name in (limit, used))
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no limit: "max", or no such file
        return
    yield most - current + int(statistics.get(cache, 0))  # cached files make room


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, says that memory ran out."""
    while error is not None:
        text = str(error).lower()
        if (
            isinstance(error, MemoryError)
            or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
            or (isinstance(error, RuntimeError) and any(word in text for word in WORDS))
            or _killed_worker(error)
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def _killed_worker(error: BaseException) -> bool:
    """Whether the system killed a data loader's worker, as it does when memory runs out."""
    return isinstance(error, RuntimeError) and "dataloader worker" in str(error).lower() and "killed" in str(error)


def out_of_memory_advice(error: BaseException, values: dict[str, Any]) -> str:
    """What ran out, which keys to lower, and what is intact, in words.

    Args:
        error: the error, for which `is_out_of_memory` is true.
        values: the configuration, `{key: value}`.
    """
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    keys = ", ".join(_settings(values)) or "the size of the request"
    split = "double gradient_accumulation_steps, which keeps the batch, or " if values.get("global_batch_size") else ""
    rank = f" in process {os.environ['RANK']}" if "RANK" in os.environ else ""
    advice = f"{split}lower {keys}, or free memory"
    kept = "What was saved before is intact; the same command continues from it."
    return f"out of memory{rank}: {reason[:300]}\n{advice[0].upper()}{advice[1:]}. {kept}"


def _settings(values: dict[str, Any]) -> Iterable[str]:
    for key in LOWER:
        value = values.get(key)
        if value not in (None, 0, {}) and not isinstance(value, str):  # `model` is also the name of a folder
            yield key if isinstance(value, dict) else f"{key} ({value})"
