"""An order of the positions of a code grid in which each new position lies far from the earlier ones.

Source: Besnier et al. 2025, "Halton scheduler for masked generative image transformer", section 4.
"""

from functools import lru_cache

import numpy as np

from stage1_vqgan import Grids


@lru_cache
def halton_ranks(grids: Grids) -> tuple[int, ...]:
    """The rank of each code in the order, 0 first, for the L codes of an image.

    The grids come one after another. Of several codes at a position, all first ones come before all second ones.

    Args:
        grids: h, w and number of codes at each position of each grid.
    """
    ranks: list[np.ndarray] = []
    before = 0
    for height, width, depth in grids:
        cells = halton_cells(height, width).argsort()
        ranks.append((before + cells[:, None] + height * width * np.arange(depth)).ravel())
        before += height * width * depth
    return tuple(np.concatenate(ranks).tolist())


def halton_cells(height: int, width: int) -> np.ndarray:
    """All cells of a grid, int64 `(h·w,)`, in the order in which the Halton sequence of bases 2 and 3 reaches them."""
    size = points = height * width
    while True:
        points *= 2
        y, x = (radical_inverse(np.arange(1, points + 1), base) for base in (2, 3))
        reached, first = np.unique((y * height).astype(int) * width + (x * width).astype(int), return_index=True)
        if len(reached) == size:
            return reached[first.argsort()]


def radical_inverse(numbers: np.ndarray, base: int) -> np.ndarray:
    """Numbers in [0, 1): the digits of whole numbers in this base, mirrored at the point."""
    result, place = np.zeros(len(numbers)), 1.0
    while numbers.any():
        place /= base
        numbers, digits = np.divmod(numbers, base)
        result += place * digits
    return result
