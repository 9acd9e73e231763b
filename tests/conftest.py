"""The device that tests compute on, settled before anything imports torch; the fixtures are in tests/fixtures.py."""

import os

import pytest

# tests need no network, and tiny tensors no second thread
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="what tests compute on: cpu (default), cuda, …")


def pytest_configure(config: pytest.Config) -> None:
    os.environ["TEST_DEVICE"] = device = config.getoption("device")
    if device == "cpu":  # nor do trainers and other processes, which look for themselves, find a GPU
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # products of matrices in the same order
    import torch

    try:
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError) as error:
        raise pytest.UsageError(f"--device: received {device!r}; {str(error).splitlines()[0]}") from error
    for name in ("tests.devices", "tests.fixtures"):
        config.pluginmanager.import_plugin(name)
