"""Differentiable augmentation against a plain version for one image at a time."""

import numpy as np
import pytest
import torch

from stage1_vqgan.networks.diffaug import augment, cut_out, recolour, shift

IMAGES = torch.rand(3, 3, 12, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
NUMBERS = torch.tensor([[0.01, 0.99, 0.3], [0.5, 0.5, 0.5], [0.99, 0.02, 0.9]], dtype=torch.float64)


def test_colours():
    for image, found, (brightness, saturation, contrast) in zip(
        IMAGES, recolour(IMAGES, NUMBERS), NUMBERS, strict=True
    ):
        x = image.numpy() + float(brightness) - 0.5
        x = (x - x.mean(0)) * 2 * float(saturation) + x.mean(0)
        x = (x - x.mean()) * (float(contrast) + 0.5) + x.mean()
        np.testing.assert_allclose(found.numpy(), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("down, right", [(0.0, 0.0), (0.5, 0.5), (0.999, 0.999), (0.1, 0.7)])
def test_shift(down, right):
    found = shift(IMAGES, torch.tensor([[down, right]] * 3))
    rows, columns = int(down * 5) - 2, int(right * 7) - 3  # at most 12/8 and 20/8, rounded: 2 and 3
    wanted = torch.zeros_like(IMAGES)
    for row in range(12):
        for column in range(20):
            if 0 <= row + rows < 12 and 0 <= column + columns < 20:
                wanted[:, :, row, column] = IMAGES[:, :, row + rows, column + columns]
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("down, right", [(0.0, 0.0), (0.5, 0.5), (0.999, 0.999)])
def test_cutout(down, right):
    found = cut_out(IMAGES, torch.tensor([[down, right]] * 3))
    top, left = int(down * 13) - 3, int(right * 21) - 5  # a rectangle of 6×10
    wanted = IMAGES.clone()
    wanted[:, :, max(top, 0) : max(top + 6, 0), max(left, 0) : max(left + 10, 0)] = 0
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_numbers_belong_to_an_image_and_to_a_draw():
    together = augment(IMAGES, [5, 6, 7])
    torch.testing.assert_close(together[1:2], augment(IMAGES[1:2], [6]))
    assert not torch.equal(together, augment(IMAGES, [5, 6, 7], draw=1))
    torch.testing.assert_close(augment(IMAGES, [5, 6, 7]), together, rtol=0, atol=0)


def test_the_whole_range_is_used_and_gradients_flow():
    seeds = list(range(300))
    ones = torch.ones(300, 1, 8, 8, requires_grad=True)
    found = augment(ones, seeds)
    kept = (found != 0).float().mean((1, 2, 3))
    assert 0.45 < kept.min() < 0.8 < kept.max() < 1  # a half of each side is cut, or less at the edge; shifts add to it
    brightness = found.amax((1, 2, 3))
    assert brightness.min() < 0.6 and brightness.max() > 1.4
    found.sum().backward()
    assert (ones.grad.abs().sum((1, 2, 3)) > 0).all()
