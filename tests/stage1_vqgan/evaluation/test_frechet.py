"""The Frechet distance of streamed features, compared with torch-fidelity on folders of PNG files."""

import math

import numpy as np
import pytest
import torch

from stage1_vqgan.evaluation import networks
from stage1_vqgan.evaluation.frechet import Moments, fitted, frechet_distance
from stage1_vqgan.evaluation.networks import FrechetDistance, feature_metric
from tests.feature_networks import as_extractor, put_random_inception, small_network
from tests.image_sets import write_pngs

torch_fidelity = pytest.importorskip("torch_fidelity")
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY  # noqa: E402

CPU = torch.device("cpu")


def pairs(count, size):
    """Images of whole 256 levels, and reconstructions between these levels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator) / 127.5 - 1
    return images, (0.7 * images + 0.2 * torch.randn(images.shape, generator=generator)).clamp(-1, 1)


def streamed(metric, images, reconstructions, batch_size):
    for pair in zip(reconstructions.split(batch_size), images.split(batch_size), strict=True):
        metric.add(*pair)
    return metric.figures(lambda total: total)


def of_torch_fidelity(tmp_path, images, reconstructions, extractor):
    folders = [write_pngs(tmp_path / name, part) for name, part in {"a": images, "b": reconstructions}.items()]
    options = {"fid": True, "cuda": False, "verbose": False, "save_cpu_ram": True, "cache": False}
    found = torch_fidelity.calculate_metrics(
        input1=folders[0], input2=folders[1], feature_extractor=extractor, **options
    )
    return found["frechet_inception_distance"]


@pytest.mark.parametrize("count", [60, 10])  # 10 images of 24 features: a singular covariance
def test_the_distance_is_that_of_torch_fidelity(tmp_path, monkeypatch, count):
    network = small_network()
    monkeypatch.setitem(FEATURE_EXTRACTORS_REGISTRY, "small", as_extractor(network))
    images, reconstructions = pairs(count, 16)
    found = streamed(FrechetDistance("frechet_distance/small", network, CPU), images, reconstructions, 7)
    expected = of_torch_fidelity(tmp_path, images, reconstructions, "small")
    assert expected > 0.01
    assert found == {"frechet_distance/small": pytest.approx(expected, rel=1e-4)}


def test_reconstructions_are_compared_as_8_bits():
    """A reconstruction that a PNG file would not tell from its image is at distance 0."""
    images, _ = pairs(30, 16)
    metric = FrechetDistance("x", small_network(), CPU)
    close = (images + 0.003 * torch.sign(images)).clamp(-1, 1)
    assert streamed(metric, images, close, 30)["x"] == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
def test_rfid_is_that_of_torch_fidelity(tmp_path, monkeypatch):
    """With random weights in the place of those of the original, which cannot be downloaded here."""
    put_random_inception(tmp_path, monkeypatch)
    images, reconstructions = pairs(12, 32)
    new, least_size = feature_metric("inception", 3, CPU)
    found = streamed(new(), images, reconstructions, 5)
    expected = of_torch_fidelity(tmp_path, images, reconstructions, "inception-v3-compat")
    assert least_size == 1 and expected > 0.01
    assert found == {"rfid": pytest.approx(expected, rel=1e-4)}


@pytest.mark.parametrize("offset", [0, 1000])
def test_sums_in_float64_lose_nothing_that_float32_features_have(offset):
    """Features far from 0: the squares that cancel are 10⁶ times the variance."""
    features = torch.randn(2000, 12, generator=torch.Generator().manual_seed(0)) + offset
    moments = Moments(12)
    for batch in features.split(7):
        moments.add(batch)
    found = fitted(moments.sums)
    np.testing.assert_allclose(found.mean, features.double().mean(0), rtol=1e-13, atol=1e-13)
    error = np.abs(found.covariance.numpy() - np.cov(features.double().numpy(), rowvar=False)).max()
    assert error <= max(1, offset) ** 2 * 2.0**-48  # the rounding of the features themselves, squared


def test_processes_add_their_sums():
    """Also of a process that has no image."""
    features = torch.randn(31, 5, generator=torch.Generator().manual_seed(0))
    parts = [Moments(5) for _ in range(3)]
    for part, batch in zip(parts, (features[:20], features[20:]), strict=False):
        part.add(batch)
    found = fitted(torch.stack([part.sums for part in parts]).sum(0))
    assert found.images == 31
    np.testing.assert_allclose(found.covariance, np.cov(features.double().numpy(), rowvar=False), atol=1e-12)


def test_one_image_has_no_distance():
    images, reconstructions = pairs(2, 16)
    metric = FrechetDistance("x", small_network(), CPU)
    assert streamed(metric, images[:1], reconstructions[:1], 1) == {}
    assert math.isnan(frechet_distance(fitted(metric.real.sums), fitted(metric.reconstructed.sums)))
    assert streamed(metric, images[1:], reconstructions[1:], 1)["x"] > 0


def test_each_network_has_a_figure_of_its_own():
    named = {"inception": "rfid", "timm/resnet18": "frechet_distance/timm/resnet18", "lpips/vgg": "lpips/vgg"}
    assert {network: networks.figure_of(network) for network in named} == named
