"""The contact sheet of a data set: images as the tokenizer sees them, in a row for each class."""

from collections.abc import Iterator
from itertools import groupby

import numpy as np
from PIL import Image

from stage1_vqgan.data.dataset import ImageDataset, ImageKey
from stage1_vqgan.data.indexed import ImageSource
from stage1_vqgan.data.sources import peek
from stage1_vqgan.image_processing_vqgan import VQGANImageProcessor
from stage1_vqgan.pictures import labelled_grid, spread

COLUMNS, ROWS, MIN_TILE = 8, 12, 64


def contact_sheet(dataset: ImageDataset) -> Image.Image | None:
    """A picture of training images, up to 8 of each of up to 12 classes; None if no image can be decoded.

    Args:
        dataset: prepares the images: size, channels, range of values. Without augmentation.
    """
    rows: list[tuple[str, list[Image.Image]]] = []
    processor = VQGANImageProcessor(dataset.image_shape, dataset.num_channels)
    for name, group in groupby(_keys(dataset), key=lambda entry: entry[0]):
        batch = dataset.__getitems__([key for _, key in group])
        if len(batch.indices):
            rows.append((name, processor.postprocess(batch.images())))
    return labelled_grid(rows, COLUMNS, MIN_TILE) if rows else None


def _keys(dataset: ImageDataset) -> list[tuple[str, ImageKey]]:
    """Class names and keys of the images to show, sorted by class."""
    source = dataset.source
    if isinstance(source, ImageSource):
        labels = np.zeros(len(source), dtype=np.int64) if source.labels is None else source.labels
        chosen = [(label, ImageKey(0, number)) for label, number in _numbers(labels)]
    else:
        first = peek(source, COLUMNS * ROWS)
        chosen = [(label or 0, ImageKey(0, number, 0, encoded)) for number, encoded, label in first]
        chosen.sort(key=lambda entry: entry[0])
    names = source.class_names
    return [(names[label] if names else str(label) * source.has_labels, key) for label, key in chosen]


def _numbers(labels: np.ndarray) -> Iterator[tuple[int, int]]:
    """Labels and numbers of the images to show, for labels int64 `(n,)`: spread over the classes and within each."""
    classes = np.unique(labels)
    shown = classes[spread(len(classes), ROWS)]
    for label in shown.tolist():
        of_class = np.flatnonzero(labels == label)
        yield from ((label, int(of_class[n])) for n in spread(len(of_class), COLUMNS * (ROWS // len(shown))))
