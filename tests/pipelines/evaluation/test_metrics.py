"""Distances between sets of images, compared with direct formulas."""

import numpy as np
import pytest
import scipy.linalg
import torch

from pipelines.evaluation.metrics import area_features, frechet_distances, nearest_distance


def gaussian(seed: int, rows: int = 300, width: int = 6) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, width)) @ rng.normal(size=(width, width)) + rng.normal(size=width)


@pytest.mark.parametrize("num_components", [1, 2, 6])
def test_frechet_distance(num_components):
    fitted_on, reference, *candidates = (gaussian(seed) for seed in range(4))
    directions = np.linalg.svd(fitted_on - fitted_on.mean(0), full_matrices=False)[2][:num_components]
    expected = []
    for candidate in candidates:
        (mean_1, cov_1), (mean_2, cov_2) = (
            (x.mean(0), np.cov(x, rowvar=False).reshape(num_components, num_components))
            for x in (reference @ directions.T, candidate @ directions.T)
        )
        root = scipy.linalg.sqrtm(cov_1 @ cov_2).real
        expected.append(((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1 + cov_2 - 2 * root))
    assert frechet_distances(fitted_on, reference, candidates, num_components) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_a_set_to_itself_and_of_a_shift():
    features = gaussian(0)
    shift = np.array([3.0, 0, 0, 4, 0, 0])
    same, shifted = frechet_distances(features, features, [features[::-1], features + shift], 6)
    assert same == pytest.approx(0, abs=1e-6) and shifted == pytest.approx(25)


def test_nearest_distance():
    features, reference = gaussian(0, 40), gaussian(1, 50)
    naive = np.mean([min(np.linalg.norm(row - other) for other in reference) for row in features])
    assert nearest_distance(features, reference) == pytest.approx(naive)
    assert nearest_distance(reference[10:30], reference) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("side", "size"), [(16, 8), (16, 16), (28, 8), (32, 5)])
def test_area_features(side, size):
    pixels = torch.randn(3, 2, side, side, generator=torch.Generator().manual_seed(0))
    blocks = [(n * side // size, -(-(n + 1) * side // size)) for n in range(size)]
    naive = [
        [float(channel[top:bottom, left:right].double().mean()) for channel in image for top, bottom in blocks
         for left, right in blocks]
        for image in pixels
    ]  # fmt: skip
    np.testing.assert_allclose(area_features(pixels, size), naive, atol=1e-6)
