"""The sources of images: `load_images` opens the built-in digits, a folder, parquet or tar files, or a Hub dataset.

To add a source, return a training and a validation split from `load_images`, each of one of two kinds:
- `ImageSource` (indexed.py) reads an image by its number. The digits are an example: PIL images in memory.
- `ImageStream` (streamed.py) reads images in order. It wraps a `datasets.IterableDataset`.
A source that `datasets` can open needs only another branch in splits.py: columns, labels and validation images are
then found by the existing code.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from configs.problems import listed
from stage1_vqgan.data.config import DataConfig, data_problem
from stage1_vqgan.data.decoding import EncodedImage
from stage1_vqgan.data.files import find_files
from stage1_vqgan.data.indexed import ImageSource, image_sources
from stage1_vqgan.data.labels import MOST_NAMED, warn_of_classes
from stage1_vqgan.data.splits import Split, open_files, open_hub
from stage1_vqgan.data.streamed import ImageStream, image_streams
from stage1_vqgan.pictures import spread

DIGITS = "digits"
# Types of columns that may hold labels.
LABEL_TYPES = {
    "string",
    "large_string",
    "bool",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
}

logger = logging.getLogger(__name__)

Images: TypeAlias = ImageSource | ImageStream


def load_images(config: DataConfig) -> tuple[Images, Images]:
    """Opens the training and the validation split.

    With `config.streaming`, parquet, tar and Hub sources are `ImageStream`s. Everything else is an `ImageSource`; the
    files of a folder are read only when they are needed.

    Raises:
        ConfigError: the source, a split or a column does not exist, or a label is not a class of the training split.
    """
    if config.dataset == DIGITS and config.columns:
        raise data_problem("columns", f"received {config.columns}; {DIGITS!r} has no further columns")
    if config.dataset == DIGITS:
        return _load_digits(config)
    files = find_files(config)
    splits = open_hub(config) if files is None else open_files(config, files)
    pair = _read_splits(config, splits)
    if files is not None and files.kind not in ("images", "list"):
        pair = replace(pair[0], opens_paths=False), replace(pair[1], opens_paths=False)
    if config.use_labels and not pair[0].has_labels:
        _warn_of_no_labels(config, splits[config.train_split].dataset.features)
    elif isinstance(pair[0], ImageSource) and pair[0].labels is not None:
        warn_of_classes(pair[0].labels, pair[0].class_names or [])
    return pair


def peek(source: Images, count: int) -> Iterator[tuple[int, EncodedImage, int | None]]:
    """Number, image and label of at most `count` images: spread evenly over a source, the first ones of a stream."""
    if isinstance(source, ImageSource):
        for number in spread(len(source), count):
            label = None if source.labels is None else int(source.labels[number])
            yield number, source.encoded([number])[0], label
        return
    with closing(source.read()) as items:
        for number, (encoded, label) in enumerate(islice(items, count)):
            yield number, encoded, label


def _warn_of_no_labels(config: DataConfig, features: Mapping[str, Any]) -> None:
    """Says that a model will be unconditional, and which columns may hold labels."""
    from datasets import Value

    names = [name for name, kind in features.items() if isinstance(kind, Value) and not name.startswith("__")]
    names = [name for name in names if name != config.image_column and features[name].dtype in LABEL_TYPES]
    hint = (
        f"; if one of the columns {listed(names, MOST_NAMED)} holds classes, name it: data.label_column"
        if names
        else ""
    )
    logger.warning("%s has no class labels: the model will be unconditional%s", config.dataset, hint)


def _read_splits(config: DataConfig, splits: dict[str, Split]) -> tuple[Images, Images]:
    train = splits[config.train_split]
    validation = None if config.validation_split is None else splits[config.validation_split]
    if hasattr(train.dataset, "num_rows"):
        return image_sources(config, train.dataset, None if validation is None else validation.dataset)
    return image_streams(config, train, validation)


def _load_digits(config: DataConfig) -> tuple[ImageSource, ImageSource]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    is_test = np.arange(len(pixels)) % 5 == 0

    def split(mask: np.ndarray) -> ImageSource:
        labels = digits.target[mask].astype(np.int64) if config.use_labels else None
        names = [str(digit) for digit in range(10)] if config.use_labels else None
        return ImageSource([Image.fromarray(image) for image in pixels[mask]], labels, names)

    return split(~is_test), split(is_test)
