"""Standard errors: how much a figure varies between sets of as many images. They need no further images.

Shape letters: N images, D features of an image.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from stage1_vqgan.evaluation.frechet import Gaussian, fitted, frechet_distance

RESAMPLES = 200


def share_error(share: float, count: int) -> float:
    """Standard error of a share of independent images, such as an accuracy.

    Two successes and two failures are added before. So a share of 1 of few images does not have the error 0.

    Args:
        share: in [0, 1].
        count: number of images.

    Source: Agresti and Coull 1998, "Approximate is better than 'exact' for interval estimation of binomial
    proportions".
    """
    middle = (share * count + 2) / (count + 4)
    return math.sqrt(middle * (1 - middle) / (count + 4))


def distance_error(features: np.ndarray, reference: Gaussian, seed: int = 0) -> float:
    """Standard error of the Frechet distance of some features to a reference, by the bootstrap.

    The images are drawn anew, N of N with repetition, RESAMPLES times. The result is the standard deviation of the
    distances. The reference stays the same. The distances themselves are too large, because repeated images lower the
    covariance; their spread is that of independent sets.

    Args:
        features: `(N, D)`.
        reference: Gaussian of D features.
        seed: seed of the draws.

    Returns:
        NaN for fewer than two images.

    Source: Efron 1979, "Bootstrap methods: another look at the jackknife".
    """
    rows = F.pad(torch.from_numpy(features).double(), (1, 0), value=1.0)
    rng = np.random.default_rng(seed)
    distances = []
    for _ in range(RESAMPLES):
        times = np.bincount(rng.integers(len(rows), size=len(rows)), minlength=len(rows))
        weighted = rows * torch.from_numpy(times)[:, None]
        distances.append(frechet_distance(fitted(rows.mT @ weighted), reference))
    return float(np.std(distances, ddof=1))
