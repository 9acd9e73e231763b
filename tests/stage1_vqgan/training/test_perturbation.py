"""Wrong codes for the decoder, compared with a loop over images and positions."""

import copy

import pytest
import torch
from accelerate import Accelerator

from configs import ConfigError
from configs.randomness import uniform
from stage1_vqgan.quantizers import build_quantizer
from stage1_vqgan.training.config import PerturbationConfig
from stage1_vqgan.training.perturbation import LatentPerturbation
from stage1_vqgan.training.step import VQGANTrainer
from tests.devices import DEVICE
from tests.stage1_vqgan.training.test_step import make_config, make_images, spread_codebook

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")
SETTINGS = PerturbationConfig(image_share=0.6, code_share=0.7, neighbours=5)
SEEDS = list(range(10, 18))
KINDS = {
    "vq": (32, 4, {}),
    "l2": (32, 4, {"l2_normalize": True}),
    "ema": (32, 4, {}),
    "gumbel": (32, 4, {}),
    "fsq": (60, 3, {"levels": [5, 4, 3]}),
    "lfq": (16, 4, {}),
}


def perturbed(quantizer, latents, settings=SETTINGS, seeds=SEEDS):
    """The quantizer's output without and with wrong codes."""
    quantizer.prepare(0.5, seeds)
    plain = quantizer(latents)
    hook = LatentPerturbation(settings)
    handle = quantizer.register_forward_hook(hook)
    hook.prepare(seeds)
    quantizer.prepare(0.5, seeds)
    wrong = quantizer(latents)
    handle.remove()
    return plain, wrong


def by_loops(quantizer, codes, settings=SETTINGS, seeds=SEEDS):
    """The codes that the decoder gets."""
    entries = quantizer.entries(torch.arange(quantizer.num_embeddings)).double()
    found = codes.clone()
    for row, seed in zip(found.view(len(codes), -1), seeds, strict=True):
        of_image = uniform(torch.tensor(seed), torch.tensor(0)).item()
        for position, code in enumerate(row.tolist()):
            draws = [uniform(torch.tensor(seed), torch.tensor(k), torch.tensor(position)).item() for k in (1, 2)]
            if of_image < settings.image_share and draws[0] < settings.code_share:
                nearest = (entries - entries[code]).square().sum(1).argsort()
                row[position] = nearest[int(draws[1] * settings.neighbours)]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_decoder_gets_near_codes(kind):
    torch.manual_seed(0)
    codes, width, options = KINDS[kind]
    quantizer = build_quantizer("vq" if kind == "l2" else kind, codes, width, options)
    if kind in ("vq", "l2", "ema"):  # entries far apart, so that rounding does not change their order
        quantizer.move_entries(torch.arange(codes), torch.randn(codes, width))
    latents = torch.randn(len(SEEDS), width, 3, 4, requires_grad=True)
    plain, wrong = perturbed(quantizer, latents)
    assert torch.equal(plain.codes, wrong.codes) and plain.loss.item() == wrong.loss.item()
    if kind in ("fsq", "lfq"):  # many entries are equally near: compare the distances
        entries = quantizer.entries(torch.arange(codes))
        replaced = (wrong.quantized != plain.quantized).any(1)
        assert 0.2 < replaced.float().mean() < 0.6
        for position in replaced.nonzero():
            image, row, column = position.tolist()
            distances = (entries - plain.quantized[image, :, row, column]).square().sum(1)
            distance = (wrong.quantized - plain.quantized)[image, :, row, column].square().sum()
            assert distance <= distances.sort().values[SETTINGS.neighbours - 1] + 1e-5
        return
    expected = by_loops(quantizer, plain.codes)
    changed = (expected != plain.codes)[:, None]
    assert 0.2 < changed.float().mean() < 0.6
    found = torch.where(changed, quantizer.lookup(expected), plain.quantized)
    torch.testing.assert_close(wrong.quantized, found, atol=1e-6, rtol=1e-6)
    weights = torch.randn_like(latents)
    gradients = [torch.autograd.grad((out.quantized * weights).sum(), latents)[0] for out in (plain, wrong)]
    torch.testing.assert_close(gradients[0], gradients[1])  # passed on


def test_an_image_keeps_its_numbers_in_another_batch():
    torch.manual_seed(0)
    quantizer = build_quantizer("vq", 32, 4, {})
    quantizer.move_entries(torch.arange(32), torch.randn(32, 4))
    latents = torch.randn(len(SEEDS), 4, 3, 4)
    whole = perturbed(quantizer, latents)[1].quantized
    parts = [
        perturbed(quantizer, part, seeds=SEEDS[2 * n : 2 * n + 2])[1].quantized
        for n, part in enumerate(latents.split(2))
    ]
    assert torch.equal(whole, torch.cat(parts))


def test_more_neighbours_than_codes_are_all_codes():
    quantizer = build_quantizer("lfq", 4, 2, {})
    settings = PerturbationConfig(image_share=1, neighbours=100)
    _, wrong = perturbed(quantizer, torch.randn(8, 2, 6, 6), settings)
    assert len(wrong.quantized.permute(0, 2, 3, 1).reshape(-1, 2).unique(dim=0)) == 4


@pytest.mark.parametrize("quantizer", ["residual", "pyramid"])
def test_several_codes_for_a_position_are_refused_before_the_first_step(quantizer, tmp_path):
    changes = {"model.quantizer": quantizer, "perturbation.image_share": 1, "loss.adversarial_weight": 0}
    with pytest.raises(ConfigError, match=r"perturbation.image_share: received 1.0; .* has several codes"):
        VQGANTrainer(make_config(**changes), Accelerator())
    model = VQGANTrainer(make_config(**changes | {"perturbation.image_share": 0}), Accelerator()).model
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"perturbation.image_share"):
        VQGANTrainer(make_config(**{**changes, "model_name_or_path": str(tmp_path), "model": {}}), Accelerator())


@pytest.mark.parametrize("trainable", ["all", "decoder"])
def test_a_step_with_wrong_codes(trainable, tmp_path):
    """The losses are those of the wrong codes; the quantizer's own loss, the counters and evaluation are as without."""
    changes = {"perturbation.image_share": 1, "perturbation.neighbours": 4, "loss.adversarial_weight": 0}
    trainer = VQGANTrainer(make_config(**changes), Accelerator())
    images = make_images(1, batch=4)
    spread_codebook(trainer, images)
    if trainable == "decoder":  # post-training: every image keeps its codes
        trainer.model.save_pretrained(tmp_path)
        base = {"model_name_or_path": str(tmp_path), "trainable": "decoder", "model": {}}
        trainer = VQGANTrainer(make_config(**changes, **base), Accelerator())
    model = copy.deepcopy(trainer.model)
    model.quantize._forward_hooks.clear()
    out = model(images)
    settings = PerturbationConfig(image_share=1, neighbours=4)
    wrong = by_loops(copy.deepcopy(model.quantize).cpu(), out.codes.cpu(), settings, trainer.image_seeds(3, 4))
    assert 0.6 < (wrong != out.codes.cpu()).float().mean() < 0.9
    expected = (model.decode_codes(wrong.to(DEVICE)) - images).abs().mean()

    metrics = trainer.step(images, 3)
    assert metrics["loss/l1"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert metrics["loss/codebook"].item() == pytest.approx(out.codebook_loss.item(), rel=1e-5)
    assert torch.equal(trainer.monitor.logged, torch.bincount(out.codes.flatten(), minlength=16))
    assert torch.equal(trainer.average(images).reconstruction, trainer.average(images).reconstruction)
    trained = {
        name.partition(".")[0]
        for name, p in trainer.model.named_parameters()
        if not torch.equal(p, model.get_parameter(name))
    }
    decoder = {"post_quant_conv", "decoder"}
    assert trained == decoder if trainable == "decoder" else trained > decoder
