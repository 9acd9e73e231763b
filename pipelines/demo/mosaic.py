"""The codes of an image as a picture: one coloured tile for each code."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from stage1_vqgan import Grids, num_codes

# Multiples of these numbers, without their whole part, fill a cube evenly (Roberts 2018, "The unreasonable
# effectiveness of quasirandom sequences"). So codes have different colours, however many there are.
STEPS = np.array([0.8191725133961645, 0.6710436067037893, 0.5497004779019703])
# Lowest and highest hue, saturation and value, in 256ths: no tile is nearly black or gray.
LOWEST, HIGHEST = np.array([0, 80, 130]), np.array([256, 230, 256])
LUMINANCE = np.array([0.299, 0.587, 0.114])  # of red, green and blue
SMALLEST_WITH_NUMBER = 24  # pixels of a tile in which a number can be read


def code_colours(codes: np.ndarray) -> np.ndarray:
    """Colours of codes, int64 `(h, w)` → uint8 RGB `(h, w, 3)`. A code's colour depends on nothing else."""
    place = (codes[..., None] * STEPS) % 1.0
    levels = (LOWEST + place * (HIGHEST - LOWEST)).astype(np.uint8)
    bands = [Image.fromarray(np.ascontiguousarray(levels[..., band])) for band in range(3)]
    return np.asarray(Image.merge("HSV", bands).convert("RGB"))


def mosaic(codes: np.ndarray, side: int = 512) -> Image.Image:
    """Draws one tile for each code, with its number if there is room.

    Args:
        codes: int64 `(h, w)`.
        side: pixels of the longer side, rounded down to whole tiles of at least one pixel.
    """
    height, width = codes.shape
    tile = max(1, side // max(height, width))
    colours = code_colours(codes)
    picture = Image.fromarray(colours).resize((width * tile, height * tile), Image.Resampling.NEAREST)
    if tile >= SMALLEST_WITH_NUMBER:
        draw, font = ImageDraw.Draw(picture), ImageFont.load_default(min(28, tile // 3))
        for (row, column), code in np.ndenumerate(codes):
            ink = "black" if colours[row, column] @ LUMINANCE > 110 else "white"
            draw.text(((column + 0.5) * tile, (row + 0.5) * tile), str(code), ink, font, anchor="mm")
    return picture


def mosaics(codes: np.ndarray, grids: Grids, side: int = 512, gap: int = 8) -> Image.Image:
    """Draws the mosaics of all grids beside one another; of a grid with several codes at each position, one for each.

    Args:
        codes: int64 codes of one image, `(L,)` or of the shape in which the tokenizer returns them.
        grids: see `TokenLayout.all_grids`.
        side: as in `mosaic`.
        gap: pixels between two mosaics.
    """
    pictures = []
    for part, (height, width, depth) in zip(_split(codes.reshape(-1), grids), grids, strict=True):
        pictures += [mosaic(level, side) for level in np.moveaxis(part.reshape(height, width, depth), 2, 0)]
    if len(pictures) == 1:
        return pictures[0]
    total = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    row, left = Image.new("RGB", (total, max(picture.height for picture in pictures)), "white"), 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width + gap
    return row


def _split(codes: np.ndarray, grids: Grids) -> list[np.ndarray]:
    """The flat codes of each grid."""
    return np.split(codes, np.cumsum([num_codes((grid,)) for grid in grids])[:-1])
