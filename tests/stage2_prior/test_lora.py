"""Adapters of a prior: saved files, resuming, new classes, and pipelines from adapters."""

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import stage2_prior.adapters
import stage2_prior.training.config
import stage2_prior.training.run
from configs import ConfigError, load_config
from pipelines import VQGANPipeline
from pipelines.build import BuildConfig, build
from stage1_vqgan import VQGANImageProcessor, VQGANModel
from stage2_prior import Stage2Config, TokenLayout, load_prior
from stage2_prior.adapters import attach_adapter
from stage2_prior.prior import adapt_prior
from stage2_prior.training.config import LoraConfig
from stage2_prior.training.run import train
from tests.resealing import edit_manifest
from tests.slow import few
from tests.tiny import RANDOM_PRIORS


@pytest.fixture
def make_config(tiny_runs, tmp_path, stage2_values) -> Callable[..., Stage2Config]:
    """Makes the configuration of a run that fine-tunes the prior of `tiny_runs`."""

    def make(**changes) -> Stage2Config:
        base = {"model": {}, "model_name_or_path": str(tiny_runs.prior), "lora.r": 4}
        values = stage2_values(tmp_path, tiny_runs.vqgan, code_store=str(tiny_runs.codes), max_steps=4, save_steps=2)
        return load_config(Stage2Config, overrides={**values, **base, "lora.dropout": 0.1, **changes})

    return make


def codes_of(pipeline: VQGANPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.generate(list(range(10)), guidance_scale=2.0, generator=generator, output_type="codes").codes.cpu()


def pipeline_of(tiny_runs, prior, layout) -> VQGANPipeline:
    vqgan = VQGANModel.from_pretrained(tiny_runs.vqgan)
    return VQGANPipeline(vqgan, prior, VQGANImageProcessor.from_pretrained(tiny_runs.vqgan), layout)


def test_a_run_leaves_an_adapter_and_pipelines_have_it(make_config, tiny_runs, tmp_path, monkeypatch, tiny_pipeline):
    trained, run = [], tmp_path / "prior"

    def watched(*args):
        trained.append(attach_adapter(*args))
        return trained[-1]

    monkeypatch.setattr(stage2_prior.training.run, "attach_adapter", watched)
    config = make_config(learning_rate=0.03, eval_steps=2, ema_decay=0.0, keep_best=False)
    returned = train(config)
    left = {path.name for path in run.iterdir()}
    assert left >= {"adapter_model.safetensors", "adapter_config.json", "token_layout.json"}
    assert "model.safetensors" not in left
    assert json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_runs.prior)
    assert all(".lora_" in name for name in load_file(run / "adapter_model.safetensors"))

    expected = codes_of(pipeline_of(tiny_runs, trained[0], TokenLayout.from_pretrained(run)))
    assert not torch.equal(expected, codes_of(tiny_pipeline))
    merged = build(BuildConfig(tokenizer=str(tiny_runs.vqgan), prior=str(run), output_dir=str(tmp_path / "merged")))
    assert torch.equal(codes_of(merged), expected)
    assert type(merged.prior) is type(returned) is type(tiny_pipeline.prior)
    assert torch.equal(codes_of(VQGANPipeline.from_pretrained(tmp_path / "merged")), expected)
    assert not (tmp_path / "merged" / "prior" / "adapter_config.json").exists()  # needs neither peft nor the base
    # the same adapter, loaded by transformers
    loaded = VQGANPipeline.from_pretrained(tiny_runs.pipeline)
    assert torch.equal(codes_of(loaded), codes_of(tiny_pipeline))
    loaded.prior.load_adapter(run)
    assert torch.equal(codes_of(loaded), expected)

    # the interrupted run, which includes dropout, resumes and ends with the same weights
    straight = (run / "adapter_model.safetensors").read_bytes()
    assert not (run / "checkpoint-2" / "model.safetensors").exists()
    shutil.rmtree(run / "checkpoint-4")
    for name in ("adapter_model.safetensors", "adapter_config.json", "train_results.json"):
        (run / name).unlink()
    again = train(config)
    assert (run / "adapter_model.safetensors").read_bytes() == straight
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), returned.parameters(), strict=True))
    shutil.rmtree(run / "checkpoint-2")
    assert len(trained) == 2 and train(config) is not None and len(trained) == 2  # a finished run does not train again


@pytest.mark.slow
def test_the_best_averaged_adapter_is_kept_over_an_interruption(make_config, tmp_path):
    config, run = make_config(max_steps=6, eval_steps=2, learning_rate=0.01), tmp_path / "prior"
    train(config)
    names = ["adapter_model.safetensors", "checkpoint-6/adapter_model.safetensors", "checkpoint-6/average.safetensors"]
    straight = [(run / name).read_bytes() for name in names]
    assert (run / "checkpoint-4" / "best" / "adapter_model.safetensors").is_file()
    shutil.rmtree(run / "checkpoint-6")
    for name in ("adapter_model.safetensors", "train_results.json"):
        (run / name).unlink()
    train(config)
    assert [(run / name).read_bytes() for name in names] == straight


@pytest.mark.slow
def test_other_classes_come_with_the_adapter(make_config, tiny_runs, tmp_path):
    store = tmp_path / "codes"
    shutil.copytree(tiny_runs.codes, store)
    names = [*"9876543210", *(f"new {number}" for number in range(30))]
    edit_manifest(store, lambda manifest: manifest["token_layout"].update(class_names=names, class_counts=()))
    tuned = train(make_config(code_store=str(store)))
    layout = TokenLayout.from_pretrained(tmp_path / "prior")
    assert layout.num_classes == 40 and tuned.config.vocab_size == layout.vocab_size == 128
    before = AutoModelForCausalLM.from_pretrained(tiny_runs.prior)
    for end in ("get_input_embeddings", "get_output_embeddings"):
        old, new = (getattr(prior, end)().weight for prior in (before, tuned))
        classes = old[32:42].flip(0)  # the known classes, by name
        assert torch.equal(new[:32], old[:32]) and torch.allclose(new[32:42], classes, atol=0.03)
        assert (new[32:42] != classes).any(1).all()  # a few training steps have changed them
    build(BuildConfig(tokenizer=str(tiny_runs.vqgan), prior=str(tmp_path / "prior"), output_dir=str(tmp_path / "pipe")))
    pipeline = VQGANPipeline.from_pretrained(tmp_path / "pipe")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.class_names[0] == "9" and len(pipeline.generate(["new 7"]).images) == 1


@pytest.mark.parametrize(
    ("model_type", "classes"),
    few(
        itertools.product(RANDOM_PRIORS, ["abcde", "cax", "edxcbafghijklmnopqrstuvwxyz"]),
        ("llama", "abcde"),
        ("gpt2", "edxcbafghijklmnopqrstuvwxyz"),
        ("qwen3", "cax"),
    ),
)
@torch.no_grad()
def test_what_is_saved_is_the_model_that_was_trained(layout, random_prior, tmp_path, model_type, classes):
    base, folder = str(tmp_path / "base"), str(tmp_path / "adapter")
    known = replace(layout, class_names=tuple("abcde"))
    random_prior(model_type, known).save_pretrained(base)
    known.save_pretrained(base)
    wanted = replace(layout, class_names=tuple(classes))
    tokens = list(range(wanted.num_codes, wanted.vocab_size)) if wanted != known else []
    model = attach_adapter(adapt_prior(base, {}, wanted), base, LoraConfig(r=2), tokens)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    wanted.save_pretrained(folder)
    sequences = torch.tensor([[wanted.num_codes + 2, 3, 1, 4], [wanted.null_token, 1, 5, 9]])
    expected = model.eval()(input_ids=sequences).logits
    merged = load_prior(folder).eval()
    torch.testing.assert_close(merged(input_ids=sequences).logits, expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(again(input_ids=sequences).logits, merged(input_ids=sequences).logits)


def test_an_adapter_of_an_adapter(make_config, tmp_path):
    first = train(make_config(max_steps=1))
    changes = {"model_name_or_path": str(tmp_path / "prior"), "output_dir": str(tmp_path / "second")}
    second = train(make_config(max_steps=1, learning_rate=1e-30, **changes))
    for name, weight in second.named_parameters():
        torch.testing.assert_close(weight, first.get_parameter(name), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name_or_path": None, "model": {"model_type": "llama"}}, r"lora\.r: received 4; needs model_name_or_p"),
        ({"lora.r": 0}, r"lora\.r: received 0; no adapter is trained; set it"),
        ({"lora.r": -1}, r"lora\.r: received -1"),
        ({"lora.alfa": 8}, r"lora\.alfa: .*did you mean 'alpha'\?"),
        ({"lora.dropout": 1.0}, r"lora\.dropout: received 1\.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configurations_that_cannot_work(make_config, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_config(**changes)


def test_a_regular_expression_is_saved_as_names(make_config, tiny_runs, tmp_path):
    pattern = r".*layers\.[01]\..*\.(q|v)_proj"
    trained = train(make_config(max_steps=1, **{"lora.target_modules": pattern}))
    saved = json.loads((tmp_path / "prior" / "adapter_config.json").read_text())["target_modules"]
    assert sorted(saved) == [f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qv"]
    loaded = load_prior(str(tmp_path / "prior"))
    assert all(torch.equal(weight, trained.get_parameter(name)) for name, weight in loaded.named_parameters())
    before = load_prior(str(tiny_runs.prior))
    changed = [
        name for name, weight in loaded.named_parameters() if not torch.equal(weight, before.get_parameter(name))
    ]
    assert changed == [f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in (0, 1) for name in "qv"]


def test_modules_that_are_not_there(make_config):
    with pytest.raises(ConfigError, match=r"lora\.target_modules: received \['q_projection'\]; .*not found"):
        train(make_config(**{"lora.target_modules": ["q_projection"]}))


def test_without_peft_or_without_the_base(make_config, tiny_runs, layout, random_prior, tmp_path, monkeypatch):
    base, folder = str(tmp_path / "base"), str(tmp_path / "adapter")
    attach_adapter(random_prior("llama", layout), base, LoraConfig(r=1), []).save_pretrained(folder)
    layout.save_pretrained(folder)
    config = BuildConfig(tokenizer=str(tiny_runs.vqgan), prior=folder, output_dir=str(tmp_path / "pipeline"))
    with pytest.raises(ConfigError, match=r"prior: received .*adapter', an adapter of the prior .*base': .*no trained"):
        build(config)
    for module in (stage2_prior.adapters, stage2_prior.training.config):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"prior: received .*, which holds an adapter; peft is not inst"):
        build(config)
    with pytest.raises(ConfigError, match=r"lora\.r: received 4; peft is not .*pip install 'tessella\[lora\]'"):
        make_config()
