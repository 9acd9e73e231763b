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
    """The formula of google/lecam-gan, with TensorFlow's `assign_moving_average(…, zero_debias=True)`."""
    anchors, generator = LecamAnchors(DEVICE), torch.Generator().manual_seed(0)
    biased = [0.0, 0.0]
    for n in range(1, 1200):
        real, fake = torch.randn(2, 4, 1, 2, 2, generator=generator) / 3
        for side, logits in enumerate((real + 0.5, fake - 0.5)):
            biased[side] = 0.999 * biased[side] + 0.001 * logits.double().mean().item()
        anchors.observe(real + 0.5, fake - 0.5)
        anchors.update(lambda means: means)
        expected = [value / (1 - 0.999**n) for value in biased]
        assert anchors.means.tolist() == pytest.approx(expected, rel=1e-4)
    assert not anchors.means.requires_grad
    real, fake = 3 * real, 3 * fake
    on_real = [max(0, value - expected[1]) ** 2 for value in real.flatten().tolist()]
    on_fake = [max(0, expected[0] - value) ** 2 for value in fake.flatten().tolist()]
    assert min(on_real) == min(on_fake) == 0  # no penalty on logits on the other side of the average
    assert anchors.penalty(real, fake).item() == pytest.approx((sum(on_real) + sum(on_fake)) / 16, rel=1e-4)


def test_lecam_anchors_are_of_all_processes_and_micro_batches():
    anchors = LecamAnchors(DEVICE)
    for value in (1.0, 3.0):
        anchors.observe(torch.full((2, 1, 1, 1), value), torch.full((2, 1, 1, 1), -value))
        assert anchors.means.tolist() == [0, 0]
    anchors.update(lambda means: means + 0.5)
    assert anchors.means.tolist() == pytest.approx([2.5, -1.5]) and anchors.updates == 1
    anchors.update(lambda means: pytest.fail("nothing was observed"))
    assert anchors.updates == 1
