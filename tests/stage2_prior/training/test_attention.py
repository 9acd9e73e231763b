"""The attention of a training: plain for short sequences in bfloat16 on a CPU, else the fused one."""

from dataclasses import replace

import pytest
import torch

from configs import load_config
from stage2_prior import Stage2Config
from stage2_prior.training import run
from stage2_prior.training.attention import MOST_POSITIONS, choose_attention
from tests.devices import DEVICE
from tests.tiny import MASKED_PRIORS, RANDOM_PRIORS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    "device, in_bfloat16, positions, plain",
    [
        (CPU, True, MOST_POSITIONS, True),
        (CPU, True, MOST_POSITIONS + 1, False),
        (CPU, False, 50, False),
        (CUDA, True, 50, False),
    ],
)
def test_device_precision_and_length_decide(random_prior, layout, device, in_bfloat16, positions, plain):
    prior = random_prior("llama", layout)
    assert prior.config._attn_implementation == "sdpa"
    choose_attention(prior, device, in_bfloat16, positions)
    assert prior.config._attn_implementation == ("eager" if plain else "sdpa")


@pytest.mark.parametrize("model_type", [*RANDOM_PRIORS, *MASKED_PRIORS])
def test_both_attentions_agree(random_prior, layout, model_type):
    family = "masked" if model_type in MASKED_PRIORS else "causal"
    prior = random_prior(model_type, replace(layout, family=family))
    tokens = torch.arange(32, device=DEVICE).view(2, 16)
    fused = prior(input_ids=tokens).logits
    choose_attention(prior, CPU, in_bfloat16=True, positions=16)
    torch.testing.assert_close(prior(input_ids=tokens).logits, fused)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_run_chooses(bf16, tiny_runs, stage2_values, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    chosen, initial_prior = [], run.initial_prior
    monkeypatch.setattr(run, "initial_prior", lambda *args: chosen.append(initial_prior(*args)) or chosen[-1])
    values = stage2_values(tmp_path, tiny_runs.vqgan, code_store=str(tiny_runs.codes), output_dir=str(tmp_path / "run"))
    run.train(load_config(Stage2Config, overrides={**values, "max_steps": 1, "save_steps": 1, "bf16": bf16}))
    assert [prior.config._attn_implementation for prior in chosen] == ["eager" if bf16 else "sdpa"]
