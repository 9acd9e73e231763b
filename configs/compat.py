"""Calls of non-public functions of accelerate; tests/configs/test_compat.py fails when they change."""

from accelerate.state import AcceleratorState, GradientState


def reset_accelerate_state() -> None:
    """Allows the next `Accelerator` of this process to have other settings.

    accelerate stores precision and gradient accumulation steps of the first `Accelerator` in the process, and refuses
    other values.
    """
    AcceleratorState._reset_state()
    GradientState._reset_state()
