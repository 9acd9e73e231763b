"""The weights with weight decay, and settings of Trainer that change the computation of a step, but not its result."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from configs import load_config
from stage2_prior import Stage2Config
from stage2_prior.training.run import train, training_arguments

# transformers 6 removes the older name.
CHECKPOINTING = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)


@pytest.fixture(scope="module")
def make_config(tiny_runs, stage2_values, tmp_path_factory):
    root = tmp_path_factory.mktemp("optimizer")

    def make(name, **changes):
        values = stage2_values(root, tiny_runs.vqgan, code_store=str(tiny_runs.codes), output_dir=str(root / name))
        return load_config(Stage2Config, overrides={**values, "max_steps": 4, "weight_decay": 0.1, **changes})

    return make


@pytest.mark.parametrize(
    ("model_type", "vectors"),
    [
        ("llama", r"model.norm|input_layernorm|post_attention_layernorm"),
        ("gpt2", r"ln_1|ln_2|ln_f|c_attn.bias|c_proj.bias|c_fc.bias"),
        ("qwen3", r"model.norm|input_layernorm|post_attention_layernorm|q_norm|k_norm"),
    ],
)
def test_weight_decay_is_for_matrices(make_config, random_prior, layout, model_type, vectors):
    """Embeddings have weight decay; norms and biases have none."""
    prior = random_prior(model_type, layout)
    names = {id(weight): name for name, weight in prior.named_parameters()}
    optimizer = Trainer(prior, training_arguments(make_config(model_type)), eval_dataset=[]).create_optimizer()
    decayed, spared = ({names[id(weight)] for weight in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert decayed | spared == set(names.values()) and not decayed & spared
    assert spared == {name for name in names.values() if any(part in name for part in vectors.split("|"))}
    assert decayed == {name for name, weight in prior.named_parameters() if weight.ndim == 2}
    assert optimizer.defaults["fused"]


@pytest.fixture(scope="module")
def plain(make_config):
    config = make_config("plain")
    train(config)
    return load_file(f"{config.output_dir}/model.safetensors")


@pytest.mark.parametrize(
    "arguments",
    [
        {"optim": "adamw_torch"},
        {CHECKPOINTING: True},
        pytest.param({"torch_compile": True}, marks=pytest.mark.slow),
    ],
    ids=["adamw_torch", "checkpointing", "compiled"],
)
def test_other_ways_to_the_same_weights(make_config, plain, arguments):
    config = make_config(next(iter(arguments)), training_arguments=arguments)
    train(config)
    found = load_file(f"{config.output_dir}/model.safetensors")
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)
