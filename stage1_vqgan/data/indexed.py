"""Images that are read by number: from a folder, from a dataset on the disk, or from memory."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stage1_vqgan.data.columns import NO_LABELS, encoded, find_columns, require_kept, undecoded
from stage1_vqgan.data.config import DataConfig, data_problem
from stage1_vqgan.data.decoding import EncodedImage
from stage1_vqgan.data.labels import JSON, json_column, read_labels


@dataclass(frozen=True)
class ImageSource:
    """The images of one split, read by number, and their labels.

    Attributes:
        images: a list of PIL images, or a `datasets.Dataset` with one undecoded image column.
        labels: int64 `(n,)`, or None without labels.
        class_names: names of the classes 0 … C-1, or None without labels.
        opens_paths: an image without bytes is read from its path. False for the files of a stranger, who could name
            any file of this machine.
        columns: a `datasets.Dataset` of the columns that `data.columns` keeps, or None.
    """

    images: Any
    labels: np.ndarray | None
    class_names: list[str] | None
    opens_paths: bool = True
    columns: Any = None

    @property
    def num_images(self) -> int:
        """Number of images; `ImageStream` has the same property."""
        return len(self)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def has_labels(self) -> bool:
        return self.labels is not None

    def encoded(self, indices: Sequence[int]) -> list[EncodedImage]:
        """Reads images by their numbers, without decoding them."""
        if isinstance(self.images, list):
            return [EncodedImage(f"image {index}", self.images[index]) for index in indices]
        (column,) = self.images.column_names
        items, feature = self.images[list(indices)][column], self.images.features[column]
        return [encoded(item, index, self.opens_paths, feature) for item, index in zip(items, indices, strict=True)]

    def select(self, rows: np.ndarray) -> "ImageSource":
        """The source of some of the images, by their numbers, int64 `(m,)`."""
        labels, columns = self.labels, self.columns
        return replace(
            self,
            images=self.images.select(rows),
            labels=None if labels is None else labels[rows],
            columns=None if columns is None else columns.select(rows),
        )


def image_sources(config: DataConfig, train: Any, validation: Any | None) -> tuple[ImageSource, ImageSource]:
    """Training and validation images of `datasets.Dataset`s.

    Args:
        config: names the columns, and the fraction to hold out.
        train: the training split.
        validation: the validation split; None holds out training images.

    Raises:
        ConfigError: a split is empty, a column does not exist, or a label is not a class of the training split.
    """
    source = _to_source(config, train)
    if validation is None:
        held_out = np.arange(len(source)) % round(1 / config.validation_fraction) == 0
        if held_out.all():
            raise data_problem("dataset", f"{config.dataset!r} holds a single image; training needs at least two")
        return source.select(np.flatnonzero(~held_out)), source.select(np.flatnonzero(held_out))
    if not source.has_labels:
        return source, _to_source(replace(config, use_labels=False), validation)
    other = _to_source(config, validation, source.class_names)
    if not other.has_labels:
        message = f"{config.validation_split!r} has no labels, but {config.train_split!r} has"
        raise data_problem("validation_split", f"{message}; {NO_LABELS}")
    return source, other


def _to_source(config: DataConfig, split: Any, names: list[str] | None = None) -> ImageSource:
    """The images of one split; `names` are the class names of the training split, if this is the validation split."""
    if not len(split):
        raise data_problem("dataset", f"{config.dataset!r} has a split without images")
    image_column, label_column = find_columns(config, split.features)
    images = split.select_columns([image_column]).cast_column(image_column, undecoded(split.features[image_column]))
    if label_column is None:
        label_column = json_column(config, split.features, lambda: split.select_columns([JSON])[0][JSON])
    require_kept(config, split.features)
    columns = split.select_columns(config.columns) if config.columns else None
    labels, own_names = (None, None) if label_column is None else read_labels(split, label_column, names)
    return ImageSource(images, labels, own_names, columns=columns)
