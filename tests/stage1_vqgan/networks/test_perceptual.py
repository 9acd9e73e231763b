"""Distances in features: values and gradients against formulas written out, and real networks that tell noise."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from stage1_vqgan.networks import load_network
from stage1_vqgan.networks.alignment import Alignment
from stage1_vqgan.networks.perceptual import FeatureDistance, LogitDistance, ShiftTolerantLPIPS


def images(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


WANTED = images(2, 3, 32, 32)


def gradient(distance, *others):
    found = (WANTED + 0.2 * images(2, 3, 32, 32, seed=1)).requires_grad_()
    value = distance(found, *others)
    return value.detach(), torch.autograd.grad(value, found)[0]


def naive_feature_distance(network, found, wanted):
    maps = [
        torch.stack([1 - sum(p * q) / (p.norm() * q.norm()) for p, q in zip(rows(a), rows(b), strict=True)]).mean()
        for a, b in zip(network(found).features, network(wanted).features, strict=True)
    ]
    return sum(maps) / len(maps)


def rows(features):
    return features.movedim(1, -1).flatten(0, -2)


@pytest.fixture(scope="module")
def resnet():
    pytest.importorskip("timm")
    return load_network("timm/test_resnet@32", "random")


def test_feature_distance(resnet):
    found = gradient(FeatureDistance(resnet), WANTED)
    wanted = gradient(lambda images: naive_feature_distance(resnet, images, WANTED))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)
    assert FeatureDistance(resnet)(WANTED, WANTED).abs() < 1e-6 < found[0]


def test_logit_distance(resnet):
    """MaskBit's and TiTok's formula: the mean of the squared differences of logits."""
    found = gradient(LogitDistance(resnet), WANTED)
    wanted = gradient(lambda images: ((resnet(images).logits - resnet(WANTED).logits) ** 2).sum() / (2 * 1000))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-8)
    assert (found[1].abs().amax((1, 2, 3)) > 0).all()
    with pytest.raises(ValueError, match="'stlpips/alex', which has no logits"):
        LogitDistance(load_network("stlpips/alex", "random"))


@pytest.mark.parametrize("backbone", ["alex", pytest.param("vgg", marks=pytest.mark.slow)])
def test_shift_tolerant_lpips_equals_the_packages(backbone, monkeypatch):
    pytest.importorskip("stlpips_pytorch")
    for name in ("IPython", "torchsummary"):  # imported by the package without need
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(embed=None, summary=None))
    from stlpips_pytorch.stlpips import LPIPS

    reference = LPIPS(net=backbone, variant="shift_tolerant", verbose=False)
    found, wanted = gradient(ShiftTolerantLPIPS(backbone), WANTED), gradient(lambda x: reference(x, WANTED).mean())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_shift_tolerant_lpips_orders_distortions():
    """Trained features: a photo's blur costs more than its shift by a pixel, although that moves more energy."""
    pytest.importorskip("stlpips_pytorch")
    from sklearn.datasets import load_sample_image

    photo = (
        torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None, :, 100:228, 200:328] / 127.5 - 1
    )
    distance = ShiftTolerantLPIPS("alex")
    blurred = F.interpolate(F.avg_pool2d(photo, 4), scale_factor=4, mode="bilinear")
    noise = photo + 0.2 * torch.randn(photo.shape, generator=torch.Generator().manual_seed(0))
    shifted = photo.roll(1, 3)
    same, small, large, other = (distance(other, photo).item() for other in (photo, shifted, blurred, noise))
    assert same == 0 and small < min(large, other) / 2
    assert (shifted - photo).square().mean() > (blurred - photo).square().mean()


def test_weights_of_shift_tolerant_lpips_that_are_missing(tmp_path):
    network = load_network("stlpips/alex", "random")
    torch.save({f"net.{name}": tensor for name, tensor in network.module.state_dict().items()}, tmp_path / "net.pth")
    with pytest.raises(ValueError, match=r"does not hold the linear layers.*missing: lin0"):
        ShiftTolerantLPIPS("alex", str(tmp_path / "net.pth"))


def test_images_get_no_graph(resnet):
    calls = []
    handle = resnet.register_forward_hook(lambda module, inputs, output: calls.append(output.pooled.requires_grad))
    FeatureDistance(resnet)(WANTED.clone().requires_grad_(), WANTED.clone().requires_grad_())
    handle.remove()
    assert sorted(calls) == [False, True]


def test_alignment(resnet):
    torch.manual_seed(0)
    alignment, quantized = Alignment(resnet, 5), images(2, 5, 4, 6, seed=3).requires_grad_()
    value = alignment(quantized, WANTED)
    features = F.interpolate(resnet(WANTED).features[-1], (4, 6), mode="bilinear", antialias=True)
    hidden = rows(quantized)
    for layer in alignment.project:
        hidden = (
            hidden @ layer.weight[:, :, 0, 0].T + layer.bias if hasattr(layer, "weight") else hidden * hidden.sigmoid()
        )
    wanted = (1 - (hidden * rows(features)).sum(1) / (hidden.norm(dim=1) * rows(features).norm(dim=1))).mean()
    torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-6)
    value.backward()
    assert (quantized.grad.abs().sum(1) > 0).all() and all(p.grad.any() for p in alignment.parameters())
    assert all(name.startswith("project.") for name in alignment.state_dict())
    optimizer = torch.optim.Adam(alignment.parameters(), 1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        loss = alignment(quantized.detach(), WANTED)
        loss.backward()
        optimizer.step()
    assert loss < value / 2
