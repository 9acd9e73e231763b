"""Condition contrastive alignment: the pairs, the loss, and runs with it."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from configs import ConfigError, load_config
from stage2_prior import CodeStore, Stage2Config, TokenLayout
from stage2_prior.adapters import attach_adapter
from stage2_prior.conditions import Segment
from stage2_prior.data import CodeDataset
from stage2_prior.training.config import LoraConfig
from stage2_prior.training.contrastive import ContrastiveLoss, PairDataset, check_contrast, log_likelihoods
from stage2_prior.training.contrastive_config import ContrastiveConfig
from stage2_prior.training.run import train
from tests.devices import DEVICE
from tests.slow import few

SETTINGS = ContrastiveConfig(beta=0.5, negative_weight=10.0)


@pytest.fixture(scope="module")
def make_config(tiny_runs, stage2_values, tmp_path_factory):
    root = tmp_path_factory.mktemp("contrastive")

    def make(name, **changes):
        values = stage2_values(root, tiny_runs.vqgan, code_store=str(tiny_runs.codes), output_dir=str(root / name))
        values |= {"model": {}, "model_name_or_path": str(tiny_runs.prior), "condition_dropout": 0.0}
        values |= {"keep_best": False, "max_steps": 4, "save_steps": 2, "logging_steps": 2, "cca.beta": 0.5}
        return load_config(Stage2Config, overrides={**values, "cca.negative_weight": 10.0, **changes})

    return make


@pytest.fixture(scope="module")
def pairs(tiny_runs):
    store = CodeStore(tiny_runs.codes)
    return PairDataset(CodeDataset(store.split("train"), store.layout))


def indices(epoch, rows):
    return np.stack([np.full(len(rows), epoch), rows], 1)


def weights(config):
    folder = Path(config.output_dir)
    return load_file(folder / ("adapter_model.safetensors" if config.lora.r else "model.safetensors"))


def test_pairs_are_the_same_codes_with_the_class_of_another_image(pairs):
    rows = np.arange(400)
    batch, single = pairs.__getitems__(indices(2, rows)), pairs.sequences.__getitems__(indices(2, rows))
    own, other = batch["input_ids"].chunk(2)
    assert torch.equal(own, single["input_ids"]) and torch.equal(other[:, 1:], own[:, 1:])
    for name in ("labels", "shift_labels"):
        assert torch.equal(batch[name], torch.cat([single[name], single[name]]))
    classes = other[:, 0] - 32  # after the 32 codes
    assert sorted(set(classes.tolist())) == list(range(10))
    assert 0.02 < (other[:, 0] == own[:, 0]).float().mean() < 0.2  # by chance, in one of ten pairs


def test_pairs_depend_on_epoch_and_row_alone(pairs):
    rows = np.arange(40)
    whole, part = (pairs.__getitems__(indices(2, some))["input_ids"] for some in (rows, rows[30:]))
    assert torch.equal(torch.cat([whole[30:40], whole[70:]]), part)
    assert not torch.equal(whole[40:], pairs.__getitems__(indices(3, rows))["input_ids"][40:])


@pytest.mark.parametrize("weight", [0.5, 10.0])
def test_the_loss_is_that_of_the_paper(random_prior, layout, weight):
    start, prior = random_prior("llama", layout), random_prior("llama", layout, seed=1)
    codes = torch.randint(40, (3, 16), generator=torch.Generator().manual_seed(0))
    own, other = torch.tensor([40, 42, 44]), torch.tensor([41, 42, 40])

    @torch.no_grad()
    def log_likelihood(model, condition, image):
        sequence = torch.cat([condition[None], image]).to(DEVICE)
        probabilities = model(input_ids=sequence[None, :-1]).logits[0].double().softmax(1)
        return sum(math.log(probabilities[place, code]) for place, code in enumerate(image.tolist()))

    expected = 0.0
    for image, right, wrong in zip(codes, own, other, strict=True):
        gains = [log_likelihood(prior, c, image) - log_likelihood(start, c, image) for c in (right, wrong)]
        for factor, sign, gain in ((1, 1, gains[0]), (weight, -1, gains[1])):
            expected += factor * math.log1p(math.exp(-sign * 0.02 * gain)) / max(weight, 1) / 3
    inputs = torch.cat([torch.cat([c[:, None], codes[:, :-1]], 1) for c in (own, other)]).to(DEVICE)
    loss = ContrastiveLoss(start, ContrastiveConfig(beta=0.02, negative_weight=weight))
    found = loss(prior, prior, {"input_ids": inputs, "labels": codes.repeat(2, 1).to(DEVICE)})
    assert found.item() == pytest.approx(expected, rel=1e-4)
    found.backward()
    assert all(parameter.grad is None for parameter in loss.start.parameters())


def test_shares_of_right_terms(random_prior, layout):
    prior = random_prior("llama", layout)
    loss = ContrastiveLoss(prior, SETTINGS)
    gains = iter([torch.tensor([1.0, -1, 1, 1, -1, -1, 1, -1]), torch.tensor([1.0, 1, 1, 1, -1, -1, -1, -1])])
    loss.log_likelihoods_before = lambda prior, inputs: -next(gains)
    inputs = {"input_ids": torch.zeros(8, 1, dtype=torch.int64), "labels": torch.full((8, 1), -100)}
    for _ in range(2):
        loss(prior.cpu(), prior, inputs)
    assert loss.right().tolist() == [7 / 8, 7 / 8]


@torch.no_grad()
def test_an_adapter_is_compared_with_its_prior(random_prior, layout):
    plain = random_prior("llama", layout)
    adapted = attach_adapter(random_prior("llama", layout), "base", LoraConfig(r=2, dropout=0.5), [41, 42])
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    inputs = {"input_ids": torch.arange(28, 60).view(2, 16).to(DEVICE), "labels": torch.ones(2, 16).long().to(DEVICE)}
    loss = ContrastiveLoss(adapted.train(), SETTINGS)
    expected = ContrastiveLoss(plain, SETTINGS).log_likelihoods_before(plain, inputs)
    assert loss.start is None and not torch.allclose(log_likelihoods(adapted, inputs), expected)
    torch.testing.assert_close(loss.log_likelihoods_before(adapted, inputs), expected)
    assert adapted.training


ADAPTER = {"lora.r": 4, "lora.dropout": 0.1}


@pytest.mark.parametrize("adapter", few([{}, ADAPTER], {}), ids=["all weights", "adapter"])
def test_a_resumed_run_equals_a_straight_one(make_config, adapter, tiny_runs):
    config = make_config(f"resumed {len(adapter)}", gradient_accumulation_steps=2, token_dropout=0.1, **adapter)
    train(config)
    straight, run = weights(config), Path(config.output_dir)
    shutil.rmtree(run / "checkpoint-4")
    (run / "train_results.json").unlink()
    train(config)
    assert all(torch.equal(weights(config)[name], straight[name]) for name in straight)
    if not adapter:
        stock = AutoModelForCausalLM.from_pretrained(run)
        assert stock.state_dict().keys() == AutoModelForCausalLM.from_pretrained(tiny_runs.prior).state_dict().keys()
        assert not TokenLayout.from_pretrained(run).has_null


def test_a_run_moves_images_away_from_other_classes(make_config):
    config = make_config("learning", max_steps=10, logging_steps=5, learning_rate=1e-3)
    train(config)
    lines = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    logs = [line for line in lines if "loss" in line]
    assert logs[-1]["loss"] < logs[0]["loss"] < math.log(2) * 11 / 10 + 1e-6  # of p = p_start
    assert logs[-1]["other_condition_accuracy"] > 0.6 and "own_condition_accuracy" in logs[-1]
    assert "bits_per_pixel" not in logs[-1] and any("eval_bits_per_pixel" in line for line in lines)


def test_two_small_batches_make_the_step_of_a_large_one(make_config):
    found = []
    for count in (1, 2):
        batch = {"per_device_train_batch_size": 64 // count, "gradient_accumulation_steps": count, "ema_decay": 0.0}
        settings = {"max_grad_norm": 0, "learning_rate": 1.0, "training_arguments.optim": "sgd", "max_steps": 2}
        config = make_config(f"batches {count}", **batch, **settings)
        train(config)
        found.append(weights(config))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prior": "masked"}, "prior: received 'masked'; cca.beta needs"),
        ({"model_name_or_path": None, "model.model_type": "llama"}, "cca.beta: .*needs model_name_or_path"),
        ({"condition_dropout": 0.1}, r"condition_dropout: received 0\.1"),
        ({"keep_best": True}, "keep_best: received true"),
        ({"early_stopping_patience": 2}, "early_stopping_patience: received 2"),
        ({"data.use_labels": False}, r"data\.use_labels: received false"),
        ({"training_arguments.label_smoothing_factor": 0.1}, "label_smoothing_factor: received"),
        ({"cca.negative_weight": 0.0}, "cca.negative_weight: received 0"),
        ({"cca.beta": 0.0}, "cca.negative_weight: received 10"),
        ({"cca.beta": -1.0}, "cca.beta: received -1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_go_with_it(make_config, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_config("wrong", **changes)


def test_conditions_that_the_prior_does_not_know(layout):
    check_contrast("base", layout, replace(layout, class_names=layout.class_names[:2], has_null=False))
    text = Segment("text", "text", 10, length=4, has_null=False, fingerprint="abc")
    for known, codes, message in [
        (layout, replace(layout, class_names=layout.class_names[:1]), "cca.beta: .* has 1"),
        (layout, replace(layout, class_names=(*layout.class_names, "fox")), "model_name_or_path: received 'base'"),
        (layout, replace(layout, segments=(text,)), "model_name_or_path: received 'base'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            check_contrast("base", known, codes)
    check_contrast("base", replace(layout, segments=(text,)), replace(layout, class_names=(), segments=(text,)))
