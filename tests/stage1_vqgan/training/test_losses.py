"""The terms of the objective, compared with formulas, torchvision, autograd and stored results of the original."""

import math
import urllib.error
from typing import get_args

import pytest
import torch
import torchvision
from torch import nn

from stage1_vqgan.training.components import RECONSTRUCTION_LOSSES
from stage1_vqgan.training.loss_config import LPIPS_MIN_SIZE, AdversarialType
from stage1_vqgan.training.losses import (
    DISCRIMINATOR_LOSSES,
    GENERATOR_LOSSES,
    PerceptualLoss,
    adaptive_weight,
    last_layer_gradients,
)
from tests.devices import DEVICE, on_device
from tests.golden import GOLDEN
from tests.golden_losses import compare

pytestmark = on_device

SQUEEZE_FILE = "squeezenet1_1-b8a52dc0.pth"


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


# type → losses of one logit: generator, discriminator on an image, discriminator on a reconstruction
GAMES = {
    "hinge": (lambda f: -f, lambda r: max(0.0, 1 - r) / 2, lambda f: max(0.0, 1 + f) / 2),
    "vanilla": (lambda f: -f, lambda r: -log_sigmoid(r) / 2, lambda f: -log_sigmoid(-f) / 2),
    "non_saturating": (lambda f: -log_sigmoid(f), lambda r: -log_sigmoid(r) / 2, lambda f: -log_sigmoid(-f) / 2),
    "wasserstein": (lambda f: -f, lambda r: -r, lambda f: f),
}


@pytest.mark.parametrize("kind", GAMES)
def test_adversarial_losses_by_loops(kind):
    real, fake = torch.randn(2, 2, 1, 3, 3, generator=torch.Generator().manual_seed(0)).mul(2)
    assert min(1 - real.max(), 1 + fake.min()) < 0 < max(1 - real.min(), 1 + fake.max())  # both branches of hinge
    of_fake, on_real, on_fake = (
        math.fsum(map(loss, x.flatten().tolist())) / 18 for loss, x in zip(GAMES[kind], (fake, real, fake), strict=True)
    )
    assert GENERATOR_LOSSES[kind](fake).item() == pytest.approx(of_fake, rel=1e-5)
    assert DISCRIMINATOR_LOSSES[kind](real, fake).item() == pytest.approx(on_real + on_fake, rel=1e-5)


def test_every_game_can_be_chosen():
    assert set(get_args(AdversarialType)) == set(GENERATOR_LOSSES) == set(DISCRIMINATOR_LOSSES) == set(GAMES)


def test_pixel_losses_by_loops():
    a, b = torch.randn(2, 2, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    differences = [x - y for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)]
    pixel = {name: RECONSTRUCTION_LOSSES[name](None, 1, None) for name in ("l1", "l2")}
    assert pixel["l1"](a, b).item() == pytest.approx(sum(map(abs, differences)) / 18, rel=1e-5)
    assert pixel["l2"](a, b).item() == pytest.approx(sum(d * d for d in differences) / 18, rel=1e-5)


@pytest.mark.parametrize("out_channels", [1, 3])
def test_last_layer_gradients_are_autograds(out_channels):
    torch.manual_seed(0)
    layer = nn.Conv2d(5, out_channels, 3, padding=1)
    features, target = torch.randn(2, 5, 6, 7), torch.randn(2, out_channels, 6, 7)
    output = layer(features)
    losses = ((output - target) ** 4).mean(), output.exp().sum()
    by_weight, by_output = zip(
        *(torch.autograd.grad(loss, (layer.weight, output), retain_graph=True) for loss in losses), strict=True
    )
    found = last_layer_gradients(features.requires_grad_(), layer, by_output)
    assert not found.requires_grad
    torch.testing.assert_close(found, torch.stack(by_weight))
    mixed = last_layer_gradients(features.bfloat16(), layer, [1e-7 * gradient for gradient in by_output])
    assert mixed.dtype == torch.float32
    for gradient, expected in zip(mixed, by_weight, strict=True):
        assert gradient.norm().item() == pytest.approx(1e-7 * expected.norm().item(), rel=5e-3)


def test_adaptive_weight():
    a, b = torch.full((3, 3), 2.0), torch.full((3, 3), 0.5)
    assert adaptive_weight(a, b).item() == pytest.approx(6 / (1.5 + 1e-4))
    assert adaptive_weight(a, torch.zeros(3, 3)).item() == 1e4  # 6 / 1e-4, clamped
    assert adaptive_weight(torch.zeros(3, 3), b).item() == 0


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"{GOLDEN} is not there")
def test_the_originals_numbers():
    """Hinge and vanilla, before and after the start, with and without a perceptual term; PatchGAN; ActNorm."""
    founds = list(compare())
    assert len({found.case for found in founds if found.quantity == "total_loss"}) == 12
    assert len({found.quantity for found in founds}) == 20
    assert [found for found in founds if not found.error <= found.bound] == []


@pytest.fixture(scope="module")
def perceptual():
    torch.manual_seed(0)
    return PerceptualLoss("squeeze", "random").to(DEVICE)


@pytest.fixture(scope="module")
def perceptual_by_alex():
    torch.manual_seed(0)
    return PerceptualLoss("alex", "random").to(DEVICE)


def test_perceptual_loss_is_frozen_and_stays_in_evaluation_mode(perceptual):
    assert all(not parameter.requires_grad for parameter in perceptual.parameters())
    nn.Sequential(perceptual).train()
    assert not any(module.training for module in perceptual.modules())
    a, b = torch.rand(2, 2, 3, 32, 32)
    assert perceptual(a, b).item() == perceptual(a, b).item() > 0
    assert perceptual(a, a).item() == 0


def test_perceptual_loss_is_the_papers_distance(perceptual):
    a, b = torch.rand(2, 2, 3, 40, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    features = [perceptual.lpips.net((x - shift) / scale) for x in (a, b)]
    expected = torch.zeros(2)
    for fa, fb, linear in zip(*features, perceptual.lpips.lins, strict=True):
        units = [f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in (fa, fb)]
        weight = linear.model[-1].weight
        expected += ((units[0] - units[1]).square() * weight).sum(1).mean((1, 2))
    torch.testing.assert_close(perceptual(a, b), expected.mean(), rtol=1e-3, atol=1e-7)


def test_perceptual_loss_repeats_gray(perceptual):
    a, b = torch.rand(2, 2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(perceptual(a, b), perceptual(a.repeat(1, 3, 1, 1), b.repeat(1, 3, 1, 1)))


def test_perceptual_loss_of_other_channels(perceptual):
    """RGBA is compared by its colours, as are the first three of more channels; gray with alpha by its gray."""
    a, b = (
        torch.rand(2, 2, 6, 32, 32, generator=torch.Generator().manual_seed(0), device="cpu").mul(2).sub(1).to(DEVICE)
    )
    assert torch.equal(perceptual(a, b), perceptual(a[:, :3], b[:, :3]))
    assert torch.equal(perceptual(a[:, :2], b[:, :2]), perceptual(a[:, :1], b[:, :1]))


def perceptual_and_gradient(loss, mixed):
    images, noise = (torch.rand(2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1).to(DEVICE)
    x = (images + 0.1 * noise).requires_grad_()
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=mixed):
        value = loss(x, images)
    assert value.dtype == torch.float32
    return value.item(), torch.autograd.grad(value, x)[0].flatten()


def test_perceptual_loss_in_bf16_pulls_the_same_way(perceptual_by_alex):
    (value, gradient), (mixed, by_mixed) = (perceptual_and_gradient(perceptual_by_alex, on) for on in (False, True))
    # The images differ by a tenth. Rounding features by 2^-9 changes such differences by 2%, and their squares by 4%.
    assert mixed != value and mixed == pytest.approx(value, rel=0.04)
    assert by_mixed.norm().item() == pytest.approx(gradient.norm().item(), rel=0.02)
    assert nn.functional.cosine_similarity(gradient, by_mixed, dim=0) > 0.98


def test_perceptual_loss_by_squeeze_stays_in_float32(perceptual):
    (value, gradient), (mixed, by_mixed) = (perceptual_and_gradient(perceptual, on) for on in (False, True))
    assert mixed == pytest.approx(value, rel=1e-5)
    torch.testing.assert_close(by_mixed, gradient, rtol=1e-4, atol=1e-6 * gradient.abs().max().item())


@pytest.mark.parametrize("backbone", ["squeeze", "alex"])
def test_smallest_image(backbone, perceptual, perceptual_by_alex):
    loss = perceptual if backbone == "squeeze" else perceptual_by_alex
    size = LPIPS_MIN_SIZE[backbone]
    value = loss(torch.rand(1, 3, size, size), torch.rand(1, 3, size, size))
    assert torch.isfinite(value) and value > 0


@pytest.fixture(scope="module")
def torchvision_squeezenet():
    torch.manual_seed(1)
    return torchvision.models.squeezenet1_1(weights=None).eval().to(DEVICE)


def assert_features_equal(loss, model):
    x = images = torch.rand(1, 3, 48, 48)
    expected = []
    for index, layer in enumerate(model.features):
        x = layer(x)
        if index in (1, 4, 7, 9, 10, 11, 12):  # the seven outputs LPIPS compares
            expected.append(x)
    for found, feature in zip(loss.lpips.net(images), expected, strict=True):
        assert torch.equal(found, feature)


def test_weights_from_a_local_file(torchvision_squeezenet, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(torchvision_squeezenet.state_dict(), path)
    assert_features_equal(PerceptualLoss("squeeze", str(path)), torchvision_squeezenet)


def test_file_of_another_backbone(torchvision_squeezenet, tmp_path):
    path = tmp_path / "other.pth"
    torch.save(torchvision.models.shufflenet_v2_x0_5(weights=None).state_dict(), path)
    with pytest.raises(ValueError, match=r"other\.pth"):
        PerceptualLoss("squeeze", str(path))
    state = torchvision_squeezenet.state_dict()
    state["features.3.squeeze.weight"] = state["features.3.squeeze.weight"][:3]
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"squeeze\.weight"):
        PerceptualLoss("squeeze", str(path))


@pytest.mark.parametrize("content", [b"no weights", b""])
def test_file_without_weights(tmp_path, content):
    path = tmp_path / "junk.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="holds no state dict"):
        PerceptualLoss("squeeze", str(path))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"nowhere\.pth.*{SQUEEZE_FILE}"):
        PerceptualLoss("squeeze", str(tmp_path / "nowhere.pth"))


def test_pretrained_without_network_and_the_advice_that_is_given(torchvision_squeezenet, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with monkeypatch.context() as patch:
        patch.setattr(torch.hub, "load_state_dict_from_url", offline)
        with pytest.raises(FileNotFoundError) as caught:
            PerceptualLoss("squeeze", "pretrained")
    place = tmp_path / "hub" / "checkpoints" / SQUEEZE_FILE
    assert str(place) in str(caught.value) and "no network" in str(caught.value)

    torch.save(torchvision_squeezenet.state_dict(), place)
    assert_features_equal(PerceptualLoss("squeeze", "pretrained"), torchvision_squeezenet)
