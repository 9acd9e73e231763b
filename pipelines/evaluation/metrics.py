"""Distances between sets of images. Their features are averaged pixels, so no network is downloaded."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.evaluation.confidence import distance_error
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
    real, *others = [gaussian(each) for each in projected(fitted_on, [reference, *candidates], num_components)]
    return [frechet_distance(other, real) for other in others]


def frechet_errors(
    fitted_on: np.ndarray, reference: np.ndarray, candidates: Sequence[np.ndarray], num_components: int
) -> list[float]:
    """The standard error of each of the `frechet_distances`, see `distance_error`."""
    real, *others = projected(fitted_on, [reference, *candidates], num_components)
    return [distance_error(other, gaussian(real)) for other in others]


def projected(fitted_on: np.ndarray, sets: Sequence[np.ndarray], num_components: int) -> list[np.ndarray]:
    """The principal components `(N, num_components)` of sets of features `(N, F)`."""
    from sklearn.decomposition import PCA

    pca = PCA(num_components, svd_solver="full").fit(fitted_on)
    return [pca.transform(features) for features in sets]


def gaussian(features: np.ndarray) -> Gaussian:
    """The normal distribution of features `(N, D)`."""
    moments = Moments(features.shape[1])
    moments.add(torch.from_numpy(features))
    return fitted(moments.sums)


def nearest_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """Mean Euclidean distance of rows to their nearest row of the reference. Near 0, the rows copy the reference."""
    rows = torch.from_numpy(reference)
    # Computed in parts: the distances of 10,000 rows to 60,000 rows take 5 GB.
    nearest = [torch.cdist(part, rows).amin(1) for part in torch.from_numpy(features).split(1000)]
    return float(torch.cat(nearest).mean())
