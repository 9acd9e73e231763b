"""Images that are read by number: of a folder, of a data set that lies on the disk, or in memory."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stage1_vqgan.data.columns import NO_LABELS, allowed_labels, encoded, find_columns, undecoded
from stage1_vqgan.data.config import DataConfig, data_problem
from stage1_vqgan.data.decoding import EncodedImage


@dataclass(frozen=True)
class ImageSource:
    """One split: encoded or decoded images by index, with their labels.

    Attributes:
        images: PIL images, or a `datasets.Dataset` of one undecoded image column.
        labels: int64 `(n,)`, or None.
        class_names: names of the labels 0 … C-1, or None.
    """

    images: Any
    labels: np.ndarray | None
    class_names: list[str] | None

    @property
    def num_images(self) -> int:
        """As of a stream."""
        return len(self)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def has_labels(self) -> bool:
        return self.labels is not None

    def encoded(self, indices: Sequence[int]) -> list[EncodedImage]:
        """Images as they are stored, by index."""
        if isinstance(self.images, list):
            return [EncodedImage(f"image {index}", self.images[index]) for index in indices]
        (column,) = self.images.column_names
        items = self.images[list(indices)][column]
        return [encoded(item, index) for item, index in zip(items, indices, strict=True)]

    def select(self, rows: np.ndarray) -> "ImageSource":
        """The images of some rows, int64 `(m,)`, of a data set."""
        return replace(self, images=self.images.select(rows), labels=None if self.labels is None else self.labels[rows])


def image_sources(config: DataConfig, train: Any, validation: Any | None) -> tuple[ImageSource, ImageSource]:
    """Training and validation images of one or two splits, each a `datasets.Dataset`.

    Raises:
        ConfigError: a split is empty or has no such columns, or its labels are no classes of the training split.
    """
    source = _to_source(config, train)
    if validation is None:
        held_out = np.arange(len(source)) % round(1 / config.validation_fraction) == 0
        if held_out.all():
            raise data_problem("dataset", f"{config.dataset!r} holds a single image: none is left to train with")
        return source.select(np.flatnonzero(~held_out)), source.select(np.flatnonzero(held_out))
    if not source.has_labels:
        return source, _to_source(replace(config, use_labels=False), validation)
    other = _to_source(config, validation, source.class_names)
    if not other.has_labels:
        raise data_problem("validation_split", f"{config.validation_split!r} has no labels, {config.train_split!r} has")
    return source, other


def _to_source(config: DataConfig, split: Any, names: list[str] | None = None) -> ImageSource:
    """The images of one split; names of the classes may be given by the training split."""
    if not len(split):
        raise data_problem("dataset", f"{config.dataset!r} has a split without images")
    image_column, label_column = find_columns(config, split.features)
    images = split.select_columns([image_column]).cast_column(image_column, undecoded())
    if label_column is None:
        return ImageSource(images, None, None)
    return ImageSource(images, *_labels(split, label_column, names))


def _labels(split: Any, column: str, names: list[str] | None) -> tuple[np.ndarray, list[str]]:
    """int64 `(n,)` and the names of the classes; those of the training split if they are given."""
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
            message = f"the validation split has classes the training split has not: {_few(unknown)}"
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
