"""Grids with labelled rows, pairs of originals and reconstructions, and the choice of images."""

import numpy as np
import pytest
from PIL import Image

from stage1_vqgan import image_grid, labelled_grid, reconstruction_grid, spread, with_row_labels
from stage1_vqgan.pictures import WIDEST_LABEL

TILE = 48


def tiles(count: int, mode: str = "RGB") -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).convert(mode) for _ in range(count)]


def margin_of(labels: list[str], mode: str = "L") -> np.ndarray:
    """The margin of a picture with one tile in each row; checks that the grid beside it is unchanged."""
    grid = image_grid(tiles(len(labels), mode), 1, min_tile=TILE)
    picture = with_row_labels(grid, labels)
    width = picture.width - grid.width
    assert picture.mode == mode and picture.height == grid.height
    assert np.array_equal(np.asarray(picture)[:, width:], np.asarray(grid))
    return np.asarray(picture.convert("L"))[:, :width]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_each_row_has_its_label_beside_it(mode):
    margin = margin_of(["cats", "dogs and wolves", "cats"], mode)
    rows = [margin[2 + n * (TILE + 2) :][:TILE] for n in range(3)]
    assert np.array_equal(rows[0], rows[2]) and not np.array_equal(rows[0], rows[1])
    for row in rows:
        inked = np.flatnonzero((row < 128).any(1))
        assert len(inked) >= 8 and abs(inked.mean() - TILE / 2) < 4, "the text is not in the middle of its row"
    assert (margin[TILE + 2 : TILE + 4] == 255).all() and (margin < 128).any()


def test_a_long_label_is_cut_and_takes_one_line():
    long, short = margin_of(["a very long name " * 20]), margin_of(["a very"])
    assert short.shape[1] < long.shape[1] <= WIDEST_LABEL + 8
    assert (margin_of(["größe", "猫"]) < 128).any()  # also on a machine without other fonts
    assert margin_of(["two\nlines"]).tolist() == margin_of(["two lines"]).tolist()


def test_originals_stand_above_their_reconstructions():
    originals, others = tiles(5), tiles(10)[5:]
    picture = np.asarray(reconstruction_grid(originals, others, columns=3, min_tile=8))
    left = picture.shape[1] - (3 * 10 + 2)
    for number, (original, other) in enumerate(zip(originals, others, strict=True)):
        top, column = 2 + number // 3 * 20, left + 2 + number % 3 * 10
        assert np.array_equal(picture[top : top + 8, column : column + 8], np.asarray(original))
        assert np.array_equal(picture[top + 10 : top + 18, column : column + 8], np.asarray(other))
    assert (picture[22:40, left + 22 : left + 30] == 255).all()  # the place of a sixth pair


def test_the_chosen_images_are_spread_over_the_classes():
    labels = np.repeat([0, 1, 2, 7], [1000, 10, 1, 500])
    chosen = spread(len(labels), 8, labels)
    assert labels[chosen].tolist() == [0, 0, 1, 1, 2, 7, 7]  # class 2 has only one image
    assert chosen == [0, 999, 1000, 1009, 1010, 1011, 1510]
    assert labels[spread(len(labels), 2, labels)].tolist() == [0, 7]
    assert spread(13, 3) == [0, 6, 12] and spread(2, 8) == [0, 1] and spread(1, 1, np.array([4])) == [0]
    many = np.arange(5000) % 1000
    assert len(set(many[spread(5000, 16, many)])) == 16


def test_a_long_row_goes_on_below_and_only_its_first_line_is_labelled():
    images = tiles(4, "L")
    picture = np.asarray(labelled_grid([("cats", images[:3]), ("dogs", images[3:])], columns=2, min_tile=8))
    left = picture.shape[1] - (2 * 10 + 2)
    places = [(0, 0), (0, 1), (1, 0), (2, 0)]
    for image, (row, column) in zip(images, places, strict=True):
        top, start = 2 + row * 10, left + 2 + column * 10
        assert np.array_equal(picture[top : top + 8, start : start + 8], np.asarray(image))
    assert labelled_grid([("", images)], columns=4, min_tile=8).size == (4 * 10 + 2, 12)  # no label, no margin
