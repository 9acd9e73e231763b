"""Token dropout: what it does to a forward, and runs with it."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from configs import ConfigError, load_config
from stage2_prior import Stage2Config
from stage2_prior.adapters import attach_adapter
from stage2_prior.training.config import LoraConfig
from stage2_prior.training.run import train
from stage2_prior.training.token_dropout import add_token_dropout
from tests.devices import DEVICE
from tests.slow import few
from tests.stage2_prior.training.test_optimizer import CHECKPOINTING
from tests.tiny import MASKED_PRIORS, RANDOM_PRIORS


@pytest.fixture(scope="module")
def make_config(tiny_runs, stage2_values, tmp_path_factory):
    root = tmp_path_factory.mktemp("token_dropout")

    def make(name, **changes):
        values = stage2_values(root, tiny_runs.vqgan, code_store=str(tiny_runs.codes), output_dir=str(root / name))
        values |= {"max_steps": 4, "save_steps": 2, "token_dropout": 0.3, "ema_decay": 0.0}
        return load_config(Stage2Config, overrides={**values, **changes})

    return make


def weights(config):
    folder = Path(config.output_dir)
    return load_file(folder / ("adapter_model.safetensors" if config.lora.r else "model.safetensors"))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("model_type", [*RANDOM_PRIORS, *MASKED_PRIORS])
def test_it_is_dropout_of_the_embeddings(random_prior, layout, model_type, tied):
    """A forward with embeddings in place of tokens does not reach the hook, so the model is its own reference."""
    family = "masked" if model_type in MASKED_PRIORS else "causal"
    prior = random_prior(model_type, replace(layout, family=family), tie_word_embeddings=tied)
    tokens = torch.arange(32, device=DEVICE).view(2, 16)
    plain = prior(input_ids=tokens).logits
    add_token_dropout(prior, 0.3)
    assert torch.equal(prior(input_ids=tokens).logits, plain)  # in evaluation mode

    def outcome(**inputs):
        prior.zero_grad()
        logits = prior(**inputs).logits
        logits.log_softmax(-1)[..., 0].sum().backward()
        return [logits, *(weight.grad for weight in prior.parameters() if weight.grad is not None)]

    prior.train()
    torch.manual_seed(1)
    found = outcome(input_ids=tokens)
    torch.manual_seed(1)
    expected = outcome(inputs_embeds=nn.Dropout(0.3)(prior.get_input_embeddings().weight[tokens]))
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found[0], plain)


def test_a_dropout_of_zero_adds_nothing(random_prior, layout):
    prior = random_prior("llama", layout)
    add_token_dropout(prior, 0.0)
    assert not prior.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("trained", [[], [41, 42]], ids=["frozen embeddings", "trained embeddings"])
@torch.no_grad()
def test_a_prior_with_an_adapter(random_prior, layout, trained):
    prior = random_prior("llama", layout)
    tokens = torch.arange(32, device=DEVICE).view(2, 16)
    embeddings, plain = prior.get_input_embeddings()(tokens), prior(input_ids=tokens).logits
    adapted = attach_adapter(prior, "base", LoraConfig(r=2), trained)
    add_token_dropout(adapted, 0.3)
    assert torch.equal(adapted.eval()(input_ids=tokens).logits, plain)  # a new adapter changes nothing
    adapted.train()
    torch.manual_seed(1)
    found = adapted(input_ids=tokens).logits
    torch.manual_seed(1)
    assert torch.equal(found, adapted(inputs_embeds=nn.Dropout(0.3)(embeddings)).logits)
    assert not torch.allclose(found, plain)


@pytest.fixture(scope="module")
def dropped(make_config):
    """A run with token dropout."""
    config = make_config("dropped")
    train(config)
    return config


def test_it_changes_the_training_but_no_file_besides(dropped, make_config):
    plain = make_config("plain", token_dropout=0.0)
    train(plain)
    assert not torch.equal(weights(dropped)["lm_head.weight"], weights(plain)["lm_head.weight"])
    folders = Path(dropped.output_dir), Path(plain.output_dir)
    for name in ("config.json", "generation_config.json", "token_layout.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    assert weights(dropped).keys() == weights(plain).keys()


@pytest.mark.parametrize(
    "arguments",
    [
        {CHECKPOINTING: True},
        pytest.param({"torch_compile": True, "torch_compile_backend": "aot_eager"}, marks=pytest.mark.slow),
    ],
    ids=["checkpointing", "compiled"],
)
def test_other_ways_to_the_same_weights(dropped, make_config, arguments):
    config = make_config(next(iter(arguments)), training_arguments=arguments)
    train(config)
    torch.testing.assert_close(weights(config), weights(dropped), rtol=0, atol=1e-5)


@pytest.mark.parametrize("adapter", few([False, True], True), ids=["all weights", "adapter"])
def test_a_resumed_run_equals_a_straight_one(make_config, tiny_runs, adapter):
    base = {"model": {}, "model_name_or_path": str(tiny_runs.prior), "lora.r": 4} if adapter else {}
    config = make_config(f"resumed {adapter}", gradient_accumulation_steps=2, **base)
    train(config)
    straight, run = weights(config), Path(config.output_dir)
    shutil.rmtree(run / "checkpoint-4")
    (run / "train_results.json").unlink()
    train(config)
    assert weights(config).keys() == straight.keys()
    assert all(torch.equal(weights(config)[name], straight[name]) for name in straight)


def test_another_dropout_is_another_run(dropped, make_config):
    with pytest.raises(ConfigError, match=r"token_dropout: the run was started with 0\.3, now it is 0\.1"):
        train(make_config("dropped", token_dropout=0.1))


@pytest.mark.parametrize("value", [1.0, -0.1, "much", True])
def test_values_that_are_no_dropout_are_refused(make_config, value):
    with pytest.raises(ConfigError, match="token_dropout: received"):
        make_config("wrong", token_dropout=value)
