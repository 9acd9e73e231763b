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
        count: number of images.
        mean: float64 `(D,)`.
        covariance: float64 `(D, D)`, divided by count - 1; NaN for fewer than two images.
    """

    count: int
    mean: Tensor
    covariance: Tensor


class Moments:
    """Sums of features and of their products, from which mean and covariance follow. Their size does not grow with N.

    The sums are float64, and no mean is subtracted before. For features of size m, the covariance that they give is
    wrong by about m² · 2⁻⁵³ for each addition of a batch that matters, some m² · 2⁻⁴⁸ for thousands of batches. The
    features themselves are float32: each is rounded by up to m · 2⁻²⁴, which changes its square by as much.

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
    if min(first.count, second.count) < 2:
        return math.nan
    roots = torch.linalg.matrix_norm(_root(first.covariance) @ _root(second.covariance), "nuc")
    traces = first.covariance.trace() + second.covariance.trace()
    return ((first.mean - second.mean).square().sum() + traces - 2 * roots).item()


def _root(covariance: Tensor) -> Tensor:
    """The symmetric root of a covariance; eigenvalues that rounding made negative are 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT
