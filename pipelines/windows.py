"""Larger images than those of the training: a window of the trained size slides over a larger grid of codes.

Windows overlap by half. Each takes the codes that earlier windows have sampled as known, and samples the others. So the
prior only ever sees sequences of the length that it has learnt.

Source: Esser et al. 2021, "Taming transformers for high-resolution image synthesis", section 3.3. The original moves
the window by one code and samples one code in each; here a window samples all codes that are new in it.

Shape letters: N images, h w grid of a window, h' w' the larger grid, G codes at each position.
"""

from collections.abc import Callable, Iterable, Iterator
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from configs.arguments import described, is_number
from configs.randomness import mix
from stage2_prior import TokenLayout

# int64 seeds `(N,)` and known codes `(N, L)`, -1 where a code is sampled → codes, batch by batch.
Sample = Callable[[Tensor, Tensor], Iterable[Tensor]]


def sample_windows(sample: Sample, seeds: Tensor, known: Tensor, grid: tuple[int, int]) -> Tensor:
    """Samples the codes of a grid of any size from `grid` up, window by window.

    If the grid has the size of a window, this is one call of `sample` with the given seeds.

    Args:
        sample: samples the codes of one window.
        seeds: int64 `(N,)`.
        known: int64 `(N, h', w')` or `(N, h', w', G)`; -1 where a code is sampled.
        grid: h and w.

    Returns:
        int64, with the shape of `known`.
    """
    codes = known.clone()
    for top, left in corners((known.shape[1], known.shape[2]), grid):
        window = codes[:, top : top + grid[0], left : left + grid[1]]
        if (window < 0).any():
            batches = sample(window_seeds(seeds, top, left), window.flatten(1))
            window.copy_(torch.cat([*batches]).view_as(window))
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


def larger_grid(layout: TokenLayout, image_size: Any) -> tuple[int, int]:
    """Height and width of the grid of codes of images of at least the trained size.

    Args:
        layout: the token layout.
        image_size: height and width of the images in pixels, or the side of a square.

    Raises:
        ValueError: an image cannot have this size, or has several grids.
    """
    require_one_grid(layout, "image_size")
    sides = tuple(image_size) if isinstance(image_size, list | tuple) else (image_size, image_size)
    factor, (height, width) = layout.downsampling_factor, layout.image_shape
    whole = len(sides) == 2 and all(is_number(side, Integral) and side % factor == 0 for side in sides)
    if not whole or sides[0] < height or sides[1] < width:
        raise ValueError(
            f"image_size: received {described(image_size)}; must be height and width in pixels, at least {height} and "
            f"{width}, and multiples of {factor}"
        )
    return int(sides[0]) // factor, int(sides[1]) // factor


def require_one_grid(layout: TokenLayout, name: str) -> None:
    """Refuses to sample parts of an image if its codes have several grids; `name` is that of the argument.

    Raises:
        ValueError: the layout has several grids.
    """
    if len(layout.all_grids) > 1:
        raise ValueError(
            f"{name}: this tokenizer has {layout.codes_text} codes, and a code of the coarse grid describes more than "
            "one part of an image, so parts cannot be sampled by themselves; use a tokenizer with one grid"
        )
