"""The training of masked priors: what is logged and saved, resuming, fine-tuning, and models that cannot be one."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForMaskedLM

from configs import ConfigError, load_config
from pipelines import VQGANPipeline
from pipelines.build import BuildConfig, build
from stage2_prior import CodeStore, Stage2Config, TokenLayout, load_language_model, load_prior
from stage2_prior.data import CodeDataset
from stage2_prior.masking import MaskedCodeDataset
from stage2_prior.prior import adapt_prior, build_prior
from stage2_prior.training.run import train
from stage2_prior.training.throughput import training_flops
from stage2_prior.training.trainer import PriorTrainer
from tests import tiny


@pytest.fixture
def make_config(tiny_runs, tmp_path, stage2_values) -> Callable[..., Stage2Config]:
    """Makes the configuration of a masked prior over the codes of `tiny_runs`."""

    def make(**changes) -> Stage2Config:
        values = stage2_values(tmp_path, tiny_runs.vqgan, code_store=str(tiny_runs.codes), max_steps=2, prior="masked")
        return load_config(Stage2Config, overrides={**values, "model": dict(tiny.BERT), **changes})

    return make


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@torch.no_grad()
def test_the_loss_is_the_mean_over_the_hidden_codes_of_the_validation_images(masked_runs, tiny_runs):
    """No figure is called a likelihood of images: it is none."""
    results = json.loads((masked_runs.prior / "train_results.json").read_text())
    layout = TokenLayout.from_pretrained(masked_runs.prior)
    split = CodeStore(tiny_runs.codes).split("validation")
    batch = MaskedCodeDataset(CodeDataset(split, layout)).__getitems__(range(len(split)))
    prior = AutoModelForMaskedLM.from_pretrained(masked_runs.prior)
    logits = prior(input_ids=batch["input_ids"]).logits.double()
    nats = cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    hidden = batch["labels"].flatten() >= 0
    assert results["eval_loss"] == pytest.approx(nats[hidden].mean().item(), rel=1e-5)  # 360 images in batches of 100
    names = {name for line in logged(masked_runs.prior) for name in line} | results.keys()
    assert {"loss", "eval_loss"} <= names and not [name for name in names if "bits" in name or "perplexity" in name]


def test_training_learns(masked_runs):
    losses = [line["loss"] for line in logged(masked_runs.prior) if "loss" in line]
    assert losses[-1] < losses[0] < 1.02 * math.log(64)


def test_the_saved_prior_is_a_stock_model_of_both_loaders(masked_runs):
    layout = TokenLayout.from_pretrained(masked_runs.prior)
    assert (layout.family, layout.mask_token, layout.vocab_size) == ("masked", 43, 64)
    tokens = torch.arange(17)[None]
    stock, ours, again = (
        AutoModelForMaskedLM.from_pretrained(masked_runs.prior),
        load_prior(str(masked_runs.prior)),
        load_language_model(masked_runs.pipeline / "prior", "masked"),
    )
    assert (stock.config.mask_token_id, stock.config.max_position_embeddings) == (43, 17)
    assert torch.equal(stock(tokens).logits, ours(tokens).logits) and torch.equal(
        ours(tokens).logits, again(tokens).logits
    )
    with pytest.raises(ValueError, match=r"model_type: received 'bert', but the weights were saved from|do not fit"):
        load_language_model(masked_runs.prior)  # as a causal one


def test_a_resumed_run_equals_a_straight_one(make_config, tmp_path):
    config = make_config(max_steps=4, save_steps=2, eval_steps=2, condition_dropout=0.2, gradient_accumulation_steps=2)
    train(config)
    run, straight = tmp_path / "prior", (tmp_path / "prior" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoint-4")
    for name in ("model.safetensors", "train_results.json"):
        (run / name).unlink()
    train(config)
    assert (run / "model.safetensors").read_bytes() == straight


def test_two_small_batches_make_the_step_of_a_large_one(make_config, tmp_path):
    """BERT's own loss is the mean over a micro-batch, whatever number of hidden codes the other one has."""
    model = {**tiny.BERT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    settings = {"model": model, "ema_decay": 0.0, "max_grad_norm": 0, "learning_rate": 1.0}
    weights = []
    for count in (1, 2):
        batch = {"per_device_train_batch_size": 64 // count, "gradient_accumulation_steps": count}
        name = {"output_dir": str(tmp_path / str(count)), "training_arguments.optim": "sgd"}
        weights.append(train(make_config(**settings, **batch, **name)).state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-5)
    moved = weights[0]["bert.encoder.layer.0.output.dense.bias"]  # starts at 0
    assert moved.abs().max() > 1e-3


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("items", [None, 100])
def test_the_loss_counts_hidden_codes_alone(smoothing, items):
    logits = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.full((3, 5), -100)
    labels[0, 1], labels[0, 4], labels[2, 2] = 3, 7, 0
    trainer: Any = SimpleNamespace(args=SimpleNamespace(label_smoothing_factor=smoothing))
    found = PriorTrainer.loss_of_hidden_codes(trainer, SimpleNamespace(logits=logits), labels, items)
    scores, expected = logits.log_softmax(-1), 0.0
    for row, place, code in [(0, 1, 3), (0, 4, 7), (2, 2, 0)]:
        expected -= (1 - smoothing) * scores[row, place, code] + smoothing * scores[row, place].mean()
    torch.testing.assert_close(found, expected / (items or 3))


@pytest.mark.slow
def test_sample_grids_are_those_of_the_pipeline(make_config, tiny_runs, tmp_path):
    config = make_config(num_sample_images=10, keep_best=False, ema_decay=0.0)
    train(config)
    build(BuildConfig(tokenizer=str(tiny_runs.vqgan), prior=config.output_dir, output_dir=str(tmp_path / "pipeline")))
    from PIL import Image

    from stage1_vqgan import labelled_grid

    pipe = VQGANPipeline.from_pretrained(tmp_path / "pipeline")
    images = pipe.generate(pipe.class_names, guidance_scale=1.5, seed=config.seed).images
    expected = labelled_grid(
        [(name, [image]) for name, image in zip(pipe.class_names, images, strict=True)], 1, min_tile=48
    )
    found = Image.open(tmp_path / "prior" / "samples" / "step_00000002.png")
    assert np.array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"model_type": "llama"}, "received 'llama'; unknown masked language model .* choose modernbert or bert"),
        ({**tiny.BERT, "is_decoder": True}, "received 'bert'; a masked prior must predict every token from all tokens"),
        (
            {"model_type": "bart", "d_model": 32, "encoder_layers": 1, "decoder_layers": 1},
            "received 'bart'; a masked prior must predict",
        ),
        ({**tiny.BERT, "mask_token_id": 3}, r"model\.mask_token_id: .*the code store determines it"),
        ({**tiny.BERT, "hidden_size": 33}, r"model\.hidden_size"),
    ],
    ids=str,
)
def test_models_that_are_no_masked_prior_are_refused(make_config, model, message):
    with pytest.raises(ConfigError, match=message):
        train(make_config(model=model))


def test_unknown_families_are_refused(make_config):
    with pytest.raises(ConfigError, match=r"prior: received 'maskt'"):
        make_config(prior="maskt")
    with pytest.raises(ConfigError, match="prior: the run was started with"):
        config = make_config()
        train(config)
        train(make_config(prior="causal", model=dict(tiny.LLAMA)))


def test_a_layout_counts_the_mask_token(layout, masked_layout):
    full = replace(layout, num_codes=58)  # with five classes and the null token, 64 tokens
    assert full.vocab_size == 64 and replace(full, family="masked").vocab_size == 128
    assert "family" not in layout.to_dict() and "mask" not in layout.to_dict()["tokens"]
    assert TokenLayout.from_dict(masked_layout.to_dict()) == masked_layout != layout


def test_operations_are_counted_for_both_families(masked_layout):
    prior = build_prior(tiny.BERT, masked_layout)
    weights = sum(
        weight.numel() for name, weight in prior.named_parameters() if weight.ndim == 2 and "embeddings" not in name
    )
    weights += prior.get_output_embeddings().weight.numel()  # tied to the embeddings
    expected = 6 * weights + 12 * 2 * 32 * 17
    assert training_flops(prior.config, 17, "masked") == pytest.approx(expected, rel=1e-6)


# ---------------------------------------------------------------------- fine-tuning


def test_new_classes_get_new_embeddings_and_the_others_keep_theirs(masked_runs):
    known = TokenLayout.from_pretrained(masked_runs.prior)
    layout = replace(known, class_names=(*"9876543210", *map(chr, range(97, 120))), class_counts=())
    old, new = load_prior(str(masked_runs.prior)), adapt_prior(str(masked_runs.prior), {}, layout)
    assert layout.vocab_size == 128 and new.config.mask_token_id == layout.mask_token == 66
    for end in ("get_input_embeddings", "get_output_embeddings"):
        before, after = (getattr(prior, end)().weight for prior in (old, new))
        assert torch.equal(after[:32], before[:32]) and torch.equal(after[32:42], before[32:42].flip(0))
        assert torch.equal(after[66], before[43]) and torch.equal(after[65], before[42])  # mask and null
    assert torch.equal(new.cls.predictions.bias[66], old.cls.predictions.bias[43])
    assert torch.equal(new.bert.encoder.layer[1].output.dense.weight, old.bert.encoder.layer[1].output.dense.weight)


def test_a_prior_of_the_other_family_is_refused(make_config, masked_runs, tiny_runs):
    for family, name in (("causal", masked_runs.prior), ("masked", tiny_runs.prior)):
        other = {"causal": "masked", "masked": "causal"}[family]
        with pytest.raises(
            ConfigError, match=rf"prior: received '{family}', but .* is a {other} prior; set it to '{other}'"
        ):
            train(make_config(prior=family, model={}, model_name_or_path=str(name)))


def test_an_adapter_of_a_masked_prior_is_merged(make_config, masked_runs, tiny_runs, tmp_path):
    base = {"model": {}, "model_name_or_path": str(masked_runs.prior), "lora.r": 4}
    returned = train(make_config(**base, learning_rate=0.03, ema_decay=0.0))
    assert (tmp_path / "prior" / "adapter_model.safetensors").is_file()
    merged = build(
        BuildConfig(
            tokenizer=str(tiny_runs.vqgan), prior=str(tmp_path / "prior"), output_dir=str(tmp_path / "pipeline")
        )
    )
    tokens = torch.arange(17)[None]
    before = load_prior(str(masked_runs.prior))(tokens).logits
    assert torch.equal(merged.prior(tokens).logits, returned(tokens).logits) and not torch.equal(
        returned(tokens).logits, before
    )
    assert type(merged.prior) is type(returned)
