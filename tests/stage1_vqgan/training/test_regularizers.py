"""Penalties on the discriminator, compared with finite differences and loops over images."""

import pytest
import torch

from stage1_vqgan.training.discriminator import PatchDiscriminator
from stage1_vqgan.training.regularizers import LecamAnchors, gradient_penalty, r1_penalty
from tests.devices import DEVICE, on_device

pytestmark = on_device


@pytest.fixture
def discriminator():
    torch.manual_seed(0)
    found = PatchDiscriminator(2, 8, 1, "group").double()
    with torch.no_grad():
        found.main[-1].weight.mul_(12)  # gradient norms around 1, the minimum of the penalty
    return found


@pytest.fixture
def images():
    return torch.randn(2, 3, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradient_norm(discriminator, image):
    """The gradient of the mean logit at one image, by finite differences of each pixel."""
    step, total = 1e-5, 0.0
    with torch.no_grad():
        for pixel in range(image.numel()):
            moved = torch.zeros(image.numel(), dtype=image.dtype)
            moved[pixel] = step
            values = [discriminator((image + way * moved.view_as(image))[None]).mean().item() for way in (1, -1)]
            total += ((values[0] - values[1]) / (2 * step)) ** 2
    return total**0.5


def test_gradient_penalty_by_finite_differences(discriminator, images):
    real, fake = images
    share = torch.tensor([0.0, 0.3, 0.9], dtype=torch.float64)
    norms = [
        gradient_norm(discriminator, s * x + (1 - s) * y) for s, x, y in zip(share.tolist(), real, fake, strict=True)
    ]
    assert min(norms) < 1 < max(norms)
    expected = sum((norm - 1) ** 2 for norm in norms) / 3
    assert gradient_penalty(discriminator, real, fake, share).item() == pytest.approx(expected, rel=1e-6)


def test_r1_penalty_by_finite_differences(discriminator, images):
    real = images[0].requires_grad_()
    expected = sum(gradient_norm(discriminator, image.detach()) ** 2 for image in real) / 3 / 2
    assert r1_penalty(discriminator(real), real).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["gradient penalty", "r1"])
def test_penalties_reach_the_parameters(discriminator, images, kind):
    """The gradient of the penalties, compared with finite differences along one direction."""
    real, fake = images[0].requires_grad_(), images[1]
    share = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)

    def penalty():
        if kind == "r1":
            return r1_penalty(discriminator(real), real)
        return gradient_penalty(discriminator, real.detach(), fake, share)

    weight = discriminator.main[0].weight
    direction = torch.randn(weight.shape, dtype=weight.dtype, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad(penalty(), weight)
    values = []
    for way in (1e-6, -1e-6):
        weight.data.add_(direction, alpha=way)
        values.append(penalty().item())
        weight.data.sub_(direction, alpha=way)
    assert (gradient * direction).sum().item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4)


def test_lecam_by_loops():
    anchors, generator = LecamAnchors(DEVICE), torch.Generator().manual_seed(0)
    history = []
    for _ in range(150):
        real, fake = torch.randn(2, 4, 1, 2, 2, generator=generator)
        history.append((real.mean().item() + 1, fake.mean().item() - 1))
        anchors.update(real + 1, fake - 1, lambda means: means)
    expected = [0.0, 0.0]
    for n, pair in enumerate(history):
        keep = min(0.99, n / (n + 1))
        expected = [keep * old + (1 - keep) * new for old, new in zip(expected, pair, strict=True)]
    assert anchors.means.tolist() == pytest.approx(expected, rel=1e-4) and not anchors.means.requires_grad
    on_real = [(value - expected[1]) ** 2 for value in real.flatten().tolist()]
    on_fake = [(value - expected[0]) ** 2 for value in fake.flatten().tolist()]
    assert anchors.penalty(real, fake).item() == pytest.approx((sum(on_real) + sum(on_fake)) / 16, rel=1e-4)


def test_lecam_anchors_are_of_all_processes():
    anchors = LecamAnchors(DEVICE)
    anchors.update(torch.ones(2, 1, 1, 1), torch.zeros(2, 1, 1, 1), lambda means: means + 0.5)
    assert anchors.means.tolist() == [1.5, 0.5]
