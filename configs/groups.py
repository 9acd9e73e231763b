"""The group of processes that a launcher started: its size, and where its workers come from."""

import multiprocessing
import os
import sys

from configs.problems import ConfigError, Problem

FORKS_SAFELY = (3, 11, 10)


def joined_group() -> int:
    """Number of processes in the group that this process has joined; 1 without a launcher.

    Raises:
        ConfigError: the launcher's processes have not connected, because accelerate found no GPU and was not told to
            use CPUs. Each would train alone.
    """
    from torch import distributed

    size = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    started = os.environ.get("WORLD_SIZE", "1")
    if started != str(size):
        reason = f"the launcher started {started} processes, but they form groups of {size} (no GPU was found)"
        raise ConfigError([Problem("ACCELERATE_USE_CPU", f"{reason}; set this variable to true to train on CPUs")])
    if size > 1:
        fork_workers_elsewhere()
    return size


def fork_workers_elsewhere() -> None:
    """Before Python 3.11.10, lets a server process fork the workers of data loaders: a fork of this one may hang.

    The threads of a group's backend enter Python and leave it. Meanwhile they hold a lock, which a process forked at
    that moment waits for forever (python/cpython issue 112275). The server process has no such threads.
    """
    if sys.version_info < FORKS_SAFELY and multiprocessing.get_start_method() == "fork":
        multiprocessing.set_start_method("forkserver", force=True)
        multiprocessing.set_forkserver_preload(["datasets", "torch.utils.data"])
