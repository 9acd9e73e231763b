"""The non-public functions of torch and accelerate still have the behaviour that this project needs."""

import pytest
import torch
from accelerate import Accelerator
from torch import distributed

from configs.compat import connect_to_store, operations_begun, reset_accelerate_state


def test_a_process_can_change_precision_and_accumulation():
    reset_accelerate_state()
    Accelerator(cpu=True, mixed_precision="no", gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="already been initialized"):  # the reason for the reset
        Accelerator(cpu=True, mixed_precision="bf16")
    reset_accelerate_state()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=3)
    assert accelerator.mixed_precision == "bf16" and accelerator.gradient_accumulation_steps == 3
    reset_accelerate_state()


@pytest.fixture
def group():
    """The default group of this process alone."""
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_another_connection_reads_the_store_of_the_group(group):
    first, second = connect_to_store(), connect_to_store()
    first.set("key", "value")
    assert first is not second and second.get("key") == b"value"


def test_operations_are_counted_over_all_groups(group):
    another = distributed.new_group([0])
    begun = operations_begun()
    for number, each in enumerate((None, another, another), 1):
        distributed.all_reduce(torch.ones(1), group=each)
        assert operations_begun() == begun + number
