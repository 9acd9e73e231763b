"""The second start of a group of processes: `torchrun --max_restarts N` starts all of them again after one has died."""

import os
import socket
from datetime import timedelta

from configs.problems import ConfigError, Problem

LONGEST = timedelta(minutes=5)  # for the slowest process to start


def use_new_store() -> None:
    """Gives a restarted group a store of its own, under a new MASTER_PORT. Call it before the group connects.

    The processes of a group find each other through a store, which the launcher keeps over its restarts. There they
    would find the addresses of the dead processes and wait for them (torch 2.14). So rank 0 opens a new store, and
    the others learn its port from the old one.

    Raises:
        ConfigError: the group has several machines, whose launchers do not count their restarts together.
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if not attempt or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    if os.environ["GROUP_WORLD_SIZE"] != "1":
        allowed = "a launcher starts processes again on one machine only; set it to 0, and start all launchers again"
        raise ConfigError([Problem("max_restarts", allowed)], "launch")
    from torch.distributed import TCPStore

    old = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=LONGEST)
    key = f"port of attempt {attempt}"
    if os.environ["RANK"] == "0":
        with socket.socket() as free:
            free.bind(("", 0))
            old.set(key, str(free.getsockname()[1]))
    os.environ["MASTER_PORT"] = old.get(key).decode()
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
