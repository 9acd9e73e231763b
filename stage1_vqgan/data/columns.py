"""Finds the columns of a split that hold images and labels."""

from collections.abc import Mapping, Sequence
from typing import Any

from stage1_vqgan.data.arrays import number_type, to_numbers
from stage1_vqgan.data.config import DataConfig, data_problem
from stage1_vqgan.data.decoding import EncodedImage

# Columns that are labels by their names, if no column is declared as one: of a table, and of a tar.
LABEL_NAMES = ("label", "cls")
NO_LABELS = "set data.use_labels to false to train without labels"


def find_columns(config: DataConfig, features: Mapping[str, Any]) -> tuple[str, str | None]:
    """Names of the image column and of the label column (None without labels).

    Args:
        config: names the columns, or leaves them to be found by type.
        features: the `datasets` feature of every column, by name.

    Raises:
        ConfigError: a named column does not exist or holds no images, or the type fits no column or several.
    """
    return _image_column(config, features), _label_column(config, features) if config.use_labels else None


def require_kept(config: DataConfig, features: Mapping[str, Any]) -> None:
    """Checks `data.columns`.

    Raises:
        ConfigError: a column does not exist, or holds neither text nor numbers.
    """
    from datasets import ClassLabel, Value

    for name in config.columns:
        if name not in features:
            raise data_problem("columns", f"received {name!r}; the columns are {', '.join(features)}")
        if not isinstance(features[name], Value | ClassLabel):
            raise data_problem("columns", f"{name!r} holds {features[name]}; only text and numbers can be kept")


def undecoded(feature: Any = None) -> Any:
    """The `datasets` feature that reads a column of images without decoding: as bytes, or as nested lists of numbers.

    Args:
        feature: the column's own feature; None for a column of images.
    """
    from datasets import Image as ImageFeature

    return ImageFeature(decode=False) if number_type(feature) is None else feature


def encoded(item: Any, number: int, opens_paths: bool, feature: Any = None) -> EncodedImage:
    """An entry of an undecoded image column. Messages name it by its path, else by its number.

    An entry without bytes is empty if `opens_paths` is False, and is then skipped as an image that cannot be decoded.

    Args:
        item: the entry: bytes and path, or nested lists of numbers.
        number: number of the image in the source.
        opens_paths: see `ImageSource`.
        feature: the column's feature, which states the type of numbers.
    """
    if isinstance(item, list):
        _, dtype = number_type(feature) or (0, "float64")
        return EncodedImage(f"image {number}", to_numbers(item, dtype))
    if item is None:
        return EncodedImage(f"image {number}", b"")
    path, content = item["path"], item["bytes"]
    if content is None and (path is None or not opens_paths):
        return EncodedImage(path or f"image {number}", b"")
    if content is None and "://" in path:  # the Hub dataset consists of single files
        from datasets.utils.file_utils import xopen

        with xopen(path, "rb") as file:
            content = file.read()
    return EncodedImage(path or f"image {number}", path if content is None else content)


def allowed_labels(names: Sequence[str] | None) -> str:
    """The allowed values of a label column, in words; `names` are the class names of a `ClassLabel`."""
    numbers = "class numbers from 0 up, or class names"
    if names is not None:
        numbers = f"class numbers from 0 to {len(names) - 1}"
    return f"its values must be {numbers}, none missing ({NO_LABELS})"


def _image_column(config: DataConfig, features: Mapping[str, Any]) -> str:
    from datasets import Dataset, Features, Image as ImageFeature

    names = list(features)
    found = [name for name in names if isinstance(features[name], ImageFeature)]
    if config.image_column is None and len(found) > 1:
        raise data_problem("image_column", f"several columns hold images; name one: {', '.join(found)}")
    column = config.image_column or next(iter(found), "image" if "image" in names else None)
    if column is None:
        raise data_problem("image_column", f"no column holds images; the columns are {', '.join(names)}")
    if column not in names:
        raise data_problem("image_column", f"received {column!r}; the columns are {', '.join(names)}")
    numbers = number_type(features[column])
    if numbers is not None and numbers[0] not in (2, 3):
        message = (
            f"received {column!r}, which holds lists of numbers {numbers[0]} deep, so an image has no height or width"
        )
        raise data_problem("image_column", f"{message}; store rows of pixels (lists of lists), or PNG files")
    try:
        empty = Dataset.from_dict({column: []}, features=Features({column: features[column]}))
        empty.cast_column(column, undecoded(features[column]))
    except Exception as error:  # Arrow raises another exception for each type that is not an image
        message = f"received {column!r}; its values are not images but {features[column]}"
        raise data_problem("image_column", message) from error
    return column


def _label_column(config: DataConfig, features: Mapping[str, Any]) -> str | None:
    from datasets import ClassLabel

    names = list(features)
    found = [name for name in names if isinstance(features[name], ClassLabel)]
    if config.label_column is None and len(found) > 1:
        raise data_problem("label_column", f"several columns hold class labels; name one: {', '.join(found)}")
    known = [name for name in names if name in LABEL_NAMES or name.endswith(".cls")]
    column = config.label_column or next(iter(found or known), None)
    is_key = column is not None and column.startswith("json.") and "json" in names
    if column is not None and column not in names and not is_key:
        raise data_problem("label_column", f"received {column!r}; the columns are {', '.join(names)}")
    return column
