"""Distances between sets of images. Their features are averaged pixels, so no network is downloaded."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_vqgan.evaluation.frechet import Gaussian, Moments, fitted, frechet_distance


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
    """Frechet distances of Gaussians fitted to principal components.

    Args:
        fitted_on: features that the principal components are fitted to, `(N, F)`.
        reference: features `(N, F)` of the real images.
        candidates: sets of features `(N, F)`; each set is compared with the reference.
        num_components: number of principal components, at most the smaller side of `fitted_on`.

    Returns:
        One distance for each candidate, at least 0 up to rounding; see `stage1_vqgan.evaluation.frechet`.
    """
    from sklearn.decomposition import PCA

    pca = PCA(num_components, svd_solver="full").fit(fitted_on)

    def gaussian(features: np.ndarray) -> Gaussian:
        moments = Moments(num_components)
        moments.add(torch.from_numpy(pca.transform(features)))
        return fitted(moments.sums)

    real = gaussian(reference)
    return [frechet_distance(gaussian(candidate), real) for candidate in candidates]


def nearest_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """Mean Euclidean distance of rows to their nearest row of the reference. Near 0, the rows copy the reference."""
    rows = torch.from_numpy(reference)
    # Computed in parts: the distances of 10,000 rows to 60,000 rows take 5 GB.
    nearest = [torch.cdist(part, rows).amin(1) for part in torch.from_numpy(features).split(1000)]
    return float(torch.cat(nearest).mean())
