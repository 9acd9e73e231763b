"""Runs with terms of frozen networks: gradients against one graph, resuming, settings that are refused."""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from configs import ConfigError, check
from stage1_vqgan.networks.diffaug import augment
from stage1_vqgan.training.run import train
from stage1_vqgan.training.step import VQGANTrainer
from tests.devices import DEVICE
from tests.stage1_vqgan.training import test_resume as resume, test_step as steps

pytest.importorskip("timm")
pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")
NETWORK = "timm/test_resnet@32"
RANDOM = {
    f"{term}_{key}": value
    for term in ("features", "logits", "alignment")
    for key, value in (("network", NETWORK), ("network_weights", "random"))
}
LOSSES = {"perceptual_weight": 0, "features_weight": 0.8, "logits_weight": 0.5, "alignment_weight": 0.7, **RANDOM}
FEATURES = {"type": "features", "network": NETWORK, "network_weights": "random"}


def textbook(trainer, images, seeds):
    """Gradients of generator, projection and discriminator: one graph, λ by autograd, `total.backward()`."""
    loss, step = trainer.config.loss, copy.deepcopy
    model, alignment, discriminator = step(trainer.model), step(trainer.alignment), step(trainer.discriminator)
    network = trainer.generator_terms.losses["features"].network
    out = model(images)
    x, found, wanted = out.reconstruction, network(out.reconstruction), network(images)
    cosines = [F.cosine_similarity(a, b, dim=1).mean() for a, b in zip(found.features, wanted.features, strict=True)]
    terms = {
        "l1": (x - images).abs().mean(),
        "features": 1 - sum(cosines) / len(cosines),
        "logits": (found.logits - wanted.logits).square().mean(),
    }
    nll = sum(getattr(loss, f"{name}_weight") * term for name, term in terms.items())
    terms["alignment"] = alignment(out.quantized, images)
    terms["adversarial"] = -discriminator(augment(x, seeds, 2)).mean()
    last = model.decoder.conv_out.weight
    of_nll, of_adversarial = (
        torch.autograd.grad(term, last, retain_graph=True)[0] for term in (nll, terms["adversarial"])
    )
    weight = of_nll.norm() / (of_adversarial.norm() + 1e-4)
    total = nll + loss.codebook_weight * out.codebook_loss + loss.alignment_weight * terms["alignment"]
    (total + weight * loss.adversarial_weight * terms["adversarial"]).backward()
    discriminator.zero_grad()
    real, fake = discriminator(augment(images, seeds, 0)), discriminator(augment(x.detach(), seeds, 1))
    terms["discriminator"] = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    terms["discriminator"].backward()
    parts = {"generator": model, "alignment": alignment, "discriminator": discriminator}
    gradients = {key: {name: p.grad for name, p in part.named_parameters()} for key, part in parts.items()}
    return {name: term.item() for name, term in terms.items()}, gradients


@pytest.mark.parametrize(
    "discriminator",
    [
        FEATURES,
        pytest.param({"type": "stylegan", "base_channels": 4, "augmentation": True}, marks=pytest.mark.slow),
    ],
)
def test_the_step_is_the_textbooks(discriminator):
    loss = {**LOSSES, "l1_weight": 0.7, "codebook_weight": 0.6, "adversarial_weight": 0.3}
    trainer = VQGANTrainer(steps.make_config(loss=loss, discriminator=discriminator), Accelerator())
    images, gradients = steps.make_images(0), {}
    steps.spread_codebook(trainer, images)

    def record(model, optimizer, objective, step):
        trainer.accelerator.backward(objective)
        if model is trainer.generator:
            parts = {"generator": model, "alignment": trainer.alignment}
            gradients.update({k: {n: p.grad.clone() for n, p in part.named_parameters()} for k, part in parts.items()})
        else:
            gradients["discriminator"] = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        return {}

    trainer._update = record
    if discriminator is FEATURES:
        trainer.discriminator.eval()  # a power iteration would change the weights in every forward
    wanted_terms, wanted = textbook(trainer, images, trainer.image_seeds(0, 2))
    metrics = trainer.step(images, 0)
    for name, value in wanted_terms.items():
        assert metrics[f"loss/{name}"].item() == pytest.approx(value, rel=1e-4), name
    for part in wanted:
        steps.assert_gradients_close(gradients[part], wanted[part], rtol=1e-3)


@pytest.mark.slow
def test_the_projection_trains_with_the_generator():
    trainer = VQGANTrainer(steps.make_config(loss=LOSSES, discriminator=FEATURES), Accelerator())
    before = [parameter.clone() for parameter in trainer.alignment.parameters()]
    trainer.set_learning_rate(50)
    trainer.step(steps.make_images(0), 0)
    assert all(not torch.equal(a, b) for a, b in zip(before, trainer.alignment.parameters(), strict=True))
    frozen = [*trainer.generator_terms.losses["features"].parameters(), *trainer.discriminator.network.parameters()]
    assert frozen and not any(parameter.requires_grad or parameter.grad is not None for parameter in frozen)


def test_resuming_is_exact_with_every_network(tmp_path):
    changes = {"loss": {**LOSSES, "lecam_weight": 0.1, "adversarial_start_step": 2}, "discriminator": FEATURES}
    changes |= {"per_device_train_batch_size": 4, "data": {"dataset": "digits"}}
    train(resume.make_config(tmp_path / "straight", **changes))
    shutil.copytree(tmp_path / "straight", tmp_path / "again")
    resume.interrupt(tmp_path / "again", after=3)
    train(resume.make_config(tmp_path / "again", **changes))
    expected, found = resume.contents(tmp_path / "straight"), resume.contents(tmp_path / "again")
    assert [path for path in expected if not torch.equal(expected[path], found[path])] == []
    checkpoint = tmp_path / "straight" / "checkpoint-6"
    assert all(name.startswith("project.") for name in load_file(checkpoint / "alignment.safetensors"))
    assert all(name.startswith("heads.") for name in load_file(checkpoint / "discriminator.safetensors"))
    assert not any("project" in name for name in load_file(tmp_path / "straight" / "model.safetensors"))


def test_shift_tolerant_lpips_is_named_in_the_first_lines(capsys):
    pytest.importorskip("stlpips_pytorch")
    loss = {"perceptual_weight": 1, "lpips_backbone": "stlpips_alex", "adversarial_weight": 0}
    trainer = VQGANTrainer(steps.make_config(**{"loss": loss, "model.image_size": 32}), Accelerator())
    assert "loss/perceptual is shift-tolerant LPIPS (stlpips_alex); its values are not those" in capsys.readouterr().out
    metrics = trainer.step(steps.make_images(0, size=32), 0)
    assert 0.1 < metrics["loss/perceptual"] < 10


@pytest.mark.parametrize(
    "changes, key, words",
    [
        (
            {"loss.features_weight": 1, "loss.features_network": "resnet50"},
            "loss.features_network",
            "torchvision/<model>",
        ),
        ({"discriminator.type": "features", "discriminator.network": "dino"}, "discriminator.network", "timm/<model>"),
        ({"discriminator.type": "features", "loss.r1_weight": 1}, "discriminator.type", "differentiated twice"),
        ({"loss.perceptual_weight": 1, "loss.lpips_backbone": "stlpips_alex"}, "model.image_size", "21 pixels"),
        ({"trainable": "decoder", "loss.alignment_weight": 1}, "loss.alignment_weight", "frozen"),
        ({"discriminator.type": "styleGAN"}, "discriminator.type", "stylegan"),
    ],
)
def test_settings_that_are_refused(changes, key, words):
    with pytest.raises(ConfigError) as error:
        check(steps.make_config(**changes))
    assert any(problem.key == key and words in problem.message for problem in error.value.problems), error.value


@pytest.mark.parametrize("term", ["features", "logits", "alignment", "discriminator"])
def test_a_network_that_cannot_be_built_is_named_with_its_key(term):
    loss = {"perceptual_weight": 0, **RANDOM}
    discriminator, key = {}, f"loss.{term}_network"
    if term == "discriminator":
        discriminator, key = {"type": "features", "network": "timm/nix"}, "discriminator.network"
    else:
        loss |= {f"{term}_weight": 1, f"{term}_network": "timm/nix", "adversarial_weight": 0}
    with pytest.raises(ConfigError, match=rf"{key}: received 'timm/nix'; timm.list_models"):
        VQGANTrainer(steps.make_config(loss=loss, discriminator=discriminator), Accelerator())


def test_images_below_the_least_size_of_a_network_are_refused():
    loss = {**LOSSES, "features_network": "stlpips/alex"}
    with pytest.raises(ConfigError, match=r"features_network: .*'stlpips/alex'; it needs at least 21 pixels.* have 16"):
        VQGANTrainer(steps.make_config(loss=loss), Accelerator())


@pytest.mark.slow
def test_bf16_trains_with_every_network():
    config = steps.make_config(loss={**LOSSES, "lecam_weight": 0.1}, discriminator=FEATURES)
    images, metrics = steps.make_images(0), []
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(True)
        metrics.append(VQGANTrainer(config, Accelerator(mixed_precision=precision)).step(images, 0))
    for name in ("features", "logits", "alignment", "discriminator"):
        single, half = (found[f"loss/{name}"].item() for found in metrics)
        assert single != half and half == pytest.approx(single, rel=0.1), name


def test_penalties_work_with_stylegan():
    loss = {"perceptual_weight": 0, "r1_weight": 1.0, "gradient_penalty_weight": 1.0, "lecam_weight": 0.1}
    discriminator = {"type": "stylegan", "base_channels": 4, "augmentation": True}
    trainer = VQGANTrainer(steps.make_config(loss=loss, discriminator=discriminator), Accelerator())
    images = steps.make_images(0).to(DEVICE)
    metrics = trainer.step(images, 0)
    seen = images.clone().requires_grad_()
    # R1 is the gradient at the images themselves, through the augmentation.
    fresh = VQGANTrainer(trainer.config, trainer.accelerator).discriminator
    logits = fresh(augment(seen, trainer.image_seeds(0, 2), 0))
    (gradient,) = torch.autograd.grad(logits.sum(), seen)
    assert metrics["loss/r1"].item() == pytest.approx(0.5 * gradient.square().flatten(1).sum(1).mean().item(), rel=1e-3)
    assert metrics["loss/gradient_penalty"] > 0
