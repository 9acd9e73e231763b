"""Calls of non-public functions of accelerate; tests/configs/test_compat.py fails when they change."""

from accelerate.state import AcceleratorState, GradientState


def reset_accelerate_state() -> None:
    """Lets the next `Accelerator` of this process have another precision, or other gradient accumulation steps.

    accelerate keeps the settings of the first `Accelerator` in the process, and refuses others.
    """
    AcceleratorState._reset_state()
    GradientState._reset_state()
