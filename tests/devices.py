"""The device of the tests, which `pytest --device cuda` sets, see tests/conftest.py.

Trainers, tokenize and evaluate find the GPU themselves. Tests move their tensors to it by `.to(DEVICE)`, or all of them
by `everything_on_device`. Runs of several processes and killed runs stay on the CPU, because two ranks of NCCL cannot
share a GPU.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cpu"))

# Environment of other processes that must compute on the CPU; and a mark for tests that only concern the CPU.
ON_CPU = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
cpu_only = pytest.mark.skipif(DEVICE.type != "cpu", reason="only concerns the CPU; see tests/devices.py")

if DEVICE.type == "cuda":
    # Tests compare float32, so TF32 is off. Resumed runs are compared bit for bit, so sums must have a fixed order.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)

# Tolerance of `torch.testing.assert_close` where results are equal only on a CPU.
EXACT_ON_CPU: dict[str, float] = {"rtol": 0.0, "atol": 0.0} if DEVICE.type == "cpu" else {"rtol": 1e-5, "atol": 1e-6}

on_device = pytest.mark.usefixtures("everything_on_device")

FACTORIES: set[Callable] = {torch.rand, torch.randn, torch.randint, torch.randperm}
FACTORIES_LIKE: set[Callable] = {torch.rand_like, torch.randn_like, torch.randint_like}
FILLED: set[Callable] = {Tensor.normal_, Tensor.uniform_, Tensor.exponential_, Tensor.bernoulli_, Tensor.random_}


class DrawnOnCPU(TorchFunctionMode):
    """Draws random numbers on the CPU and moves them, so that they are the same on every device."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in FACTORIES and "device" not in kwargs:
            requires_grad = kwargs.pop("requires_grad", False)
            return function(*args, **kwargs, device="cpu").to(DEVICE).requires_grad_(requires_grad)
        if function in FACTORIES_LIKE:
            return function(*args, **kwargs, device="cpu").to(args[0].device)
        generator = kwargs.get("generator")
        if function in FILLED and (generator is None or generator.device.type == "cpu"):
            drawn = function(torch.empty_like(args[0], device="cpu"), *args[1:], **kwargs)
            return args[0].copy_(drawn)
        return function(*args, **kwargs)


@pytest.fixture
def everything_on_device() -> Iterator[None]:
    """Creates all tensors of a test on the device."""
    if DEVICE.type == "cpu":
        yield
        return
    with DEVICE, DrawnOnCPU():
        yield


def assert_same_codes(found: np.ndarray, expected: np.ndarray, resized: bool = False) -> None:
    """Asserts that codes are equal. On a GPU, one code in a thousand may differ, because two entries can be equally
    near up to rounding. More codes may differ if the images were resized, because a GPU resizes in floats.
    """
    assert found.shape == expected.shape
    allowed = 0 if DEVICE.type == "cpu" else 0.05 if resized else 1e-3
    assert (found != expected).mean() <= allowed
