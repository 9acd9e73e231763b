"""The grids of an image's codes, and the one order of all codes.

Most quantizers give each position of one grid a code. Some give each position several codes, and some have several
grids. In the flat sequence `(L,)`, which a prior reads and writes, codes have this order: grid by grid, each in raster
order, and the codes of a position one after another.
"""

# (h, w, number of codes at each position) of each grid.
Grids = tuple[tuple[int, int, int], ...]


def num_codes(grids: Grids) -> int:
    """L, number of codes of an image."""
    return sum(height * width * depth for height, width, depth in grids)


def codes_shape(grids: Grids) -> tuple[int, ...]:
    """Shape of an image's codes: `(h, w)`; `(h, w, G)` with G codes at each position; `(L,)` for several grids.

    Flattened, codes of each shape have the order of the flat sequence.
    """
    if len(grids) > 1:
        return (num_codes(grids),)
    height, width, depth = grids[0]
    return (height, width) if depth == 1 else (height, width, depth)


def grids_text(grids: Grids) -> str:
    """Grids in words: 8×8; 8×8×4 with four codes at each position; 4×4 and 8×8 for two grids."""
    return " and ".join(f"{height}×{width}" + f"×{depth}" * (depth > 1) for height, width, depth in grids)


__all__ = ["Grids", "codes_shape", "grids_text", "num_codes"]
