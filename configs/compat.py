"""Calls of non-public functions of torch and accelerate; tests/configs/test_compat.py fails when they change."""

from typing import Any

from accelerate.state import AcceleratorState, GradientState


def reset_accelerate_state() -> None:
    """Allows the next `Accelerator` of this process to have other settings.

    accelerate stores precision and gradient accumulation steps of the first `Accelerator` in the process, and refuses
    other values.
    """
    AcceleratorState._reset_state()
    GradientState._reset_state()


def connect_to_store() -> Any:
    """A new connection to the store of torch's default group. It stays free while another connection waits."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store().clone()


def operations_begun() -> int:
    """Number of collective operations that this process has begun, over all groups."""
    from torch.distributed import distributed_c10d

    groups: list[Any] = list(distributed_c10d._world.pg_map)
    return sum(group._get_sequence_number_for_group() for group in groups)
