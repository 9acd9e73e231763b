"""Copies of tensors from the CPU to a device."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copies a CPU tensor to a device asynchronously.

    A copy to a GPU is asynchronous only from pinned memory.
    """
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
