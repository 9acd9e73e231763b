"""Larger images than those of the training: a window of the trained size slides over a larger grid of codes.

Windows overlap by half. Each takes the codes that earlier windows have sampled as known, and samples the others. So the
prior only ever sees sequences of the length that it has learnt.

Source: Esser et al. 2021, "Taming transformers for high-resolution image synthesis", section 3.3. The original moves
the window by one code and samples one code in each; here a window samples all codes that are new in it.

Shape letters: N images, h w grid of a window, h' w' the larger grid, G codes at each position.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from configs.randomness import mix

# int64 `known` `(N, L)` and `seeds` `(N,)` → codes of the same shape. Known codes stay; the places with -1 are sampled.
Sample = Callable[[Tensor, Tensor], Tensor]


def sample_windows(sample: Sample, known: Tensor, seeds: Tensor, grid: tuple[int, int]) -> Tensor:
    """Samples the codes of a grid of any size from `grid` up, window by window.

    If the grid has the size of a window, this is one call of `sample` with the given seeds.

    Args:
        sample: samples the codes of one window.
        known: int64 `(N, h', w')` or `(N, h', w', G)`; -1 where a code is sampled.
        seeds: int64 `(N,)`.
        grid: h and w.

    Returns:
        int64, with the shape of `known`.
    """
    codes = known.clone()
    for top, left in corners((known.shape[1], known.shape[2]), grid):
        window = codes[:, top : top + grid[0], left : left + grid[1]]
        if (window < 0).any():
            window.copy_(sample(window.flatten(1), window_seeds(seeds, top, left)).view_as(window))
    return codes


def corners(size: tuple[int, int], grid: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Top and left of each window of h × w codes in a grid of `size`, in raster order."""
    for top in _starts(size[0], grid[0]):
        for left in _starts(size[1], grid[1]):
            yield top, left


def _starts(size: int, window: int) -> list[int]:
    """Starts of windows at distances of half a window; the last window ends where the grid ends."""
    return [*range(0, size - window, -(-window // 2)), size - window]


def window_seeds(seeds: Tensor, top: int, left: int) -> Tensor:
    """The seeds of a window, int64 `(N,)` from 0 up: those of the images for the first one, others for each other one.

    So equal places in two windows have different random numbers, and these depend on the place in the large grid only.
    """
    if top == left == 0:
        return seeds
    place = mix(torch.tensor([top, left], device=seeds.device))
    return mix(mix(mix(seeds) ^ place[0]) ^ place[1]) & (2**63 - 1)
