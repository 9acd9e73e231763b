"""Where images come from: the built-in digits, a folder, parquet or the Hub, as splits of encoded images."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from configs import ConfigError, Problem
from stage1_vqgan.data_config import DataConfig
from stage1_vqgan.decoding import EncodedImage

DIGITS = "digits"

logger = logging.getLogger(__name__)


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

    def __len__(self) -> int:
        return len(self.images)

    def encoded(self, indices: Sequence[int]) -> list[EncodedImage]:
        """Images as they are stored, by index."""
        if isinstance(self.images, list):
            return [EncodedImage(f"image {index}", self.images[index]) for index in indices]
        (column,) = self.images.column_names
        items = self.images[list(indices)][column]
        return [
            EncodedImage(item["path"] or f"image {index}", item["path"] if item["bytes"] is None else item["bytes"])
            for item, index in zip(items, indices, strict=True)
        ]


def load_images(config: DataConfig) -> tuple[ImageSource, ImageSource]:
    """Opens the training and the validation split.

    Raises:
        ConfigError: the source, a split or a column does not exist.
    """
    if config.dataset == DIGITS:
        return _load_digits(config)
    return _load_dataset(config)


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


def _load_dataset(config: DataConfig) -> tuple[ImageSource, ImageSource]:
    import datasets

    path = Path(config.dataset).expanduser()
    if not path.exists() and _looks_like_a_path(config.dataset):
        raise ConfigError(
            [Problem("data.dataset", f"received {config.dataset!r}; there is no such file or folder (give 'digits', "
                     "a folder of images or parquet files, a parquet file, or a Hub dataset id)")]
        )  # fmt: skip
    try:
        if path.is_file():
            splits = datasets.load_dataset("parquet", data_files={config.train_split: str(path)})
        else:
            source = str(path) if path.is_dir() else config.dataset
            splits = datasets.load_dataset(source, name=config.dataset_config_name)
    except Exception as error:  # datasets raises many kinds; each means that this source cannot be used
        raise ConfigError([Problem("data.dataset", f"{config.dataset!r} cannot be loaded: {error}")]) from error
    for key in ("train_split", "validation_split"):
        name = getattr(config, key)
        if name is not None and name not in splits:
            raise ConfigError([Problem(f"data.{key}", f"received {name!r}; the dataset has {sorted(splits)}")])
    train = splits[config.train_split]
    if config.validation_split is not None:
        pair = _to_source(train, config), _to_source(splits[config.validation_split], config)
    else:
        held_out = np.arange(len(train)) % round(1 / config.validation_fraction) == 0
        training, validation = (train.select(np.flatnonzero(chosen)) for chosen in (~held_out, held_out))
        pair = _to_source(training, config), _to_source(validation, config)
    if pair[0].labels is None and config.use_labels:
        logger.warning("no class labels in %s: the model will be unconditional", config.dataset)
    # classes without names are counted over both splits
    names = max((source.class_names for source in pair if source.class_names is not None), key=len, default=None)
    return replace(pair[0], class_names=names), replace(pair[1], class_names=names)


def _to_source(split: Any, config: DataConfig) -> ImageSource:
    from datasets import ClassLabel
    from datasets import Image as ImageFeature

    image_columns = [name for name, feature in split.features.items() if isinstance(feature, ImageFeature)]
    image_column = config.image_column or (image_columns[0] if len(image_columns) == 1 else "image")
    if image_column not in split.features:
        raise ConfigError(
            [Problem("data.image_column", f"received {config.image_column!r}; the columns are {split.column_names}")]
        )
    try:
        images = split.select_columns([image_column]).cast_column(image_column, ImageFeature(decode=False))
    except Exception as error:  # Arrow's own kinds, one for each type that is not an image
        message = f"received {image_column!r}; its values are not images but {split.features[image_column]}"
        raise ConfigError([Problem("data.image_column", message)]) from error

    label_columns = [name for name, feature in split.features.items() if isinstance(feature, ClassLabel)]
    if config.use_labels and config.label_column is None and len(label_columns) > 1:
        message = f"there are several columns of class labels; name one: {', '.join(label_columns)}"
        raise ConfigError([Problem("data.label_column", message)])
    label_column = config.label_column or (label_columns[0] if label_columns else None)
    if not config.use_labels or label_column is None:
        return ImageSource(images, None, None)
    if label_column not in split.features:
        raise ConfigError(
            [Problem("data.label_column", f"received {label_column!r}; the columns are {split.column_names}")]
        )
    labels = np.asarray(split.with_format("numpy")[label_column][:])
    if not np.issubdtype(labels.dtype, np.integer) or labels.min(initial=0) < 0:
        raise ConfigError(
            [Problem("data.label_column", f"received {label_column!r}; its values must be class numbers from 0 up")]
        )
    feature = split.features[label_column]
    names = feature.names if isinstance(feature, ClassLabel) else [str(n) for n in range(int(labels.max()) + 1)]
    return ImageSource(images, labels.astype(np.int64), list(names))


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix == ".parquet"
