"""Standard errors, compared with the spread of figures of independent sets."""

import math

import numpy as np
import pytest
import torch

from pipelines.evaluation.confidence import distance_error, share_error
from pipelines.evaluation.metrics import frechet_distances, frechet_errors, gaussian
from stage1_vqgan.evaluation.frechet import frechet_distance


def images(rng, count, shift=0.3):
    """Features of a model whose images differ from real ones by their mean."""
    return rng.normal(size=(count, 4)) * [1, 2, 0.5, 1] + [shift, 0, 0, 0]


def test_the_error_of_a_distance_is_the_spread_over_independent_sets():
    rng = np.random.default_rng(0)
    reference = gaussian(images(rng, 5000, 0.0))
    sets = [images(rng, 300) for _ in range(150)]
    spread = np.std([frechet_distance(gaussian(one), reference) for one in sets], ddof=1)
    errors = [distance_error(one, reference, seed) for seed, one in enumerate(sets[:5])]
    assert np.mean(errors) == pytest.approx(spread, rel=0.25)
    assert distance_error(sets[0], reference, 1) == distance_error(sets[0], reference, 1)


def test_more_images_have_a_smaller_error():
    rng = np.random.default_rng(1)
    real, few, many = images(rng, 500, 0.0), images(rng, 100), images(rng, 1600)
    small, large = frechet_errors(real, real, [many, few], 4)
    assert 2 < large / small < 8  # 4 up to the randomness of the few
    assert frechet_distances(real, real, [real], 4)[0] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("share, count", [(0.5, 50), (0.9, 400), (0.02, 1000)])
def test_the_error_of_a_share_is_the_spread_of_a_binomial(share, count):
    assert share_error(share, count) == pytest.approx(math.sqrt(share * (1 - share) / count), rel=0.1)


def test_a_share_of_one_has_an_error():
    """Of 50 images, 50 are right with probability .05 if the share is .94: so .02 to .03 is the right size."""
    assert 0.02 < share_error(1.0, 50) < 0.03
    assert torch.tensor(share_error(1.0, 10**6)) < 1e-5
