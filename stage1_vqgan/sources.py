"""Where images come from: the built-in digits, folders, parquet, tars or the Hub, as splits of encoded images."""

import logging
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
from PIL import Image

from configs import ConfigError, Problem
from stage1_vqgan.data_config import DataConfig
from stage1_vqgan.decoding import EncodedImage
from stage1_vqgan.source_files import ALLOWED, SourceFiles, class_folders, find_files

DIGITS = "digits"
WEBDATASET_LABEL = "cls"

T = TypeVar("T")

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
        return [_encoded(item, index) for item, index in zip(items, indices, strict=True)]


@dataclass(frozen=True)
class ImageStream:
    """One split that is read from front to back, never by number; of no length, which may be unknown.

    Attributes:
        images: a `datasets.IterableDataset` of an undecoded image column, and a column of labels if there are any.
        image_column, label_column: their names; without labels the latter is None.
        class_names: names of the labels 0 … C-1, or None where labels are plain numbers or there are none.
        num_images: if it is known.
        shuffle_buffer_size: images from which the next one is drawn in a shuffled pass.
        is_part: the images are a range of a stream, which has to be counted from its beginning: its files cannot be
            shared out.
    """

    images: Any
    image_column: str
    label_column: str | None
    class_names: list[str] | None
    num_images: int | None
    shuffle_buffer_size: int = 1000
    is_part: bool = False

    @property
    def has_labels(self) -> bool:
        return self.label_column is not None

    def read(
        self, rank: int = 0, world_size: int = 1, shuffle: tuple[int, int] | None = None
    ) -> Generator[tuple[EncodedImage, int | None], None, None]:
        """Images with their labels; those of all processes together are every image once.

        A process reads files of its own where their number is a multiple of the processes, the same in every pass, so
        that a pass of one process always has the same length. Otherwise it reads everything and keeps its share.

        Args:
            rank, world_size: this process and how many there are.
            shuffle: (seed, epoch): the order of files, and of images within the buffer, is a function of it.

        Raises:
            ConfigError: a label is no class number.
        """
        images, own_files = self.images, self._has_own_files(world_size)
        if own_files:
            images = images.shard(num_shards=world_size, index=rank, contiguous=False)
        items = self._items([images])
        if shuffle is not None:
            rng = np.random.default_rng(shuffle)
            files = [images]
            if not self.is_part:
                num_files = images.num_shards
                files = [images.shard(num_shards=num_files, index=index) for index in rng.permutation(num_files)]
            items = _shuffled(self._items(files), self.shuffle_buffer_size, rng)
        yield from items if own_files else islice(items, rank, None, world_size)

    def length(self, rank: int, world_size: int) -> int | None:
        """Images in a pass of one process, if it is known before reading."""
        if self.num_images is None:
            return None
        if world_size > 1 and self._has_own_files(world_size):
            return None  # the files of a process may be larger or smaller than those of another
        return len(range(rank, self.num_images, world_size))

    def _has_own_files(self, world_size: int) -> bool:
        return not self.is_part and self.images.num_shards % world_size == 0

    def _items(self, files: Iterable[Any]) -> Iterator[tuple[EncodedImage, int | None]]:
        numbers = count()
        for rows in chain.from_iterable(file.iter(batch_size=16) for file in files):
            items = rows[self.image_column]
            labels = rows[self.label_column] if self.label_column is not None else [None] * len(items)
            for item, label, number in zip(items, labels, numbers, strict=False):
                yield _encoded(item, number), None if self.label_column is None else self._checked(label)

    def _checked(self, label: Any) -> int:
        if not isinstance(label, int) or label < 0 or (self.class_names and label >= len(self.class_names)):
            raise _problem("label_column", f"the stream holds the label {label!r}; {_allowed_labels(self.class_names)}")
        return label


def _shuffled(items: Iterable[T], buffer_size: int, rng: np.random.Generator) -> Iterator[T]:
    """Each item is one drawn from a buffer, whose place the next one takes; a function of the generator's state.

    `datasets` shuffles alike, in a way that changes between its releases, and waits 5 seconds after each pass over
    parquet files.
    """
    buffer: list[T] = []
    for item in items:
        if len(buffer) < buffer_size:
            buffer.append(item)
        else:
            place = rng.integers(buffer_size)
            drawn, buffer[place] = buffer[place], item
            yield drawn
    yield from (buffer[place] for place in rng.permutation(len(buffer)))


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
    splits = _open_hub(config) if files is None else _open_files(config, files)
    pair = _load_splits(config, splits)
    if config.use_labels and not pair[0].has_labels:
        logger.warning("no class labels in %s: the model will be unconditional", config.dataset)
    return pair


def _load_splits(config: DataConfig, splits: dict[str, "_Split"]) -> tuple[Images, Images]:
    train = splits[config.train_split]
    validation = None if config.validation_split is None else splits[config.validation_split]
    if hasattr(train.dataset, "num_rows"):
        return _sources(config, train.dataset, None if validation is None else validation.dataset)
    return _streams(config, train, validation)


class _Split(NamedTuple):
    """A split as `datasets` opens it, and the number of its images if that is known."""

    dataset: Any
    num_images: int | None


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


def _open_files(config: DataConfig, files: SourceFiles) -> dict[str, "_Split"]:
    """The splits that are asked for.

    Each is opened by itself from a list of files: datasets would read meaning into words of their paths. Images are
    listed rather than left to datasets' "imagefolder", which knows fewer extensions and guesses splits and classes.
    """
    _check_splits(config, files.splits)
    wanted = [name for name in (config.train_split, config.validation_split) if name is not None]
    if files.kind != "images":
        return {name: _open_packed(config, files.kind, files.splits[name]) for name in wanted}
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    splits = {}
    with_labels = config.use_labels
    for name in wanted:
        columns: dict[str, list] = {"image": [str(file) for file in files.splits[name]]}
        features: dict[str, Any] = {"image": ImageFeature(decode=False)}
        classes = class_folders(files.splits[name], files.roots[name]) if with_labels else None
        if name == config.train_split:
            with_labels = classes is not None and len(set(classes)) > 1  # a single folder tells nothing apart
        if with_labels and classes is not None:
            names, labels = np.unique(classes, return_inverse=True)
            columns["label"], features["label"] = labels.tolist(), ClassLabel(names=names.tolist())
        splits[name] = _Split(Dataset.from_dict(columns, features=Features(features)), len(columns["image"]))
    return splits


def _open_packed(config: DataConfig, kind: str, files: Sequence[Path]) -> "_Split":
    import datasets
    import pyarrow.parquet

    rows = None
    if kind == "parquet":
        rows = 0
        for file in files:
            try:
                rows += pyarrow.parquet.read_metadata(file).num_rows
            except Exception as error:
                raise _problem("dataset", f"{file} is no parquet file: {error}") from error
        if not rows:
            raise _problem("dataset", f"{config.dataset!r} has a split without images")
    builder = "parquet" if kind == "parquet" else "webdataset"
    names = {"train": [str(file) for file in files]}
    try:
        dataset = datasets.load_dataset(builder, data_files=names, split="train", streaming=config.streaming)
    except Exception as error:  # datasets raises many kinds; each means that these files cannot be used
        form = "" if kind == "parquet" else " (a tar holds files such as 0001.jpg and 0001.cls, alike for every image)"
        raise _problem("dataset", f"{config.dataset!r} cannot be loaded{form}: {_reason(error)}") from error
    return _Split(dataset, rows)


def _open_hub(config: DataConfig) -> dict[str, "_Split"]:
    import datasets

    try:
        splits = datasets.load_dataset(config.dataset, name=config.dataset_config_name, streaming=config.streaming)
    except Exception as error:  # datasets raises many kinds; each means that this source cannot be used
        raise _problem("dataset", f"{config.dataset!r} cannot be loaded: {_reason(error)} ({ALLOWED})") from error
    _check_splits(config, splits)
    sizes = {name: len(split) if not config.streaming else _stated_size(split, name) for name, split in splits.items()}
    return {name: _Split(split, sizes[name]) for name, split in splits.items()}


def _stated_size(stream: Any, name: str) -> int | None:
    stated = (stream.info.splits or {}).get(name)
    return stated.num_examples or None if stated is not None else None


def _check_splits(config: DataConfig, splits: Collection[str]) -> None:
    for key in ("train_split", "validation_split"):
        name = getattr(config, key)
        if name is not None and name not in splits:
            raise _problem(key, f"received {name!r}; the dataset has {sorted(splits)}")


def _sources(config: DataConfig, train: Any, validation: Any | None) -> tuple[ImageSource, ImageSource]:
    """Splits that are read by number."""
    images, labels, names = _to_source(config, train)
    if validation is None:
        held_out = np.arange(len(images)) % round(1 / config.validation_fraction) == 0
        if held_out.all():
            raise _problem("dataset", f"{config.dataset!r} holds a single image: none is left to train with")
        chosen = [np.flatnonzero(mask) for mask in (~held_out, held_out)]
        parts = [(images.select(rows), None if labels is None else labels[rows], names) for rows in chosen]
        return ImageSource(*parts[0]), ImageSource(*parts[1])
    train_source = ImageSource(images, labels, names)
    if labels is None:
        return train_source, ImageSource(_to_source(replace(config, use_labels=False), validation)[0], None, None)
    images, labels, _ = _to_source(config, validation, names)
    if labels is None:
        raise _problem("validation_split", f"{config.validation_split!r} has no labels, {config.train_split!r} has")
    return train_source, ImageSource(images, labels, names)


def _to_source(
    config: DataConfig, split: Any, names: list[str] | None = None
) -> tuple[Any, np.ndarray | None, list[str] | None]:
    """Images, labels and class names of one split; the names may be given by the training split."""
    if not len(split):
        raise _problem("dataset", f"{config.dataset!r} has a split without images")
    image_column, label_column = _columns(config, split.features)
    images = split.select_columns([image_column]).cast_column(image_column, _undecoded())
    if label_column is None:
        return images, None, None
    labels, names = _labels(split, label_column, names)
    return images, labels, names


def _labels(split: Any, column: str, names: list[str] | None) -> tuple[np.ndarray, list[str]]:
    """int64 `(n,)` and the names of the classes; those of the training split if they are given."""
    from datasets import ClassLabel

    feature = split.features[column]
    own_names = feature.names if isinstance(feature, ClassLabel) else None
    missing = split.data.column(column).null_count
    if missing:
        raise _problem("label_column", f"{missing} of {len(split)} rows of {column!r} have no label; {_NO_LABELS}")
    values = np.asarray(split.with_format("numpy")[column][:])
    if values.ndim != 1 or values.dtype.kind not in "iuUO":
        raise _problem("label_column", f"received {column!r}, which holds {feature}; {_allowed_labels(own_names)}")
    if values.dtype.kind in "UO":
        own_names, values = np.unique(values.astype(str), return_inverse=True)
        own_names = own_names.tolist()
    top = len(own_names) if own_names is not None else np.iinfo(np.int64).max
    if values.min() < 0 or values.max() >= top:
        wrong = int(values.min()) if values.min() < 0 else int(values.max())
        raise _problem("label_column", f"{column!r} holds {wrong}; {_allowed_labels(own_names)}")
    values = values.astype(np.int64)
    if names is None:
        return values, own_names or [str(number) for number in range(int(values.max()) + 1)]
    if own_names is not None and own_names != names:
        used = {own_names[number] for number in np.unique(values)}
        unknown = sorted(used - set(names))
        if unknown:
            raise _problem(
                "label_column", f"the validation split has classes the training split has not: {_few(unknown)}"
            )
        values = np.array([names.index(name) if name in used else -1 for name in own_names])[values]
    elif values.max() >= len(names):
        raise _problem(
            "label_column",
            f"the validation split has class {values.max()}, the training split only 0 to {len(names) - 1}",
        )
    return values, names


def _streams(config: DataConfig, train: "_Split", validation: "_Split | None") -> tuple[ImageStream, ImageStream]:
    """Splits that are read from front to back."""
    stream = _to_stream(config, train)
    if validation is not None:
        other = _to_stream(config, validation)
        if stream.label_column is None:
            return stream, replace(other, label_column=None, class_names=None)
        if other.label_column is None or other.class_names != stream.class_names:
            message = f"the classes of {config.validation_split!r} are not those of {config.train_split!r}"
            raise _problem("validation_split", f"{message}; set data.streaming to false to match them by name")
        return stream, other
    if stream.num_images is None:
        raise _problem(
            "validation_split",
            "a stream of unknown length cannot be split by rule; name a split, or set data.streaming to false",
        )
    held_out = max(1, round(config.validation_fraction * stream.num_images))
    kept = stream.num_images - held_out
    if kept < 1:
        raise _problem("dataset", f"{config.dataset!r} holds a single image: none is left to train with")
    return (
        replace(stream, images=stream.images.skip(held_out), num_images=kept, is_part=True),
        replace(stream, images=stream.images.take(held_out), num_images=held_out, is_part=True),
    )


def _to_stream(config: DataConfig, split: "_Split") -> ImageStream:
    from datasets import ClassLabel, Value

    features = split.dataset.features
    if features is None:
        raise _problem("streaming", f"{config.dataset!r} does not declare its columns; set data.streaming to false")
    image_column, label_column = _columns(config, features)
    columns = [column for column in (image_column, label_column) if column is not None]
    images = split.dataset.select_columns(columns).cast_column(image_column, _undecoded())
    names = None
    if label_column is not None:
        feature = features[label_column]
        names = feature.names if isinstance(feature, ClassLabel) else None
        if names is None and not (isinstance(feature, Value) and "int" in feature.dtype):
            raise _problem(
                "label_column",
                f"received {label_column!r}, which holds {feature}; the labels of a stream must be class numbers, as "
                "the classes are not known before it is read (set data.streaming or data.use_labels to false)",
            )
    return ImageStream(images, image_column, label_column, names, split.num_images, config.shuffle_buffer_size)


def _columns(config: DataConfig, features: Any) -> tuple[str, str | None]:
    """Names of the image column, and of the label column if there is one to use."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    names = list(features)
    image_columns = [name for name in names if isinstance(features[name], ImageFeature)]
    image_column = config.image_column or (image_columns[0] if len(image_columns) == 1 else None)
    if image_column is None and len(image_columns) > 1:
        raise _problem("image_column", f"there are several columns of images; name one: {', '.join(image_columns)}")
    image_column = image_column or ("image" if "image" in names else None)
    if image_column is None:
        raise _problem("image_column", f"there is no column of images; the columns are {', '.join(names)}")
    if image_column not in names:
        raise _problem("image_column", f"received {image_column!r}; the columns are {', '.join(names)}")
    try:
        empty = Dataset.from_dict({image_column: []}, features=Features({image_column: features[image_column]}))
        empty.cast_column(image_column, _undecoded())
    except Exception as error:  # Arrow's own kinds, one for each type that is not an image
        message = f"received {image_column!r}; its values are not images but {features[image_column]}"
        raise _problem("image_column", message) from error

    if not config.use_labels:
        return image_column, None
    label_columns = [name for name in names if isinstance(features[name], ClassLabel)]
    if config.label_column is None and len(label_columns) > 1:
        message = f"there are several columns of class labels; name one: {', '.join(label_columns)}"
        raise _problem("label_column", message)
    found = label_columns[0] if label_columns else WEBDATASET_LABEL if WEBDATASET_LABEL in names else None
    label_column = config.label_column or found
    if label_column is not None and label_column not in names:
        raise _problem("label_column", f"received {label_column!r}; the columns are {', '.join(names)}")
    return image_column, label_column


def _undecoded() -> Any:
    from datasets import Image as ImageFeature

    return ImageFeature(decode=False)


def _encoded(item: dict[str, Any] | None, number: int) -> EncodedImage:
    """A row of an undecoded image column."""
    if item is None:
        return EncodedImage(f"image {number}", b"")
    path, content = item["path"], item["bytes"]
    if content is None and "://" in path:  # a stream of single files on the Hub
        from datasets.utils.file_utils import xopen

        with xopen(path, "rb") as file:
            content = file.read()
    return EncodedImage(path or f"image {number}", path if content is None else content)


_NO_LABELS = "set data.use_labels to false to train without labels"


def _allowed_labels(names: list[str] | None) -> str:
    numbers = "class numbers from 0 up or class names" if names is None else f"class numbers from 0 to {len(names) - 1}"
    return f"its values must be {numbers}, none missing ({_NO_LABELS})"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _reason(error: Exception) -> str:
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {cause}"


def _problem(key: str, message: str) -> ConfigError:
    return ConfigError([Problem(f"data.{key}", message)])
