"""The attention of a training: in float32 for narrow heads in bfloat16 on a CPU, else that of transformers."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from configs import load_config
from stage2_prior import Stage2Config
from stage2_prior.prior import build_prior
from stage2_prior.training import run
from stage2_prior.training.cpu_attention import FLOAT32_SDPA, choose_attention, head_width
from tests.tiny import MASKED_PRIORS, RANDOM_PRIORS

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    "device, in_bfloat16, heads, chosen",
    [
        (CPU, True, 2, FLOAT32_SDPA),
        (CPU, True, 1, "sdpa"),
        (CPU, False, 2, "sdpa"),
        (CUDA, True, 2, "sdpa"),
    ],
)
def test_device_precision_and_width_of_the_heads_decide(layout, device, in_bfloat16, heads, chosen):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": heads}
    prior = build_prior({"model_type": "llama", **sizes}, layout)
    assert prior.config._attn_implementation == "sdpa" and head_width(prior) == 64 // heads
    choose_attention(prior, device, in_bfloat16)
    assert prior.config._attn_implementation == chosen


def test_a_prior_that_does_not_tell_its_heads_stays_as_it_is():
    config = SimpleNamespace(_attn_implementation="sdpa", hidden_size=64, num_attention_heads=[2, 4])
    prior = SimpleNamespace(config=config)
    assert head_width(prior) is None
    choose_attention(prior, CPU, in_bfloat16=True)
    assert prior.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("model_type", [*RANDOM_PRIORS, *MASKED_PRIORS])
def test_it_is_the_attention_of_transformers(random_prior, layout, model_type):
    """Equal in float32, also with padding; in bfloat16 at least as close to float32 as PyTorch's."""
    family = "masked" if model_type in MASKED_PRIORS else "causal"
    prior = random_prior(model_type, replace(layout, family=family)).cpu().eval()
    tokens = torch.arange(32).view(2, 16)
    read = torch.ones_like(tokens)
    read[1, :5] = 0
    fused, fused_bf16 = (logits(prior, tokens, read, in_bfloat16) for in_bfloat16 in (False, True))
    choose_attention(prior, CPU, in_bfloat16=True)
    assert prior.config._attn_implementation == FLOAT32_SDPA
    ours, ours_bf16 = (logits(prior, tokens, read, in_bfloat16) for in_bfloat16 in (False, True))
    assert torch.equal(ours, fused)
    assert (ours_bf16 - fused).square().mean() <= 1.5 * (fused_bf16 - fused).square().mean()


def logits(prior, tokens, read, in_bfloat16):
    """The logits of the positions that are no padding."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
        return prior(input_ids=tokens, attention_mask=read).logits.float()[read.bool()]


def test_its_gradients_are_those_of_float32(random_prior, layout):
    prior, tokens, found = random_prior("llama", layout).cpu(), torch.arange(32).view(2, 16), {}
    for name in ("sdpa", FLOAT32_SDPA):
        prior.set_attn_implementation(name)
        prior.zero_grad()
        prior(input_ids=tokens, labels=tokens).loss.backward()
        found[name] = [parameter.grad for parameter in prior.parameters()]
    assert all(torch.equal(ours, fused) for fused, ours in zip(*found.values(), strict=True))


@pytest.mark.parametrize("bf16", [False, True])
def test_a_run_chooses(bf16, tiny_runs, stage2_values, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    chosen, initial_prior = [], run.initial_prior
    monkeypatch.setattr(run, "initial_prior", lambda *args: chosen.append(initial_prior(*args)) or chosen[-1])
    values = stage2_values(tmp_path, tiny_runs.vqgan, code_store=str(tiny_runs.codes), output_dir=str(tmp_path / "run"))
    run.train(load_config(Stage2Config, overrides={**values, "max_steps": 1, "save_steps": 1, "bf16": bf16}))
    assert [prior.config._attn_implementation for prior in chosen] == [FLOAT32_SDPA if bf16 else "sdpa"]
