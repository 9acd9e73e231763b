"""One training step, compared with the textbook form: one graph, λ from autograd, `total.backward()`."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from transformers import get_scheduler

from configs import load_config
from configs.randomness import seed_from
from stage1_vqgan import Stage1Config
from stage1_vqgan.quantizer_base import latent_rows
from stage1_vqgan.training.codebook import initialise_codebook
from stage1_vqgan.training.losses import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES, weighted_sum
from stage1_vqgan.training.regularizers import interpolation_shares
from stage1_vqgan.training.step import VQGANTrainer
from tests.devices import DEVICE
from tests.slow import few

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")


def make_config(**changes):
    values = {
        "output_dir": "unused",
        "max_steps": 100,
        "learning_rate": 1e-3,
        "max_grad_norm": 0,
        "model": {
            "image_size": 16,
            "base_channels": 8,
            "channel_multiplier": [1, 2],
            "num_res_blocks": 1,
            "attn_resolutions": [16],
            "norm_num_groups": 4,
            "latent_channels": 8,
            "embed_dim": 4,
            "num_embeddings": 16,
        },
        "data": {"dataset": "digits"},
        "loss": {
            "l1_weight": 0.7,
            "l2_weight": 0.4,
            "perceptual_weight": 0,
            "lpips_backbone": "squeeze",
            "lpips_weights": "random",
            "codebook_weight": 0.6,
            "adversarial_weight": 0.3,
        },
        "discriminator": {"base_channels": 8, "num_layers": 1},
        "codebook": {"restart_interval": 0},
    }
    return load_config(Stage1Config, None, {**values, **changes})


def make_images(seed, batch=2, size=16):
    images = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return images.to(DEVICE)


def spread_codebook(trainer, images):
    """Moves the entries onto latents, so that the batch uses many codes."""
    with torch.no_grad():
        latents = trainer.model.encode(images).latents.permute(0, 2, 3, 1).flatten(0, 2)
        trainer.model.quantize.embedding.weight.copy_(latents[:: len(latents) // 16][:16] * 1.1)


class Recorder(VQGANTrainer):
    """Stores the gradients of an update instead of updating."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.gradients = {}

    def _update(self, model, optimizer, objective, step):
        name = "generator" if model is self.generator else "discriminator"
        if name == "generator" and self.discriminator is not None and self.config.gradient_accumulation_steps == 1:
            assert all(parameter.grad is None for parameter in self.discriminator.parameters())
        self.accelerator.backward(objective)
        if self.accelerator.sync_gradients:
            self.gradients[name] = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
            model.zero_grad()
        return {}


def textbook(trainer, images, step):
    """Loss terms and gradients by the formulas of the papers, on copies of the trainer's models."""
    loss, model = trainer.config.loss, copy.deepcopy(trainer.model)
    out = model(images)
    difference = out.reconstruction - images
    terms = {"l1": difference.abs().mean(), "l2": difference.square().mean(), "codebook": out.codebook_loss}
    nll = loss.l1_weight * terms["l1"] + loss.l2_weight * terms["l2"]
    if loss.perceptual_weight:
        three = [x.repeat(1, 3 // x.shape[1], 1, 1) for x in (out.reconstruction, images)]
        terms["perceptual"] = trainer.generator_terms.losses["perceptual"].lpips(*three).mean()
        nll = nll + loss.perceptual_weight * terms["perceptual"]
    total = nll + loss.codebook_weight * out.codebook_loss
    weight = None
    discriminator = copy.deepcopy(trainer.discriminator)
    if step >= loss.adversarial_start_step:
        discriminator.requires_grad_(False)
        terms["adversarial"] = GENERATOR_LOSSES[loss.generator_type or loss.adversarial_type](
            discriminator(out.reconstruction)
        )
        last = model.decoder.conv_out.weight
        (of_nll,) = torch.autograd.grad(nll, last, retain_graph=True)
        (of_adversarial,) = torch.autograd.grad(terms["adversarial"], last, retain_graph=True)
        weight = (of_nll.norm() / (of_adversarial.norm() + 1e-4)).clamp(0, 1e4)
        total = total + weight * loss.adversarial_weight * terms["adversarial"]
    total.backward()
    gradients = {"generator": {name: p.grad for name, p in model.named_parameters()}}
    if step >= loss.discriminator_start_step:
        discriminator.requires_grad_(True)
        logits = discriminator(images), discriminator(out.reconstruction.detach())
        terms["discriminator"] = DISCRIMINATOR_LOSSES[loss.adversarial_type](*logits)
        anchors = trainer.discriminator_terms.anchors.means.tolist()
        penalties = textbook_penalties(discriminator, images, out.reconstruction.detach(), logits, anchors, loss, step)
        (terms["discriminator"] + sum(getattr(loss, f"{name}_weight") * p for name, p in penalties.items())).backward()
        terms |= penalties
        gradients["discriminator"] = {name: p.grad for name, p in discriminator.named_parameters()}
    return {name: term.item() for name, term in terms.items()}, weight, gradients


def textbook_penalties(discriminator, real, fake, logits, anchors, loss, step):
    """The penalties of weight above 0, computed image by image."""

    def gradient(image):
        image = image.detach()[None].requires_grad_()
        return torch.autograd.grad(discriminator(image).mean(), image, create_graph=True)[0]

    penalties = {}
    if loss.gradient_penalty_weight:
        generators = [torch.Generator().manual_seed(seed_from(seed_from(0, step, n), 1)) for n in range(len(real))]
        shares = [torch.rand(1, generator=generator).to(DEVICE) for generator in generators]
        norms = [gradient(s * x + (1 - s) * y).norm() for s, x, y in zip(shares, real, fake, strict=True)]
        penalties["gradient_penalty"] = sum((norm - 1) ** 2 for norm in norms) / len(real)
    if loss.r1_weight:
        penalties["r1"] = sum(gradient(x).square().sum() for x in real) / len(real) / 2
    if loss.lecam_weight:
        above, below = F.relu(logits[0] - anchors[1]), F.relu(anchors[0] - logits[1])
        penalties["lecam"] = (above**2).mean() + (below**2).mean()
    return penalties


def assert_gradients_close(found, expected, rtol=1e-4, of_whole=1e-6):
    assert found.keys() == expected.keys()
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert whole > 0
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= rtol * gradient.norm() + of_whole * whole, name


@pytest.mark.parametrize(
    ("perceptual_weight", "step", "norm_type"),  # nothing adversarial until step 5; both train from step 10
    few(
        itertools.product([0, 1.3], [4, 7, 10], ["batch", "group"]),
        (0, 10, "batch"),
        (1.3, 4, "batch"),
        (1.3, 7, "batch"),
        (1.3, 10, "group"),
    ),
)
def test_step_is_the_textbooks(perceptual_weight, step, norm_type):
    size = 32 if perceptual_weight else 16
    config = make_config(
        **{
            "loss.perceptual_weight": perceptual_weight,
            "model.image_size": size,
            "discriminator.norm_type": norm_type,
            "loss.discriminator_start_step": 5,
            "loss.adversarial_start_step": 10,
        }
    )
    trainer = Recorder(config, Accelerator())
    images = make_images(1, size=size)
    spread_codebook(trainer, images)
    terms, weight, gradients = textbook(trainer, images, step)
    metrics = trainer.step(images, step)

    found = {name.removeprefix("loss/"): value.item() for name, value in metrics.items() if name.startswith("loss/")}
    assert found == pytest.approx(terms, rel=1e-5)
    assert trainer.gradients.keys() == gradients.keys()
    for name, expected in gradients.items():
        assert_gradients_close(trainer.gradients[name], expected)
    if step < 10:
        assert "adversarial/adaptive_weight" not in metrics
    else:
        assert 0 < weight.item() < 1e4
        assert metrics["adversarial/adaptive_weight"].item() == pytest.approx(weight.item(), rel=1e-4)


def test_a_step_with_gradient_checkpointing_is_the_same():
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        trainer = Recorder(make_config(gradient_checkpointing=checkpointing), Accelerator())
        assert trainer.model.is_gradient_checkpointing == checkpointing
        spread_codebook(trainer, make_images(1))
        metrics = trainer.step(make_images(1), 0)
        found.append((metrics, trainer.gradients["generator"] | trainer.gradients["discriminator"]))
    for plain, checkpointed in zip(*found, strict=True):
        assert plain.keys() == checkpointed.keys()
        assert all(torch.equal(value, checkpointed[name]) for name, value in plain.items())


@pytest.mark.parametrize(
    ("kind", "norm_type", "weights"),
    [
        ("hinge", "group", {"gradient_penalty": 0.9, "r1": 0.7, "lecam": 0.3}),
        ("vanilla", "batch", {"lecam": 0.3}),
        ("non_saturating", "actnorm", {"r1": 7.0}),
        ("wasserstein", "actnorm", {"gradient_penalty": 10.0}),
    ],
)
def test_every_game_and_every_penalty_are_the_textbooks(kind, norm_type, weights):
    changes = {f"loss.{name}_weight": weight for name, weight in weights.items()}
    changes |= {"loss.adversarial_type": kind, "discriminator.norm_type": norm_type}
    trainer = Recorder(make_config(**changes), Accelerator())
    images = make_images(1, batch=3)
    spread_codebook(trainer, images)
    with torch.no_grad():
        trainer.discriminator.main[-1].weight.mul_(30)  # makes the logits large
        trainer.discriminator_terms.anchors.means.copy_(torch.tensor([0.4, -0.2]))
    terms, _, gradients = textbook(trainer, images, 10)
    metrics = trainer.step(images, 10)
    found = {name.removeprefix("loss/"): value.item() for name, value in metrics.items() if name.startswith("loss/")}
    assert found == pytest.approx(terms, rel=1e-4) and found.keys() > weights.keys()
    for name, expected in gradients.items():
        assert_gradients_close(trainer.gradients[name], expected)


def test_every_image_of_every_forward_has_a_draw_of_its_own():
    trainer = VQGANTrainer(make_config(), Accelerator())
    draws = [interpolation_shares(trainer.image_seeds(number, 400), DEVICE) for number in (0, 1, 0)]
    assert torch.equal(draws[0], draws[2]) and len(torch.cat(draws[:2]).unique()) > 795
    assert torch.stack(draws).mean().item() == pytest.approx(0.5, abs=0.05)
    assert torch.stack(draws).std().item() == pytest.approx(12**-0.5, abs=0.02)


def test_gray_images_and_the_memory_format_change_nothing():
    images = make_images(2, size=32)[:, :1]
    for channels_last in (True, False):
        changes = {"model.image_size": 32, "model.in_channels": 1, "loss.perceptual_weight": 1}
        trainer = Recorder(make_config(channels_last=channels_last, **changes), Accelerator())
        spread_codebook(trainer, images)
        _, _, gradients = textbook(trainer, images, 0)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        trainer.step(images.contiguous(memory_format=memory_format), 0)
        for name, expected in gradients.items():
            assert_gradients_close(trainer.gradients[name], expected)


def test_bf16_points_the_same_way():
    images, found = make_images(1), {}
    penalties = {f"loss.{name}_weight": 1.0 for name in ("gradient_penalty", "r1", "lecam")}
    for precision in (None, "bf16"):
        config = make_config(**penalties, **{"discriminator.norm_type": "group"})
        trainer = Recorder(config, Accelerator(mixed_precision=precision))
        spread_codebook(trainer, images)
        metrics = trainer.step(images, 0)
        assert all(torch.isfinite(value) for value in metrics.values())
        found[precision] = trainer.gradients
        AcceleratorState._reset_state(True)
    for name in ("generator", "discriminator"):
        a, b = (torch.cat([g.flatten() for g in found[precision][name].values()]) for precision in (None, "bf16"))
        assert b.dtype == torch.float32 and not torch.equal(a, b)
        assert F.cosine_similarity(a, b, dim=0) > 0.95


def snapshot(module):
    return [parameter.detach().clone() for parameter in module.parameters()]


def changed(module, before):
    return any(not torch.equal(a, b) for a, b in zip(module.parameters(), before, strict=True))


def test_accumulation_updates_on_the_last_micro_step_alone():
    config = make_config(gradient_accumulation_steps=2)
    trainer = VQGANTrainer(config, Accelerator(gradient_accumulation_steps=2))
    models = trainer.generator, trainer.discriminator, trainer.average
    before = [snapshot(model) for model in models]
    for micro, moves in enumerate([False, True, False, True]):
        trainer.set_learning_rate(micro // 2)
        trainer.step(make_images(micro), micro)
        assert [changed(*pair) for pair in zip(models, before, strict=True)] == [moves] * 3
        before = [snapshot(model) for model in models]


def test_accumulated_gradients_are_those_of_the_large_batch():
    """Has no adversarial term, whose weight depends on the micro-batch, and no batch norm in the discriminator."""
    changes = {"loss.adversarial_start_step": 9, "discriminator.norm_type": "group"}
    images, found = make_images(3, batch=4), []
    for accumulation in (1, 2):
        accelerator = Accelerator(gradient_accumulation_steps=accumulation)
        trainer = Recorder(make_config(gradient_accumulation_steps=accumulation, **changes), accelerator)
        spread_codebook(trainer, images)
        for part in images.chunk(accumulation):
            trainer.step(part, 0)
        found.append(trainer.gradients)
        GradientState._reset_state()
    for name in ("generator", "discriminator"):
        assert_gradients_close(found[1][name], found[0][name])


def test_clipping_bounds_the_whole_gradient():
    trainer = VQGANTrainer(make_config(max_grad_norm=0.01, **{"loss.adversarial_weight": 0}), Accelerator())
    trainer.optimizer = trainer.accelerator.prepare(torch.optim.SGD(trainer.generator.parameters(), lr=1.0))
    before = snapshot(trainer.generator)
    trainer.step(make_images(0), 0)
    moved = [(a - b).norm() for a, b in zip(trainer.generator.parameters(), before, strict=True)]
    assert torch.stack(moved).norm().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("kind", ["constant_with_warmup", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 10])
def test_schedule_is_transformers_after_a_warm_up_that_starts_above_zero(kind, warmup):
    config = make_config(lr_scheduler_type=kind, warmup_steps=warmup, max_steps=50)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    reference = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=50)
    for step in range(50):
        if step < warmup:
            assert config.learning_rate_factor(step) == (step + 1) / warmup
        else:
            assert config.learning_rate_factor(step) == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("own_rate, ratio", [(None, 1.0), (5e-3, 5.0)])
def test_both_optimizers_follow_the_schedule(own_rate, ratio):
    config = make_config(lr_scheduler_type="linear", **{"discriminator.learning_rate": own_rate})
    trainer = VQGANTrainer(config, Accelerator())
    for step, rate in [(0, 1e-3), (25, 7.5e-4), (99, 1e-5)]:
        assert trainer.set_learning_rate(step) == pytest.approx(rate)
        assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([rate])
        rates = [group["lr"] for group in trainer.discriminator_optimizer.param_groups]
        assert rates == pytest.approx([ratio * rate])


@pytest.mark.parametrize("decay", few([0.0, 0.35, 0.999], 0.0, 0.35))
def test_moving_average(decay):
    trainer = VQGANTrainer(make_config(ema_decay=decay), Accelerator())
    trainer.set_learning_rate(0)
    average = snapshot(trainer.model)
    for n in range(5):
        trainer.step(make_images(n), n)
        weights = snapshot(trainer.model)
        d = min(decay, (1 + n) / (10 + n))
        average = [d * a + (1 - d) * w for a, w in zip(average, weights, strict=True)]
    for found, expected, current in zip(trainer.average.parameters(), average, weights, strict=True):
        torch.testing.assert_close(found, expected)
        assert decay or torch.equal(found, current)
    assert not trainer.average.training and trainer.model.training


def test_kmeans_initialises_both_codebooks():
    trainer = VQGANTrainer(make_config(), Accelerator())
    batches = [make_images(seed, batch=4) for seed in range(2)]
    images = torch.cat(batches)
    error = trainer.model.encode(images).codebook_loss.item()
    initialise_codebook(trainer.model, trainer.average, batches, trainer.accelerator, seed=0)
    out = trainer.model.encode(images)
    assert out.codebook_loss.item() < 0.5 * error and len(out.codes.unique()) >= 15
    assert torch.equal(trainer.average.quantize.embedding.weight, trainer.model.quantize.embedding.weight)


def test_dead_codes_restart_at_the_interval():
    trainer = VQGANTrainer(make_config(**{"codebook.restart_interval": 2}), Accelerator())
    trainer.set_learning_rate(0)
    weight, images = trainer.model.quantize.embedding.weight, make_images(0)
    with torch.no_grad():
        weight[1:] = 100.0  # far from all latents
    assert "codebook/restarted" not in trainer.step(images, 0)
    assert weight[1:].min() > 99
    metrics = trainer.step(images, 1)
    assert metrics["codebook/restarted"].item() == 15 and weight.abs().max() < 50
    assert trainer.codebook_statistics()["codebook/usage"] == 1 / 16
    trainer.step(images, 2)
    assert trainer.codebook_statistics()["codebook/usage"] > 4 / 16


def test_restarted_codes_come_from_all_batches_of_the_step():
    accelerator = Accelerator(gradient_accumulation_steps=4)
    changes = {"gradient_accumulation_steps": 4, "codebook.restart_interval": 1, "learning_rate": 1e-12}
    trainer = VQGANTrainer(make_config(**changes), accelerator)
    trainer.set_learning_rate(0)
    weight = trainer.model.quantize.embedding.weight
    with torch.no_grad():
        weight[1:] = 100.0  # far from all latents
    batches = [make_images(seed) for seed in range(4)]
    for micro_step, images in enumerate(batches):
        metrics = trainer.step(images, micro_step)
    assert metrics["codebook/restarted"].item() == 15
    latents = [latent_rows(trainer.model.encode(images).latents) for images in batches]
    owners = [(weight[1:, None] - rows).abs().amax(2).amin(1) < 1e-5 for rows in latents]
    assert torch.stack(owners).sum(0).eq(1).all() and all(owner.any() for owner in owners)


def test_terms_of_weight_0_are_not_built():
    trainer = VQGANTrainer(make_config(**{"loss.adversarial_weight": 0}), Accelerator())
    assert trainer.discriminator is None and trainer.generator_terms.losses.keys() == {"l1", "l2"}
    metrics = trainer.step(make_images(0), 0)
    assert metrics.keys() == {"loss/l1", "loss/l2", "loss/codebook"}
    trainer = VQGANTrainer(make_config(**{"loss.l1_weight": 0}), Accelerator())
    names = {name for name in trainer.step(make_images(0), 0) if name.startswith("loss/")}
    assert names == {f"loss/{name}" for name in ("l2", "codebook", "adversarial", "discriminator")}
    assert trainer.discriminator_terms.anchors.updates == 0


def test_a_term_without_a_weight_is_an_error():
    with pytest.raises(KeyError, match="l3"):
        weighted_sum({"l1": torch.ones(()), "l3": torch.ones(())}, make_config().loss.weights(0))


def test_training_reconstructs_better():
    trainer = VQGANTrainer(make_config(), Accelerator())
    images = F.interpolate(make_images(0, batch=4, size=4), 16)
    losses = []
    for step in range(30):
        trainer.set_learning_rate(step)
        losses.append(trainer.step(images, step)["loss/l1"].item())
    assert all(math.isfinite(value) for value in losses) and losses[-1] < 0.8 * losses[0]
