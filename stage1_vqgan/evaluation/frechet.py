"""The Frechet distance between the features of two sets of images.

Shape letters: N images, D features of an image.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """The normal distribution that is fitted to features.

    Attributes:
        images: their number.
        mean: float64 `(D,)`.
        covariance: float64 `(D, D)`, divided by images - 1; NaN for fewer than two images.
    """

    images: int
    mean: Tensor
    covariance: Tensor


class Moments:
    """Sums of features and of their products, from which mean and covariance follow. Their size does not grow with N.

    The sums are float64, and no mean is subtracted before. Let features have the size m. Their products are about m²,
    and thousands of additions round their sum by less than m² · 2⁻⁴⁸ = (m · 2⁻²⁴)² an image. The features are float32
    numbers, which were rounded by up to m · 2⁻²⁴ before. So the covariance loses no more than the features had lost.

    Args:
        width: D.
        device: where the sums are. MPS has no float64, so there they are on the CPU.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        where = "cpu" if torch.device(device).type == "mps" else device
        # Each feature vector gets a 1 in front. Then one matrix holds N, the sums and the sums of products.
        self.sums = torch.zeros(width + 1, width + 1, dtype=torch.float64, device=where)

    def add(self, features: Tensor) -> None:
        """Adds the features of some images, `(B, D)`."""
        rows = F.pad(features.to(self.sums.device, torch.float64), (1, 0), value=1.0)
        self.sums += rows.mT @ rows


def fitted(sums: Tensor) -> Gaussian:
    """The Gaussian of the features whose `Moments.sums` are given; those of several processes may be added."""
    sums = sums.cpu()
    count = sums[0, 0]
    mean = sums[0, 1:] / count
    return Gaussian(int(count), mean, (sums[1:, 1:] - count * torch.outer(mean, mean)) / (count - 1))


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """‖μ₁ - μ₂‖² + tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½), at least 0 up to rounding; NaN if one has fewer than two images.

    The trace of (Σ₁Σ₂)^½ is the sum of the singular values of Σ₁^½ Σ₂^½, which are real and at least 0 however rounding
    falls.

    Source: Dowson and Landau 1982, "The Fréchet distance between multivariate normal distributions".
    """
    if min(first.images, second.images) < 2:
        return math.nan
    roots = torch.linalg.matrix_norm(_root(first.covariance) @ _root(second.covariance), "nuc")
    traces = first.covariance.trace() + second.covariance.trace()
    return ((first.mean - second.mean).square().sum() + traces - 2 * roots).item()


def _root(covariance: Tensor) -> Tensor:
    """The symmetric root of a covariance; eigenvalues that rounding made negative are 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT
