"""Distances between sets of images. Their features are averaged pixels, so no network is downloaded."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def area_features(pixels: Tensor, size: int) -> np.ndarray:
    """Averages images over areas.

    Args:
        pixels: float `(N, C, H, W)` on the CPU.
        size: side of the averaged images in pixels.

    Returns:
        float64 `(N, C · size · size)`.
    """
    return F.interpolate(pixels, size=(size, size), mode="area").flatten(1).double().numpy()


def frechet_distances(
    fitted_on: np.ndarray, reference: np.ndarray, candidates: Sequence[np.ndarray], num_components: int
) -> list[float]:
    """Frechet distances of Gaussians fitted to principal components: ‖μ₁ - μ₂‖² + tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½).

    Args:
        fitted_on: features that the principal components are fitted to, `(N, F)`.
        reference: features `(N, F)` of the real images.
        candidates: sets of features `(N, F)`; each set is compared with the reference.
        num_components: number of principal components, at most the smaller side of `fitted_on`.

    Returns:
        One distance for each candidate, at least 0 up to rounding.

    Source: Dowson and Landau 1982, "The Fréchet distance between multivariate normal distributions".
    """
    from sklearn.decomposition import PCA

    pca = PCA(num_components, svd_solver="full").fit(fitted_on)

    def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        components = pca.transform(features)
        return components.mean(0), np.atleast_2d(np.cov(components, rowvar=False))

    mean, covariance = moments(reference)
    distances = []
    for candidate in candidates:
        other_mean, other_covariance = moments(candidate)
        # The trace of a matrix root is the sum of the roots of its eigenvalues. Those of Σ₁Σ₂ are real and at least 0;
        # rounding may add small imaginary or negative parts.
        roots = np.sqrt(np.clip(np.linalg.eigvals(covariance @ other_covariance).real, 0, None))
        trace = np.trace(covariance) + np.trace(other_covariance) - 2 * roots.sum()
        distances.append(float(((mean - other_mean) ** 2).sum() + trace))
    return distances


def nearest_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """Mean Euclidean distance of rows to their nearest row of the reference. Near 0, the rows copy the reference."""
    rows = torch.from_numpy(reference)
    # Computed in parts: the distances of 10,000 rows to 60,000 rows take 5 GB.
    nearest = [torch.cdist(part, rows).amin(1) for part in torch.from_numpy(features).split(1000)]
    return float(torch.cat(nearest).mean())
