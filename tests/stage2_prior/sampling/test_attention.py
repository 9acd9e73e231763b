"""The Triton kernel, compared with torch's attention in float64, and sampling with it.

The tests run on a GPU, or without one in a new process with Triton's interpreter.
"""

import os
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from stage2_prior import SamplingOptions, sample
from stage2_prior.sampling.attention import UnknownAttentionError, decode_attention, use_decode_attention
from stage2_prior.sampling.decoder import EagerDecoder
from stage2_prior.sampling.graphs import GraphDecoder
from tests.devices import DEVICE

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON = tuple(map(int, metadata.version("triton").split(".")[:2])) if find_spec("triton") else (0, 0)
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
runs_kernel = pytest.mark.skipif(
    DEVICE.type != "cuda" and not INTERPRETED, reason="there is no GPU: test_the_kernel_under_the_interpreter runs it"
)

# heads, key-value heads, width, last place, dtype
SHAPES = [
    (2, 2, 64, 0, torch.float32),
    (1, 1, 64, 1, torch.float32),
    (2, 1, 64, 63, torch.float32),
    (1, 1, 80, 64, torch.float32),
    (3, 1, 128, 65, torch.float32),
    (1, 1, 64, 255, torch.bfloat16),
    pytest.param(8, 2, 80, 255, torch.bfloat16, marks=pytest.mark.slow),
    pytest.param(4, 4, 128, 1023, torch.float32, marks=pytest.mark.slow),
    pytest.param(12, 4, 64, 1023, torch.bfloat16, marks=pytest.mark.slow),
]


@pytest.mark.skipif(DEVICE.type == "cuda" or INTERPRETED, reason="the other tests run the kernel")
@pytest.mark.skipif(TRITON < (3, 9), reason="the interpreter of older Tritons fails with recent numpy")
@pytest.mark.parametrize(
    "which",
    [
        ["-m", "not slow", "-k", "of_torch", "--noconftest"],
        pytest.param(["-m", "slow", "-k", "of_torch or kernel_chooses"], marks=pytest.mark.slow),
    ],
    ids=["fast", "slow"],
)
def test_the_kernel_under_the_interpreter(which):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *which, __file__]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]


@runs_kernel
@pytest.mark.parametrize(("heads", "key_value_heads", "width", "last", "dtype"), SHAPES, ids=str)
def test_attention_is_that_of_torch(heads, key_value_heads, width, last, dtype):
    """The memory also holds other rows, and places that attention must ignore."""
    from stage2_prior.sampling.attention_kernel import attend

    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    query = random(1, 1, heads, width).transpose(1, 2)
    key, value = (random(2, key_value_heads, last + 8, width)[1:] for _ in range(2))
    attended = attend(query, key, value, torch.tensor(last, device=DEVICE), 0.3)
    seen = (states[:, :, : last + 1].double() for states in (key, value))
    expected = scaled_dot_product_attention(query.double(), *seen, scale=0.3, enable_gqa=True).transpose(1, 2)
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 5e-6}
    torch.testing.assert_close(attended.double(), expected, **tolerance)


@runs_kernel
@pytest.mark.parametrize(
    "model_type",
    [pytest.param(name, marks=[pytest.mark.slow] if INTERPRETED else []) for name in ("llama", "gpt2", "qwen3")],
)
def test_the_kernel_chooses_the_same_codes(random_prior, layout, model_type):
    layout = replace(layout, grid=(2, 3))
    prior = random_prior(model_type, layout).to(DEVICE)
    options = SamplingOptions(guidance_scale=2.0, guidance_interval=(0.5, 0.9))
    prompts = layout.class_tokens(torch.arange(2))[:, None].to(DEVICE)
    nulls, seeds = torch.full_like(prompts, layout.null_token), torch.arange(2, device=DEVICE)
    decoder = GraphDecoder(prior, 4, layout.length)
    decoder.reads_exactly = decoder.reads_exactly or use_decode_attention(decoder.model)
    assert decoder.reads_exactly
    eager = EagerDecoder(prior, 4, layout.length)
    codes, expected = (
        sample(each, prompts, nulls, seeds, layout.length, layout.num_codes, options) for each in (decoder, eager)
    )
    assert torch.equal(codes, expected)


@pytest.mark.parametrize("setting", ["softcap", "s_aux", "sliding_window"])
def test_attention_of_another_kind_is_refused(setting):
    states = torch.zeros(1, 2, 1, 8)
    with pytest.raises(UnknownAttentionError, match=setting):
        decode_attention(torch.nn.Module(), states, states, states, torch.zeros(1, 1, 1, 1), **{setting: 1.0})


@pytest.mark.parametrize(
    "shapes", [((1, 2, 1, 8), (1, 2, 1, 8), (1, 2, 1, 4)), ((1, 9, 1, 128), *[(1, 1, 1, 128)] * 2)]
)
def test_heads_that_do_not_fit_are_refused(shapes):
    with pytest.raises(UnknownAttentionError, match="do not fit"):
        decode_attention(torch.nn.Module(), *map(torch.zeros, shapes), torch.zeros(1, 1, 1, 1))


def test_a_model_whose_attention_is_another_keeps_it(random_prior, layout, caplog):
    prior = random_prior("qwen3", layout, use_sliding_window=True, sliding_window=4, max_window_layers=0)
    before = prior.config._attn_implementation
    assert not use_decode_attention(prior)
    assert "sliding_window" in caplog.text
    assert prior.config._attn_implementation == before


def test_a_graph_decoder_leaves_the_prior_its_attention(random_prior, layout):
    prior = random_prior("llama", layout)
    before = prior.config._attn_implementation
    decoder = GraphDecoder(prior, 1, layout.length)
    decoder.model.set_attn_implementation("eager")
    assert prior.config._attn_implementation == before != decoder.model.config._attn_implementation
    shared = zip(prior.parameters(), decoder.model.parameters(), strict=True)
    assert all(mine.data_ptr() == theirs.data_ptr() for mine, theirs in shared)
