"""A run ends before it saves numbers that are not finite, and warns once of a codebook or discriminator that fails."""

import logging
import math

import pytest
import torch
from accelerate import Accelerator

from configs.checkpoints import complete_checkpoints, unfinished_path
from configs.interruption import Diverged
from configs.run_folder import RunFolder
from stage1_vqgan.training.health import Health
from stage1_vqgan.training.losses import MAX_ADAPTIVE_WEIGHT
from stage1_vqgan.training.run import train
from stage1_vqgan.training.step import VQGANTrainer
from tests.devices import DEVICE
from tests.process_runs import stage1_config

CODES = 1000  # codes since the last log
K = 64


@pytest.fixture
def run(tmp_path):
    return RunFolder(stage1_config(tmp_path))


@pytest.fixture
def health(run):
    return Health(run, Accelerator(), "hinge")


def steps(*values, first=10):
    return [(first + n, torch.tensor(float(value), device=DEVICE)) for n, value in enumerate(values)]


def test_the_first_loss_that_is_not_finite_is_named(run, health):
    unfinished_path(run.path, 8).mkdir(parents=True)
    run.publish(8, num_processes=1)
    collected = {
        "loss/l1": steps(1, 2, math.inf),
        "loss/codebook": steps(1, math.nan, 1),
        "logits/real": steps(math.nan, 1, 1),
    }
    with pytest.raises(Diverged, match=r"loss/codebook was not finite at step 12; .*/checkpoint-8\. Try"):
        health.require_finite_losses(collected)
    health.require_finite_losses({"loss/l1": steps(1, 2), "logits/real": steps(math.nan)})
    health.require_finite_losses({})


def test_state_that_is_not_finite_is_named(health):
    good, bad = torch.ones(3, device=DEVICE), torch.tensor([1.0, math.nan], device=DEVICE)
    health.require_finite_state([("a", [good, torch.tensor(3)]), ("b", [good])], step=5)
    with pytest.raises(Diverged, match=r"the generator: not all .* finite after step 5; no checkpoint was saved yet"):
        health.require_finite_state([("a", [good]), ("the generator", [good, bad])], step=5)


FINE = {"codebook/usage": 0.5, "loss/adversarial": 0.1, "loss/discriminator": 0.9}
LOST = {**FINE, "loss/discriminator": 0.01}


@pytest.mark.parametrize(
    ("logs", "word"),
    [
        ([FINE] * 9, None),
        ([{**FINE, "codebook/usage": 0.01}] * 9, "the codebook has collapsed: 1.0% of 64 codes"),
        ([LOST] * 9, "the discriminator has won"),
        ([LOST, LOST, FINE] * 3, None),  # too few logs in a row
        ([{"codebook/usage": 0.5, "loss/discriminator": 0.01}] * 9, None),  # no adversarial loss yet
    ],
)
def test_warnings_come_once(health, caplog, logs, word):
    with caplog.at_level(logging.WARNING):
        for scalars in logs:
            health.warn_of_problems(scalars, {}, CODES, K)
    assert len(caplog.records) == (word is not None)
    assert word is None or word in caplog.text


@pytest.mark.parametrize(
    ("kind", "loss", "told"),
    [
        ("hinge", 0.045, True),
        ("vanilla", 0.045, False),  # guessing has the loss log 2
        ("vanilla", 0.03, True),
        ("non_saturating", 0.03, True),
        ("wasserstein", 0.01, False),  # a distance without a scale
        ("wasserstein", -50.0, False),
    ],
)
def test_a_victory_is_measured_by_the_game(run, caplog, kind, loss, told):
    health = Health(run, Accelerator(), kind)
    for _ in range(5):
        health.warn_of_problems({**FINE, "loss/discriminator": loss}, {}, CODES, K)
    assert len(caplog.records) == told


def test_few_codes_say_nothing_about_a_codebook(health, caplog):
    health.warn_of_problems({"codebook/usage": 0.01}, {}, 9 * K, K)
    assert not caplog.records


@pytest.mark.parametrize(("share", "told"), [(0.4, False), (0.6, True)])
def test_adaptive_weight_at_its_clamp(health, caplog, share, told):
    weights = [MAX_ADAPTIVE_WEIGHT] * int(10 * share) + [3.0] * (10 - int(10 * share))
    for _ in range(2):
        health.warn_of_problems(FINE, {"adversarial/adaptive_weight": steps(*weights)}, CODES, K)
    assert len(caplog.records) == told


def broken_step(at, term):
    step = VQGANTrainer.step

    def broken(self, images, number):
        metrics = step(self, images, number)
        if number == at and term == "weights":
            next(self.model.parameters()).data.fill_(math.nan)
        elif number == at:
            metrics[term] = metrics[term] * math.nan
        return metrics

    return broken


@pytest.mark.parametrize(
    ("at", "term", "message"),
    [
        pytest.param(
            6,
            "loss/l1",
            r"loss/l1 was not finite at step 7; the last good checkpoint is .*checkpoint-6\.",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            5,
            "loss/codebook",
            r"loss/codebook was not finite at step 6; the last good checkpoint is .*checkpoint-4\.",
            marks=pytest.mark.slow,
        ),
        (7, "weights", r"the generator: not all numbers are finite after step 8; .*checkpoint-6\."),
        (0, "loss/adversarial", r"loss/adversarial was not finite at step 1; no checkpoint was saved yet"),
    ],
)
def test_a_run_ends_before_it_saves_them(tmp_path, monkeypatch, at, term, message):
    monkeypatch.setattr(VQGANTrainer, "step", broken_step(at, term))
    changes = {"max_steps": 9, "save_steps": 2, "logging_steps": 100, "eval_steps": 100, "save_total_limit": 9}
    config = stage1_config(tmp_path, **changes)
    config.loss.adversarial_start_step = 0
    with pytest.raises(Diverged, match=message):
        train(config)
    saved = [checkpoint.step for checkpoint in complete_checkpoints(config.output_dir)]
    assert saved == list(range(2, at + 1, 2))


def test_a_real_overflow_is_found(tmp_path):
    """The test changes no tensors: a much too high learning rate makes the run diverge."""
    config = stage1_config(tmp_path, learning_rate=1e30, max_grad_norm=0, max_steps=30, logging_steps=5)
    with pytest.raises(Diverged, match=r"not finite|not all numbers are finite"):
        train(config)
    assert complete_checkpoints(config.output_dir) == []
