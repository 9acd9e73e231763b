"""Distances between sets of images, by features that need no downloaded network."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def area_features(pixels: Tensor, size: int) -> np.ndarray:
    """float64 `(N, C · size · size)`: images averaged over areas."""
    return F.interpolate(pixels, size=(size, size), mode="area").flatten(1).double().numpy()


def frechet_distances(
    fitted_on: np.ndarray, reference: np.ndarray, candidates: Sequence[np.ndarray], num_components: int
) -> list[float]:
    """Frechet distance of Gaussians fitted to principal components: ‖μ₁ - μ₂‖² + tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½)."""
    from sklearn.decomposition import PCA

    pca = PCA(num_components, svd_solver="full").fit(fitted_on)

    def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        components = pca.transform(features)
        return components.mean(0), np.atleast_2d(np.cov(components, rowvar=False))

    mean, covariance = moments(reference)
    distances = []
    for candidate in candidates:
        other_mean, other_covariance = moments(candidate)
        # the trace of the root is the sum of the roots of the eigenvalues, which are real and not negative
        roots = np.sqrt(np.clip(np.linalg.eigvals(covariance @ other_covariance).real, 0, None))
        trace = np.trace(covariance) + np.trace(other_covariance) - 2 * roots.sum()
        distances.append(float(((mean - other_mean) ** 2).sum() + trace))
    return distances


def nearest_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """Mean Euclidean distance to the nearest row of the reference; near 0 means copies."""
    rows = torch.from_numpy(reference)
    # in parts: of ten thousand rows and sixty thousand all distances at once would take 5 GB
    nearest = [torch.cdist(part, rows).amin(1) for part in torch.from_numpy(features).split(1000)]
    return float(torch.cat(nearest).mean())
