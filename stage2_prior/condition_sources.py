"""The conditions of the images of a data set: opens them, and computes their tokens row by row.

A class or a text stands in a column of the image's row. A condition image stands in a column too, or is made from the
image itself; `encoding` computes its codes.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from configs import ConfigError, Problem
from configs.problems import shown
from stage1_vqgan import DataConfig, ImageDataset, Images, ImageSource, VQGANModel, load_images, read_labels
from stage2_prior.condition_text import Tokenizer, encode_texts, text_tokens
from stage2_prior.conditions import Segment
from stage2_prior.training.condition_config import ConditionConfig
from stage2_prior.training.config import Stage2Config

# Values of the columns of an image, by the name of the column; None if the source has none.
Columns = dict[str, Any] | None


@dataclass(frozen=True)
class ClassCondition:
    """A class of the images of one split.

    Attributes:
        segment: its place in the prompt.
        column: its column.
        labels: int64 `(n,)`, the class ids of all images; None for a stream, whose column holds them.
    """

    segment: Segment
    column: str
    labels: np.ndarray | None

    def ids(self, source: Images, numbers: Sequence[int], rows: Sequence[Columns]) -> np.ndarray:
        """The class ids of some images, int64 `(n, 1)`; see `TextCondition.ids`."""
        if self.labels is not None:
            return self.labels[list(numbers)][:, None]
        found = values_of(source, self.column, numbers, rows)
        for label in found:
            if not isinstance(label, int) or not 0 <= label < self.segment.num_tokens:
                allowed = f"its values must be class numbers from 0 to {self.segment.num_tokens - 1}, none missing"
                raise column_problem(self.segment.name, f"the stream holds {shown(label)}; {allowed}")
        return np.array(found, dtype=np.int64).reshape(-1, 1)


@dataclass(frozen=True)
class TextCondition:
    """A text of the images of one split.

    Attributes:
        segment: its places in the prompt.
        column: its column.
        tokenizer: the text tokenizer.
        counts: number of texts that were encoded, and of those that were cut.
    """

    segment: Segment
    column: str
    tokenizer: Tokenizer
    counts: Counter[str] = field(default_factory=Counter)

    def ids(self, source: Images, numbers: Sequence[int], rows: Sequence[Columns]) -> np.ndarray:
        """The tokens of some images.

        Args:
            source: the images.
            numbers: their numbers, for a source that is read by number.
            rows: their columns, for a stream.

        Returns:
            int64 `(n, length)`, each counted from 0 in the segment.
        """
        texts = values_of(source, self.column, numbers, rows)
        self.counts["texts"] += len(texts)
        self.counts["cut"] += sum(len(ids) > self.segment.length for ids in text_tokens(self.tokenizer, texts))
        return encode_texts(self.tokenizer, texts, self.segment).numpy()


@dataclass(frozen=True)
class ImageCondition:
    """A condition image of the images of one split.

    Attributes:
        segment: its places in the prompt; `segment.transform` makes it from the image.
        tokenizer: computes its codes.
        dataset: the condition images, if they stand in a column.
    """

    segment: Segment
    tokenizer: VQGANModel
    dataset: ImageDataset | None


Condition = ClassCondition | TextCondition | ImageCondition


def values_of(source: Images, column: str, numbers: Sequence[int], rows: Sequence[Columns]) -> list[Any]:
    """The values of a column; see `TextCondition.ids`."""
    if isinstance(source, ImageSource):
        found: list[Any] = source.columns.select_columns([column])[list(numbers)][column]
        return found
    return [(row or {})[column] for row in rows]


def load_with_conditions(config: Stage2Config) -> tuple[Images, Images]:
    """The training and the validation split; they keep the columns of classes and texts besides `data.columns`.

    Raises:
        ConfigError: see `load_images`; or the column of a condition does not exist.
    """
    columns = {
        str(condition.column): name for name, condition in config.conditions.items() if condition.kind != "image"
    }
    kept = list(dict.fromkeys([*config.data.columns, *columns]))
    try:
        return load_images(replace(config.data, columns=kept))
    except ConfigError as error:
        raise ConfigError([_about_condition(problem, columns) for problem in error.problems]) from error


def _about_condition(problem: Problem, columns: dict[str, str]) -> Problem:
    """A problem of `data.columns` as one of the condition whose column it is about."""
    names = [name for column, name in columns.items() if repr(column) in problem.message.partition(";")[0]]
    if problem.key != "data.columns" or not names:
        return problem
    return Problem(f"conditions.{names[0]}.column", problem.message)


def load_condition_images(name: str, column: str, data: DataConfig) -> tuple[Images, Images]:
    """The images of another column, in the order of the images themselves.

    Raises:
        ConfigError: the column does not exist or holds no images.
    """
    try:
        return load_images(replace(data, image_column=column, use_labels=False, columns=[]))
    except ConfigError as error:
        keys = {"data.image_column": f"conditions.{name}.column"}
        found = [Problem(keys.get(problem.key, problem.key), problem.message) for problem in error.problems]
        raise ConfigError(found) from error


def class_names(
    name: str, condition: ConditionConfig, train: Images, validation: Images
) -> tuple[list[str], list[np.ndarray | None]]:
    """The class names in the training split, and the class ids of both splits; None for a stream.

    Raises:
        ConfigError: labels are missing, or are no class of the training split; or the column of a stream does not
            declare its classes.
    """
    column = str(condition.column)
    try:
        if isinstance(train, ImageSource) and isinstance(validation, ImageSource):
            ids, names = read_labels(train.columns, column, None)
            return names, [ids, read_labels(validation.columns, column, names)[0]]
    except ConfigError as error:
        raise column_problem(name, *(problem.message for problem in error.problems)) from error
    declared = [getattr(_features(source)[column], "names", None) for source in (train, validation)]
    if not declared[0] or declared[0] != declared[1]:
        message = f"received {column!r}; a stream is not searched for class names, so both splits must declare them"
        raise column_problem(name, f"{message} (ClassLabel), and the same ones; or set data.streaming to false")
    return declared[0], [None, None]


def training_texts(name: str, condition: ConditionConfig, train: Images) -> list[str | None]:
    """The texts of the training split.

    Raises:
        ConfigError: the images are a stream.
    """
    if not isinstance(train, ImageSource):
        message = f"a stream is not read for training a text tokenizer; give conditions.{name}.tokenizer"
        raise ConfigError([Problem(f"conditions.{name}.tokenizer", f"{message}, or set data.streaming to false")])
    return list(train.columns[str(condition.column)])


def require_texts(name: str, condition: ConditionConfig, train: Images) -> None:
    """Checks the type of the column of a text.

    Raises:
        ConfigError: the column holds something else.
    """
    feature = _features(train)[str(condition.column)]
    if getattr(feature, "dtype", None) not in ("string", "large_string"):
        message = f"received {condition.column!r}, which holds {feature}"
        raise column_problem(name, f"{message}; a text needs text (classes need kind class)")


def column_problem(name: str, *messages: str) -> ConfigError:
    """The error of the column of a condition."""
    return ConfigError([Problem(f"conditions.{name}.column", message) for message in messages])


def _features(source: Images) -> dict[str, Any]:
    """The `datasets` feature of every column."""
    found: dict[str, Any] = source.columns.features if isinstance(source, ImageSource) else source.images.features
    return found
