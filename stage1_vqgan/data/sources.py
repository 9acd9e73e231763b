"""Where images come from: the built-in digits, folders, parquet, tars or the Hub, as splits of encoded images."""

import logging
from typing import TypeAlias

import numpy as np
from PIL import Image

from stage1_vqgan.data.config import DataConfig
from stage1_vqgan.data.files import find_files
from stage1_vqgan.data.indexed import ImageSource, image_sources
from stage1_vqgan.data.splits import Split, open_files, open_hub
from stage1_vqgan.data.streamed import ImageStream, image_streams

DIGITS = "digits"

logger = logging.getLogger(__name__)

Images: TypeAlias = ImageSource | ImageStream


def load_images(config: DataConfig) -> tuple[Images, Images]:
    """Opens the training and the validation split, both of one kind.

    Parquet, tars and Hub datasets are streams if `config.streaming` is set; the files of a folder are always read one
    by one when they are wanted.

    Raises:
        ConfigError: the source, a split or a column does not exist, or labels are no classes of the training split.
    """
    if config.dataset == DIGITS:
        return _load_digits(config)
    files = find_files(config)
    splits = open_hub(config) if files is None else open_files(config, files)
    pair = _read_splits(config, splits)
    if config.use_labels and not pair[0].has_labels:
        logger.warning("no class labels in %s: the model will be unconditional", config.dataset)
    return pair


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
