"""This machine: how many worker processes it can run (more are refused before the work begins), and its processors."""

import os
import resource

from configs.memory import total_memory

# Each worker process has this much memory of its own, and its parent opens this many files for it: measured 10 MiB, and
# 4.4 files for each of the two loaders of a run.
WORKER_MEMORY = 10 * 2**20
WORKER_FILES = 10
WORKERS_PER_CORE = 64  # no loader is faster with more, not even one that waits for a network
MOST_USUAL_WORKERS = 8


def usual_workers() -> int:
    """The worker processes of one loader for `auto`: half of the cores, shared by the processes of this machine."""
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    shared = num_cores() // (int(processes) if processes.isdecimal() and int(processes) else 1)
    return min(max(1, shared // 2), MOST_USUAL_WORKERS, most_workers())


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def most_workers() -> int:
    """The largest number of worker processes that one loader can have."""
    limits = [WORKERS_PER_CORE * (os.cpu_count() or 1), total_memory() // WORKER_MEMORY]
    for kind, each in ((resource.RLIMIT_NOFILE, WORKER_FILES), (resource.RLIMIT_NPROC, 1)):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            limits.append(limit // each)
    return min(limits)


def hardware(processes: int) -> str:
    """The processors of a run of so many processes, in words: "8 × NVIDIA H200", or "2 CPU cores"."""
    import torch
    from accelerate.utils import parse_flag_from_env

    if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        return f"{processes} × {torch.cuda.get_device_name()}"
    return f"{num_cores()} CPU cores" + (f", {processes} processes" if processes > 1 else "")
