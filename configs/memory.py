"""How much memory a device has left."""

import psutil
import torch

# Fraction of the free memory that one batch may fill. The rest is a reserve, because the estimates are not exact.
USABLE = 0.6


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated: on a CPU by any process, on a GPU by this one."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + cached
