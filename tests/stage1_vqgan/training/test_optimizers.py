"""The two optimizers: their settings, the end of the learning rate, and the norms of the gradients."""

import math

import pytest
import torch
from accelerate import Accelerator
from transformers import get_scheduler

from configs import ConfigError
from stage1_vqgan.training.step import VQGANTrainer
from tests.stage1_vqgan.training.test_step import make_config, make_images

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_minimum_learning_rate(kind):
    config = make_config(lr_scheduler_type=kind, min_lr_rate=0.1, warmup_steps=10, max_steps=50)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    kwargs = {"scheduler_specific_kwargs": {"min_lr_rate": 0.1}} if kind == "cosine" else {}
    name = "cosine_with_min_lr" if kind == "cosine" else "linear"
    reference = get_scheduler(name, optimizer, num_warmup_steps=10, num_training_steps=50, **kwargs)
    for step in range(50):
        (rate,) = reference.get_last_lr()
        if step >= 10:
            expected = rate if kind == "cosine" else 0.1 + 0.9 * rate
            assert config.learning_rate_factor(step) == pytest.approx(expected, abs=1e-12)
        optimizer.step()
        reference.step()
    with pytest.raises(ConfigError, match=r"min_lr_rate: received 0.1; lr_scheduler_type must be linear or cosine"):
        make_config(min_lr_rate=0.1)


def test_the_discriminator_has_an_optimizer_of_its_own():
    own = {"adam_beta1": 0.5, "adam_beta2": 0.8, "weight_decay": 0.2, "learning_rate": 3e-4}
    for changes in ({}, {f"discriminator.{name}": value for name, value in own.items()}):
        trainer = VQGANTrainer(make_config(weight_decay=0.1, **changes), Accelerator())
        trainer.set_learning_rate(0)
        found = [optimizer.param_groups[0] for optimizer in (trainer.optimizer, trainer.discriminator_optimizer)]
        settings = [(*group["betas"], group["weight_decay"], group["lr"]) for group in found]
        assert settings[0] == (0.9, 0.95, 0.1, 1e-3)
        assert settings[1] == (tuple(own.values()) if changes else settings[0])


class Norms(VQGANTrainer):
    """Computes the gradient norms before clipping from the gradients of every parameter."""

    def _clipped_norm(self, model, optimizer, step):
        name = "generator" if model is self.generator else "discriminator"
        gradients = [p.grad.double() for p in model.parameters() if p.grad is not None]
        self.norms[f"grad_norm/{name}"] = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
        found = super()._clipped_norm(model, optimizer, step)
        clipped = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None))
        self.norms[f"clipped/{name}"] = clipped
        return found


@pytest.mark.parametrize("clip", [0, 0.01])
def test_gradient_norms_are_logged(clip):
    changes = {"gradient_accumulation_steps": 2, "logging_steps": 2, "discriminator.max_grad_norm": clip and clip / 2}
    trainer = Norms(make_config(max_grad_norm=clip, **changes), Accelerator(gradient_accumulation_steps=2))
    trainer.norms = {}
    logged = []
    for micro in range(4):
        trainer.set_learning_rate(micro // 2)
        metrics = trainer.step(make_images(micro), micro)
        found = {name: value.item() for name, value in metrics.items() if name.startswith("grad_norm/")}
        logged.append(bool(found))
        expected = {name: norm for name, norm in trainer.norms.items() if name.startswith("grad_norm/")}
        assert not found or found == pytest.approx(expected, rel=1e-5)
    assert logged == [False, bool(clip), False, True]  # without clipping, in a step that is logged
    if clip:
        assert trainer.norms["clipped/generator"] == pytest.approx(0.01, rel=1e-3)
        assert trainer.norms["clipped/discriminator"] == pytest.approx(0.005, rel=1e-3)


def test_a_frozen_part_of_the_discriminator_stays_frozen():
    trainer = VQGANTrainer(make_config(), Accelerator())
    frozen = trainer.discriminator.main[0].requires_grad_(False)
    trainer.step(make_images(0), 0)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in trainer.discriminator.main[2].parameters())
