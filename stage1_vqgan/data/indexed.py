"""Images that are read by number: from a folder, from a dataset on the disk, or from memory."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stage1_vqgan.data.columns import NO_LABELS, allowed_labels, encoded, find_columns, undecoded
from stage1_vqgan.data.config import DataConfig, data_problem
from stage1_vqgan.data.decoding import EncodedImage


@dataclass(frozen=True)
class ImageSource:
    """The images of one split, read by number, and their labels.

    Attributes:
        images: a list of PIL images, or a `datasets.Dataset` with one undecoded image column.
        labels: int64 `(n,)`, or None without labels.
        class_names: names of the classes 0 … C-1, or None without labels.
        opens_paths: an image without bytes is read from its path. False for the files of a stranger, who could name
            any file of this machine.
    """

    images: Any
    labels: np.ndarray | None
    class_names: list[str] | None
    opens_paths: bool = True

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
        return replace(self, images=self.images.select(rows), labels=None if self.labels is None else self.labels[rows])


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
        return ImageSource(images, None, None)
    return ImageSource(images, *_labels(split, label_column, names))


def _labels(split: Any, column: str, names: list[str] | None) -> tuple[np.ndarray, list[str]]:
    """Labels, int64 `(n,)`, and class names. If `names` are given, the labels are renumbered to match them."""
    from datasets import ClassLabel

    feature = split.features[column]
    own_names = feature.names if isinstance(feature, ClassLabel) else None
    missing = split.data.column(column).null_count
    if missing:
        raise data_problem("label_column", f"{missing} of {len(split)} rows of {column!r} have no label; {NO_LABELS}")
    values = np.asarray(split.with_format("numpy")[column][:])
    if values.ndim != 1 or values.dtype.kind not in "iuUO":
        raise data_problem("label_column", f"received {column!r}, which holds {feature}; {allowed_labels(own_names)}")
    if values.dtype.kind in "UO":
        own_names, values = np.unique(values.astype(str), return_inverse=True)
        own_names = own_names.tolist()
    top = len(own_names) if own_names is not None else np.iinfo(np.int64).max
    if values.min() < 0 or values.max() >= top:
        wrong = int(values.min()) if values.min() < 0 else int(values.max())
        raise data_problem("label_column", f"{column!r} holds {wrong}; {allowed_labels(own_names)}")
    values = values.astype(np.int64)
    if names is None:
        return values, own_names or [str(number) for number in range(int(values.max()) + 1)]
    if own_names is not None and own_names != names:
        used = {own_names[number] for number in np.unique(values)}
        unknown = sorted(used - set(names))
        if unknown:
            message = f"the validation split has classes that the training split lacks: {_few(unknown)}"
            raise data_problem("label_column", message)
        values = np.array([names.index(name) if name in used else -1 for name in own_names])[values]
    elif values.max() >= len(names):
        raise data_problem(
            "label_column",
            f"the validation split has class {values.max()}, the training split only 0 to {len(names) - 1}",
        )
    return values, names


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
