"""Larger images than those of the training: windows over the grid of codes."""

import numpy as np
import pytest
import torch

from pipelines.windows import corners, sample_windows, window_seeds
from tests.pipelines.test_editing import images, make_pipeline, pipe  # noqa: F401


def test_windows_cover_the_grid_and_overlap_by_half():
    assert list(corners((4, 4), (4, 4))) == [(0, 0)]
    assert list(corners((4, 9), (4, 4))) == [(0, 0), (0, 2), (0, 4), (0, 5)]
    assert list(corners((7, 5), (5, 5))) == [(0, 0), (2, 0)]
    assert list(corners((2, 3), (1, 1))) == [(top, left) for top in range(2) for left in range(3)]


@pytest.mark.parametrize("depth", [(), (2,)])
def test_every_code_is_sampled_once_and_known_codes_stay(depth):
    torch.manual_seed(0)
    known = torch.randint(100, (3, 7, 9, *depth))
    known[torch.rand(known.shape) < 0.7] = -1
    drawn = torch.zeros_like(known)
    counter = iter(range(1000, 10**6))

    def sample(window, seeds):
        assert window.shape[1] == 4 * 3 * (depth or (1,))[0] and (window < 0).any()
        return torch.where(window < 0, next(counter), window)

    codes = sample_windows(sample, known, torch.arange(3), (4, 3))
    assert codes.shape == known.shape and torch.equal(codes[known >= 0], known[known >= 0])
    assert (codes[known < 0] >= 1000).all() and not drawn.any()
    assert next(counter) <= 1000 + len(list(corners((7, 9), (4, 3))))
