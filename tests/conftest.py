"""Sets the device of the tests, before anything imports torch, and distributes the tests over two workers.

The fixtures are in tests/fixtures.py.
"""

import gc
import os
from pathlib import Path
from typing import Any

import pytest

# Tests need no network, and tiny tensors need no second thread.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# The disk's cache need not be emptied each time. tests/test_power_cuts.py shows which calls of fsync are needed.
os.fsync = lambda descriptor: None

# Files that start processes. One worker of pytest-xdist runs all of them, so their shared runs are set up once. It runs
# them first, because they take longest.
STARTING_PROCESSES = (
    "test_processes.py",
    "test_sharded.py",
    "test_kills.py",
    "test_signals.py",
    "test_full_disks.py",
    "test_runs.py",
    "test_elastic.py",
    "test_shared_sampling.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device of the tests: cpu (default), cuda, …")


def pytest_configure(config: pytest.Config) -> None:
    os.environ["TEST_DEVICE"] = device = config.getoption("device")
    if device == "cpu":  # hide the GPU, because trainers and other processes would use it
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput"):
            return  # this process only distributes the tests; its workers import torch
    else:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # matrix products then sum in a fixed order
    import torch

    try:
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError) as error:
        raise pytest.UsageError(f"--device: received {device!r}; {str(error).splitlines()[0]}") from error
    for name in ("tests.devices", "tests.fixtures"):
        config.pluginmanager.import_plugin(name)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # in a worker of pytest-xdist
        here = Path(__file__).parent  # its own files test whole commands and take long, so they come early
        items.sort(key=lambda item: (item.path.name not in STARTING_PROCESSES, item.path.parent != here))


def pytest_collection_finish() -> None:
    """Every training collects garbage. It then need not look at all modules and tests each time."""
    gc.collect()
    gc.freeze()


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """The same for what a file leaves, such as imported modules."""
    if nextitem is not None and nextitem.path != item.path:
        pytest_collection_finish()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile`, a worker gets whole files, and the files of STARTING_PROCESSES together."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "processes" if file.endswith(STARTING_PROCESSES) else file

    config.option.loadscopereorder = False  # otherwise the files with most tests run first
    return Scheduling(config, log)
