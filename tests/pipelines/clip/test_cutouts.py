"""The cut-outs that CLIP sees: each change against a direct one."""

import math

import pytest
import torch
import torch.nn.functional as F

from pipelines.clip.cutouts import crop, cutouts, moved, pooled, recoloured
from pipelines.clip.objective import Clamp, spherical_distance
from tests.devices import on_device

pytestmark = on_device


def images(count=2, height=12, width=16, seed=0):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def test_a_cut_out_depends_on_its_own_seed_step_and_number():
    pictures = images()
    both = cutouts(pictures, [3, 4], 7, 5, 8)
    assert both.shape == (10, 3, 8, 8)
    torch.testing.assert_close(cutouts(pictures[1:], [4], 7, 5, 8), both[5:])
    others = [cutouts(pictures[:1], [3], 8, 5, 8), cutouts(pictures[:1], [5], 7, 5, 8)]
    for other in (both[5:], *others, both[:5].roll(1, 0)):
        assert (both[:5] - other).abs().flatten(1).amax(1).min() > 0.01


def test_crops_lie_inside_and_have_differing_sizes():
    numbered = torch.arange(12 * 16.0).view(1, 12, 16).expand(3, -1, -1)
    draws = torch.rand(300, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    crops = [crop(numbered, 8, *draw) for draw in draws.tolist()]
    assert {tuple(part.shape[1:]) for part in crops} == {(side, side) for side in range(6, 13)}
    assert min(part.min() for part in crops) == 0 and max(part.max() for part in crops) == 12 * 16 - 1
    assert {tuple(crop(numbered, 4, *draw).shape[1:]) for draw in draws.tolist()} == {(s, s) for s in range(4, 13)}


def test_pooling_is_the_mean_of_average_and_maximum():
    (picture,) = images(1, 8, 8)
    blocks = picture.view(3, 4, 2, 4, 2).transpose(2, 3).flatten(3)
    torch.testing.assert_close(pooled(picture, 4), (blocks.mean(3) + blocks.amax(3)) / 2)


def test_flips_turns_and_shifts():
    pictures = images(5, 8, 8)
    flip = torch.tensor([False, True, False, False, True])
    angle = torch.tensor([0, 0, math.pi / 2, 0, 0])
    right, down = torch.tensor([0, 0, 0, 0.25, 0]), torch.tensor([0, 0, 0, 0, 0.125])
    result = moved(pictures, flip, angle, right, down)
    shifted = torch.cat([pictures[3][..., :1].expand(-1, -1, 2), pictures[3][..., :-2]], -1)
    lower = torch.cat([pictures[4][:, :1], pictures[4][:, :-1]], 1).flip(-1)
    expected = [pictures[0], pictures[1].flip(-1), pictures[2].rot90(1, (1, 2)), shifted, lower]
    torch.testing.assert_close(result, torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_colours_turn_about_gray():
    pictures = images(3)
    pictures[2] = pictures[2].mean(0)  # gray
    hue, saturation = torch.tensor([2 * math.pi / 3, 0, 1.0]), torch.tensor([1.0, 0, 3.0])
    expected = torch.stack([pictures[0].roll(1, 0), pictures[1].mean(0).expand(3, -1, -1), pictures[2]])
    torch.testing.assert_close(recoloured(pictures, hue, saturation), expected)


def test_distance_on_the_sphere():
    x, y = (F.normalize(each.flatten(1), dim=-1) for each in (images(4), images(4, seed=1) - 0.5))
    torch.testing.assert_close(spherical_distance(x, y), torch.acos((x * y).sum(-1)) ** 2 / 2)
    x = x.requires_grad_()
    assert spherical_distance(x, -x.detach()).sub(math.pi**2 / 2).abs().max() < 0.02
    spherical_distance(torch.cat([x, x]), torch.cat([x, -x]).detach()).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("value", "gradient", "passed"), [(0.5, 1, 1), (2, 1, 1), (2, -1, 0), (-1, -1, -1), (-1, 1, 0)]
)
def test_the_clamp_passes_gradients_that_lead_inside(value, gradient, passed):
    """A step goes against the gradient."""
    x = torch.tensor([float(value)], requires_grad=True)
    out = Clamp.apply(x)
    out.backward(torch.tensor([float(gradient)]))
    assert out.item() == min(max(value, 0), 1) and x.grad.item() == passed
