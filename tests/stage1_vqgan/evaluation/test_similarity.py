"""MS-SSIM, compared with stored numbers of another implementation."""

import pytest
import torch
import torch.nn.functional as F

from stage1_vqgan.evaluation.similarity import MS_SSIM_SMALLEST, multiscale_structural_similarity
from tests.devices import DEVICE

# ms_ssim of pytorch-msssim 1.0.0 on `pictures`. (torchmetrics 1.9 reflects the images at their borders in the last
# scale, which gives 0.5262 for the last one.)
STORED = {
    (176, 192): [0.9932074546813965, 0.9049380421638489, 0.5226737856864929],
    (240, 208): [0.99115389585495, 0.8807642459869385, 0.47985804080963135],
}


def pictures(height, width):
    """Three smooth gray images in [-1, 1], and the same with more and more noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(3, 1, 11, 12, generator=generator)
    images = F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    noise = torch.randn(images.shape, generator=generator) * torch.tensor([0.02, 0.1, 0.5]).view(-1, 1, 1, 1)
    return tuple((2 * pixels.clamp(0, 1) - 1).to(DEVICE) for pixels in (images, images + noise))


@pytest.mark.parametrize("size", STORED)
def test_ms_ssim_is_that_of_another_implementation(size):
    images, others = pictures(*size)
    assert multiscale_structural_similarity(others, images).tolist() == pytest.approx(STORED[size], abs=2e-5)
    colour, noisy = (pixels.expand(-1, 3, -1, -1) for pixels in (images, others))
    assert multiscale_structural_similarity(noisy, colour).tolist() == pytest.approx(STORED[size], abs=2e-5)


def test_ms_ssim_needs_a_window_at_every_scale():
    images = torch.rand(2, 1, MS_SSIM_SMALLEST, MS_SSIM_SMALLEST, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert MS_SSIM_SMALLEST == 161
    assert multiscale_structural_similarity(images, images).tolist() == pytest.approx([1.0] * 2)
    smaller = images[:, :, 1:]
    assert multiscale_structural_similarity(smaller, smaller).isnan().all()


def test_opposite_images_have_no_ms_ssim_below_0():
    images, _ = pictures(176, 192)
    assert multiscale_structural_similarity(-images, images).tolist() == [0.0] * 3
