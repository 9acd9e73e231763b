"""Class names and class ids: their order, their form, and the classes without images.

The rule: classes that a data set declares (`ClassLabel`) keep their names and ids. Otherwise the classes are the
different labels of the training split, and their ids count from 0 in this order: names that are whole numbers by value,
then words. So the folders 0 … 11 have the ids 0 … 11, and the labels 3, 70 and 900 have the ids 0, 1 and 2.
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from configs import ConfigError
from configs.names import is_whole, one_form
from configs.problems import listed, shown
from stage1_vqgan.data.columns import NO_LABELS, allowed_labels
from stage1_vqgan.data.config import DataConfig, data_problem

LONGEST_NAME = 200  # characters of a class name
MOST_NAMED = 10  # classes or folders in a message
JSON = "json"  # the column of a tar that holds JSON files

logger = logging.getLogger(__name__)


def class_name(label: Any) -> str:
    """The name of a class. Accents that are letters of their own and composed letters become one form (NFC)."""
    return one_form(str(label))


def in_order(names: Iterable[str]) -> list[str]:
    """The different names: whole numbers by value, then words."""
    return sorted(set(names), key=lambda name: (0, int(name), name) if is_whole(name) else (1, 0, name))


def numbered(labels: np.ndarray | Sequence[Any]) -> tuple[np.ndarray, list[str]]:
    """Class ids, int64 `(n,)`, and class names of labels `(n,)` that are whole numbers or words."""
    values, places = np.unique(np.asarray(labels), return_inverse=True)
    own_names = [class_name(value) for value in values]
    names = in_order(own_names)
    ids = {name: number for number, name in enumerate(names)}
    return np.array([ids[name] for name in own_names], dtype=np.int64)[places], names


def read_labels(split: Any, column: str, names: list[str] | None) -> tuple[np.ndarray, list[str]]:
    """Class ids, int64 `(n,)`, and class names of a split.

    Args:
        split: a `datasets.Dataset`.
        column: its column of labels; or `json.KEY`, a key in a column of JSON texts.
        names: class names of the training split, if this is the validation split; ids are then found by name.

    Raises:
        ConfigError: labels are missing, are neither whole numbers nor words, or are no class of the training split.
    """
    from datasets import ClassLabel

    feature = split.features.get(column)
    declared = [class_name(name) for name in feature.names] if isinstance(feature, ClassLabel) else None
    values = _values(split, column, declared)
    if declared is not None:
        _require_different(declared, column)
        ids, own_names = values.astype(np.int64), declared
    elif names and values.dtype.kind in "iu" and not any(map(is_whole, names)):  # numbers of classes that have words
        _require_range(values, names, column)
        return values.astype(np.int64), names
    else:
        ids, own_names = numbered(values)
    if names is None or own_names == names:
        return ids, own_names
    return _renumbered(ids, own_names, names), names


def json_column(config: DataConfig, features: Mapping[str, Any], read_first: Callable[[], Any]) -> str | None:
    """`json.label` if the JSON files of a tar have this key, else None. A warning lists the keys that they have.

    Args:
        config: whether labels are wanted.
        features: the columns.
        read_first: returns the first JSON text.
    """
    if not config.use_labels or JSON not in features:
        return None
    try:
        keys = _json(read_first(), JSON)
    except ConfigError:
        return None
    if "label" in keys:
        return f"{JSON}.label"
    logger.warning(
        "no key of the JSON files is named label; one of %s may be: data.label_column json.KEY",
        listed(keys, MOST_NAMED),
    )
    return None


def json_label(text: str | bytes | None, column: str) -> Any:
    """The label in a JSON text; `column` is `json.KEY`. None without a text or a key."""
    return _json(text, column).get(column.removeprefix(f"{JSON}."))


def _json(text: str | bytes | None, column: str) -> dict[str, Any]:
    try:
        value = {} if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise data_problem("label_column", f"{column!r}: {shown(text)} is not JSON; {NO_LABELS}") from error
    return value if isinstance(value, dict) else {}


def warn_of_classes(labels: np.ndarray, names: Sequence[str]) -> None:
    """Warns of classes without images, of numbers that are not their own ids, and of labels that may be captions.

    Args:
        labels: class ids of the training images, int64 `(n,)`.
        names: names of the classes.
    """
    counts = np.bincount(labels, minlength=len(names))
    warn_of_empty_classes(names, counts.tolist())
    others = [f"{name} (id {id_})" for id_, name in enumerate(names) if is_whole(name) and int(name) != id_]
    if others:
        message = "the ids of these classes are not the numbers that name them, so ask for them by name: %s"
        logger.warning(message, listed(others, MOST_NAMED))
    used = np.count_nonzero(counts)
    if used > max(10, 2 * len(labels) // 3):
        message = "%d training images have %d different labels; if they are captions, set data.use_labels to false"
        logger.warning(message, len(labels), used)


def warn_of_empty_classes(names: Sequence[str], counts: Sequence[int]) -> None:
    """Warns of classes without training images; `counts` are the numbers of images."""
    empty = [name for name, count in zip(names, counts, strict=True) if not count]
    if empty:
        message = "%d of the %d classes have no training images, so a prior cannot learn them: %s"
        logger.warning(message, len(empty), len(names), listed(empty, MOST_NAMED))


def _values(split: Any, column: str, declared: list[str] | None) -> np.ndarray:
    """The labels as they are stored, `(n,)`: whole numbers, or texts that are not all whole numbers."""
    if column not in split.features:
        stored = [json_label(text, column) for text in split[JSON][:]]
        missing = sum(value is None for value in stored)
    else:
        stored, missing = split.with_format("numpy")[column][:], split.data.column(column).null_count
    if missing:
        raise data_problem("label_column", f"{missing} of {len(split)} rows of {column!r} have no label; {NO_LABELS}")
    values: np.ndarray = np.asarray(stored, dtype=None if not isinstance(stored, list) else _dtype(stored))
    if values.dtype.kind == "b":
        values = values.astype(str)
    if values.dtype.kind == "O" and all(isinstance(value, str) for value in values):
        values = values.astype(str)
    if values.ndim != 1 or values.dtype.kind not in "iuU":
        holds = split.features.get(column, "other values")
        raise data_problem("label_column", f"{column!r} holds {holds}; {allowed_labels(declared)}")
    longest = values.dtype.itemsize // 4 if values.dtype.kind == "U" else 0
    if longest > LONGEST_NAME:
        message = f"{column!r} holds a label of {longest:,} characters; allowed are {LONGEST_NAME}"
        raise data_problem("label_column", f"{message} ({NO_LABELS})")
    if values.dtype.kind in "iu":
        _require_range(values, declared, column)
    elif all(map(is_whole, texts := np.unique(values).tolist())):
        _require_range(np.array(texts, dtype=np.int64), None, column)
    return values


def _dtype(values: list[Any]) -> type:
    """The type of labels from JSON, where a whole number may be text in one file and not in another."""
    kinds = {type(value) for value in values}
    return int if kinds == {int} else str if kinds <= {int, str, bool} else object


def _require_range(values: np.ndarray, names: Sequence[str] | None, column: str) -> None:
    top = len(names) if names is not None else np.iinfo(np.int64).max
    if values.min() < 0 or values.max() >= top:
        wrong = int(values.min()) if values.min() < 0 else int(values.max())
        raise data_problem("label_column", f"{column!r} holds {wrong}; {allowed_labels(names)}")


def _require_different(names: Sequence[str], column: str) -> None:
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1] if len(set(names)) < len(names) else []
    if twice:
        message = f"{column!r} declares classes that differ only in their Unicode form: {listed(twice, MOST_NAMED)}"
        raise data_problem("label_column", f"{message}; rename them")


def _renumbered(ids: np.ndarray, own_names: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Ids of a validation split as ids of the training split, by name."""
    used = [own_names[number] for number in np.unique(ids)]
    unknown = [name for name in used if name not in set(names)]
    if unknown:
        message = f"the validation split has classes that the training split lacks: {listed(unknown, MOST_NAMED)}"
        raise data_problem("label_column", message)
    of_name = {name: number for number, name in enumerate(names)}
    return np.array([of_name.get(name, -1) for name in own_names], dtype=np.int64)[ids]
