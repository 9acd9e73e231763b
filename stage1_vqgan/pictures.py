"""Pictures for people: many images in one."""

from collections.abc import Iterable

from PIL import Image

BACKGROUND = "white"


def image_grid(images: Iterable[Image.Image], columns: int, min_tile: int = 0, gap: int = 2) -> Image.Image:
    """Arranges images of one size in a grid. Transparent images lie on white.

    Args:
        images: at least one image; all have the same size and mode: L, LA, RGB or RGBA.
        columns: number of images in a row.
        min_tile: minimum width of an image in the grid, in pixels; smaller images are enlarged by a whole number.
        gap: distance between images, in pixels.
    """
    images = list(images)
    width, height = images[0].size
    factor = max(1, -(-min_tile // width))
    width, height = width * factor, height * factor
    rows = -(-len(images) // columns)
    mode = images[0].mode
    grid = Image.new(mode.removesuffix("A"), (columns * (width + gap) + gap, rows * (height + gap) + gap), BACKGROUND)
    for index, image in enumerate(images):
        tile = image.resize((width, height), Image.Resampling.NEAREST)
        place = (gap + index % columns * (width + gap), gap + index // columns * (height + gap))
        grid.paste(tile.convert(grid.mode), place, tile.getchannel("A") if mode.endswith("A") else None)
    return grid
