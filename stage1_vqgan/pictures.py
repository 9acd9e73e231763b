"""Pictures for people: many images in one, and which images they show."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont

BACKGROUND, INK = "white", "black"
GAP = 2  # pixels between two images

# Font size of labels, in pixels, and width that they take at most.
SMALLEST_FONT, LARGEST_FONT, WIDEST_LABEL = 13, 24, 240
# Fonts of systems that have more letters than ASCII.
FONTS = ("NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "DejaVuSans.ttf", "arial.ttf")
Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont


def image_grid(images: Iterable[Image.Image], columns: int, min_tile: int = 0, gap: int = GAP) -> Image.Image:
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


def with_row_labels(grid: Image.Image, labels: Sequence[str]) -> Image.Image:
    """A grid with a label on the left of each row; a label that is too long is cut.

    Pillow's own font has only the letters of ASCII. Other letters need one of FONTS on this machine, or are boxes.

    Args:
        grid: a picture of `image_grid`.
        labels: one text for each row.
    """
    row = (grid.height - GAP) / len(labels)  # each row has one gap, and the last one a gap below it
    font = _font(max(SMALLEST_FONT, min(int(row) // 4, LARGEST_FONT)), "".join(labels))
    texts = [_fitting(" ".join(label.split()), font) for label in labels]
    margin = int(max(font.getlength(text) for text in texts)) + 8
    picture = Image.new(grid.mode, (margin + grid.width, grid.height), BACKGROUND)
    picture.paste(grid, (margin, 0))
    draw = ImageDraw.Draw(picture)
    for number, text in enumerate(texts):
        draw.text((margin - 4, GAP + (number + 0.5) * row), text, fill=INK, font=font, anchor="rm")
    return picture


def _font(size: int, text: str) -> Font:
    """Pillow's own font if it has all letters of a text, else the first of FONTS that this machine has."""
    if not text.isascii():
        for name in FONTS:
            with suppress(OSError):
                return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def _fitting(text: str, font: Font) -> str:
    """The beginning of a text that is wider than WIDEST_LABEL."""
    if font.getlength(text) <= WIDEST_LABEL:
        return text
    while font.getlength(f"{text}…") > WIDEST_LABEL:
        text = text[:-1]
    return f"{text}…"


def labelled_grid(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: int = 16, min_tile: int = 64
) -> Image.Image:
    """Rows of images with labels. A row of more than `columns` images goes on in the next line.

    Args:
        rows: label and images of each row, at least one image; all images have the same size. Without any label, the
            picture has no margin.
        columns: largest number of images in a line.
        min_tile: see `image_grid`.
    """
    columns = min(columns, max(len(images) for _, images in rows))
    tiles: list[Image.Image] = []
    labels: list[str] = []
    for label, images in rows:
        for start in range(0, len(images), columns):
            part = list(images[start : start + columns])
            empty = Image.new(part[0].mode, part[0].size, BACKGROUND)
            tiles += part + [empty] * (columns - len(part))
            labels.append(label if start == 0 else "")
    grid = image_grid(tiles, columns, min_tile)
    return with_row_labels(grid, labels) if any(labels) else grid


def reconstruction_grid(
    originals: Sequence[Image.Image], reconstructions: Sequence[Image.Image], columns: int = 16, min_tile: int = 64
) -> Image.Image:
    """Originals above their reconstructions, in as many pairs of rows as needed; the arguments of `labelled_grid`."""
    rows = []
    for start in range(0, len(originals), columns):
        for label, images in (("original", originals), ("reconstruction", reconstructions)):
            rows.append((label, images[start : start + columns]))
    return labelled_grid(rows, columns, min_tile)


def spread(total: int, count: int, labels: np.ndarray | None = None) -> list[int]:
    """Numbers of at most `count` images, spread evenly over the classes, and over the images of each class.

    Args:
        total: number of images.
        count: number of images to choose, at least 1.
        labels: the class of each image, int64 `(total,)`; None spreads them over all images.

    Returns:
        Different numbers from 0 to total - 1, in the order of classes, then of images.
    """
    if labels is None:
        return _evenly(np.arange(total), count).tolist()
    classes = _evenly(np.unique(labels), count)
    shares = [count // len(classes) + (place < count % len(classes)) for place in range(len(classes))]
    chosen = [
        _evenly(np.flatnonzero(labels == one), share) for one, share in zip(classes.tolist(), shares, strict=True)
    ]
    return np.concatenate(chosen).tolist()


def _evenly(values: np.ndarray, count: int) -> np.ndarray:
    return values[np.linspace(0, len(values) - 1, min(count, len(values))).astype(int)]
