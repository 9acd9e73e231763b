"""The non-public functions of accelerate still have the behaviour that this project needs."""

import pytest
from accelerate import Accelerator

from configs.compat import reset_accelerate_state


def test_a_process_can_change_precision_and_accumulation():
    reset_accelerate_state()
    Accelerator(cpu=True, mixed_precision="no", gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="already been initialized"):  # the reason for the reset
        Accelerator(cpu=True, mixed_precision="bf16")
    reset_accelerate_state()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=3)
    assert accelerator.mixed_precision == "bf16" and accelerator.gradient_accumulation_steps == 3
    reset_accelerate_state()
