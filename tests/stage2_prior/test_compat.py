"""Non-public functions of torch and transformers that the package calls: each still exists and does what is needed."""

import gc
import inspect
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from stage2_prior import compat

CONFIG = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)


def test_the_cache_argument_is_one_that_forward_takes():
    prior = AutoModelForCausalLM.from_config(CONFIG)
    assert compat.cache_argument(prior) in inspect.signature(type(prior).forward).parameters


def test_the_attention_interface_is_known():
    assert compat.uses_attention_interface(AutoModelForCausalLM.from_config(CONFIG)) is True


def test_a_trace_repeats_operations_on_other_inputs_and_shapes():
    def scale(x, offset):
        return x * x.shape[0] + x[:, : offset + 1].sum()  # numbers of shapes and of tensors are not frozen

    traced = compat.trace(scale, (torch.ones(2, 3), torch.tensor(1)))
    x, offset = torch.randn(5, 3), torch.tensor(2)
    torch.testing.assert_close(traced(x, offset), scale(x, offset))


def test_a_trace_keeps_nothing_alive():
    model = torch.nn.Linear(4, 4).requires_grad_(False)
    traced = compat.trace(model.forward, (torch.ones(4),))
    torch.testing.assert_close(traced(torch.ones(4)), model(torch.ones(4)))
    kept = weakref.ref(model.weight)
    del model, traced
    gc.collect()
    assert kept() is None


def test_more_recompiles_are_allowed_inside():
    before = torch._dynamo.config.recompile_limit
    with compat.allow_recompiles(before + 5):
        assert torch._dynamo.config.recompile_limit == before + 5
    assert torch._dynamo.config.recompile_limit == before


@pytest.mark.filterwarnings("error::FutureWarning")
def test_the_cache_argument_warns_of_nothing():
    from stage2_prior.sampling.decoder import EagerDecoder

    decoder = EagerDecoder(AutoModelForCausalLM.from_config(CONFIG).eval(), 1, 2)
    with torch.inference_mode():
        decoder.read(slice(0, 1), torch.zeros(1, 1, dtype=torch.int64), 0)
