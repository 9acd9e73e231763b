"""Reconstruction metrics, compared with loops over images and windows."""

import math

import pytest
import torch

from stage1_vqgan import DataConfig, ImageDataset, VQGANConfig, VQGANModel, load_images
from stage1_vqgan.data.loading import evaluation_loader
from stage1_vqgan.reconstruction import (
    codebook_perplexity,
    codebook_usage,
    evaluate_reconstruction,
    structural_similarity,
)
from tests.devices import DEVICE
from tests.image_files import write_folder
from tests.tiny import VQGAN


def naive_ssim(a, b):
    """Mean over channels and windows of the formula in Wang et al. 2004, images `(C, H, W)` in [0, 1]."""
    offsets = torch.arange(-5, 6, dtype=torch.float64)
    window = torch.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for x, y in zip(a.double().cpu(), b.double().cpu(), strict=True):
        for top in range(x.shape[0] - 10):
            for left in range(x.shape[1] - 10):
                p, q = (image[top : top + 11, left : left + 11] for image in (x, y))
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                covariance = (window * (p - mp) * (q - mq)).sum()
                brightness = (2 * mp * mq + 0.01**2) / (mp**2 + mq**2 + 0.01**2)
                values.append(brightness * (2 * covariance + 0.03**2) / (vp + vq + 0.03**2))
    return torch.stack(values).mean().item()


def test_ssim_is_the_formulas():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, 13, 14, generator=generator).to(DEVICE)
    others = (images + 0.3 * torch.randn(images.shape, generator=generator).to(DEVICE)).clamp(0, 1)
    expected = [naive_ssim(*pair) for pair in zip(others, images, strict=True)]
    found = structural_similarity(2 * others - 1, 2 * images - 1)
    assert found.tolist() == pytest.approx(expected, abs=1e-4)
    assert max(expected) < 0.95 and structural_similarity(images, images).tolist() == pytest.approx([1.0] * 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("images"), {f"{n}.png": 25 * n for n in range(10)})


def batches(folder, size, batch_size=2, **where):
    _, source = load_images(DataConfig(dataset=folder, validation_fraction=0.5))
    return evaluation_loader(ImageDataset(source, (size, size), 1), batch_size, **where)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return VQGANModel(VQGANConfig(**VQGAN)).eval().to(DEVICE)


def test_metrics_are_means_over_images(model, folder):
    found = evaluate_reconstruction(model, batches(folder, 16))
    rows = []
    for batch in batches(folder, 16, batch_size=1):
        images = batch.images(DEVICE)
        with torch.no_grad():
            reconstruction = model(images).reconstruction.clamp(-1, 1)
        psnr = 10 * math.log10(4 / (reconstruction - images).square().mean())
        rows.append([psnr, naive_ssim((reconstruction[0] + 1) / 2, (images[0] + 1) / 2)])
    assert found["images"] == len(rows) == 5  # the last batch is smaller
    assert [found["psnr"], found["ssim"]] == pytest.approx(torch.tensor(rows).mean(0).tolist(), abs=1e-4)


def test_every_image_counts_once_over_processes(model, folder):
    """Adding the sums of two processes gives the metrics of one process."""
    parts = []

    def keep(total):
        parts.append(total)
        return total

    for rank in range(2):
        evaluate_reconstruction(model, batches(folder, 16, rank=rank, world_size=2), keep)
    sums = iter([parts[0] + parts[2], parts[1] + parts[3]])
    found = evaluate_reconstruction(model, batches(folder, 16, rank=0, world_size=2), lambda total: next(sums))
    assert found == pytest.approx(evaluate_reconstruction(model, batches(folder, 16)), rel=1e-6)


def test_images_smaller_than_the_window_have_no_ssim(model, folder):
    metrics = evaluate_reconstruction(model, batches(folder, 8))
    assert "ssim" not in metrics and math.isfinite(metrics["psnr"])


@pytest.mark.parametrize(
    "counts, used, expected",
    [
        ([5, 5, 5, 5], 1.0, 4.0),
        ([9, 0, 0, 0], 0.25, 1.0),
        ([3, 3, 0, 0], 0.5, 2.0),
        ([3, 1, 0, 0], 0.5, 4 / 3**0.75),  # exp(¾ ln 4/3 + ¼ ln 4)
    ],
)
def test_usage_and_perplexity(counts, used, expected):
    assert codebook_usage(torch.tensor(counts)).item() == used
    assert codebook_perplexity(torch.tensor(counts)).item() == pytest.approx(expected, rel=1e-5)
