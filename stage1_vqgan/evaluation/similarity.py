"""How close a reconstruction is to its image, by their pixels: L1, PSNR, SSIM, MS-SSIM.

Shape letters: B batch, C channels, H W image size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Side, in pixels, of the windows whose statistics SSIM compares. SSIM is not defined for smaller images.
SSIM_WINDOW = 11
# The exponents of the scales of MS-SSIM, from the full size to a sixteenth.
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
# The smallest side whose sixteenth, rounded up, has a window. MS-SSIM is not defined for smaller images.
MS_SSIM_SMALLEST = (SSIM_WINDOW - 1) * 2 ** (len(SCALE_WEIGHTS) - 1) + 1


def mean_absolute_error(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Mean absolute error of each image, float32 `(B,)`.

    Args:
        reconstruction, images: `(B, C, H, W)` in [-1, 1].
    """
    return F.l1_loss(reconstruction, images, reduction="none").flatten(1).mean(1)


def peak_signal_to_noise(reconstruction: Tensor, images: Tensor) -> Tensor:
    """PSNR of each image in dB, float32 `(B,)`, at most 106 (equal images).

    Args:
        reconstruction, images: `(B, C, H, W)` in [-1, 1].
    """
    squared = F.mse_loss(reconstruction, images, reduction="none").flatten(1).mean(1)
    return 10 * torch.log10(4 / squared.clamp(min=1e-10))


def structural_similarity(reconstruction: Tensor, images: Tensor) -> Tensor:
    """SSIM of each image: the mean over channels and over all windows inside the image.

    Args:
        reconstruction, images: `(B, C, H, W)` in [-1, 1]. They are compared in [0, 1], the range that SSIM's constants
            expect.

    Returns:
        float32 `(B,)`, at most 1; NaN if H or W is below 11, the side of the window.

    Source: Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity", section 3,
    with the paper's window, a Gaussian of 11 × 11 pixels and σ = 1.5.
    """
    if min(images.shape[2:]) < SSIM_WINDOW:
        return images.new_full((len(images),), math.nan)
    luminance, structure = _terms(_in_unit_range(reconstruction), _in_unit_range(images))
    return (luminance * structure).flatten(1).mean(1)


def multiscale_structural_similarity(reconstruction: Tensor, images: Tensor) -> Tensor:
    """MS-SSIM of each image: SSIM's structure at five scales, each half as large, and luminance at the last.

    Args:
        reconstruction, images: `(B, C, H, W)` in [-1, 1].

    Returns:
        float32 `(B,)` in [0, 1]; NaN if H or W is below 161: an image of the last scale then has no window.

    Source: Wang et al. 2003, "Multiscale structural similarity for image quality assessment", with the paper's weights.
    Negative means of a scale count as 0, as in torchmetrics. If a side is odd, the last row or column of the next scale
    averages the pixels that exist.
    """
    if min(images.shape[2:]) < MS_SSIM_SMALLEST:
        return images.new_full((len(images),), math.nan)
    x, y = _in_unit_range(reconstruction), _in_unit_range(images)
    product = torch.ones(len(x), device=x.device)
    for scale, weight in enumerate(SCALE_WEIGHTS):
        if scale:
            x, y = (F.avg_pool2d(pixels, 2, ceil_mode=True) for pixels in (x, y))
        luminance, structure = _terms(x, y)
        found = luminance * structure if scale == len(SCALE_WEIGHTS) - 1 else structure
        product = product * found.flatten(1).mean(1).clamp(min=0) ** weight
    return product


def _in_unit_range(pixels: Tensor) -> Tensor:
    return (pixels.float() + 1) / 2


def _terms(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM's luminance, and its product of contrast and structure, for every window inside images in [0, 1]."""
    weights = torch.exp(-((torch.arange(SSIM_WINDOW, device=x.device) - SSIM_WINDOW // 2) ** 2) / (2 * 1.5**2))
    weights = (weights / weights.sum()).expand(x.shape[1], 1, 1, -1)

    def local_mean(values: Tensor) -> Tensor:
        rows = F.conv2d(values, weights, groups=len(weights))
        return F.conv2d(rows, weights.mT, groups=len(weights))

    mean_x, mean_y = local_mean(x), local_mean(y)
    covariance = local_mean(x * y) - mean_x * mean_y
    variances = local_mean(x * x + y * y) - mean_x**2 - mean_y**2
    luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
    return luminance, (2 * covariance + 0.03**2) / (variances + 0.03**2)
