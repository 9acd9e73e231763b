"""Images that are read in order: from parquet files, tars or the Hub, without a copy on the disk."""

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from typing import Any, TypeVar

import numpy as np

from configs.names import is_whole
from configs.problems import shown
from stage1_vqgan.data.columns import allowed_labels, encoded, find_columns, require_kept, undecoded
from stage1_vqgan.data.config import DataConfig, data_problem
from stage1_vqgan.data.decoding import EncodedImage
from stage1_vqgan.data.labels import JSON, class_name, json_column, json_label
from stage1_vqgan.data.splits import Split, reason

T = TypeVar("T")


@dataclass(frozen=True)
class ImageStream:
    """The images of one split, read in order.

    Attributes:
        images: a `datasets.IterableDataset` with an undecoded image column and, for labeled images, a label column.
        image_column: name of the image column.
        label_column: name of the label column, or None without labels.
        class_names: names of the classes 0 … C-1, or None without labels or if labels are plain numbers.
        num_images: number of images, or None if it is unknown.
        shuffle_buffer_size: number of images in memory from which a shuffled pass draws the next one.
        is_part: the images are a range of a longer stream. The range is found by counting from the beginning, so its
            files cannot be distributed over processes.
        opens_paths: see `ImageSource`.
        columns: names of the columns that `data.columns` keeps; each `EncodedImage` holds their values.
    """

    images: Any
    image_column: str
    label_column: str | None
    class_names: list[str] | None
    num_images: int | None
    shuffle_buffer_size: int = 1000
    is_part: bool = False
    opens_paths: bool = True
    columns: tuple[str, ...] = ()

    @property
    def has_labels(self) -> bool:
        return self.label_column is not None

    def read(
        self, rank: int = 0, world_size: int = 1, shuffle: tuple[int, int] | None = None
    ) -> Generator[tuple[EncodedImage, int | None], None, None]:
        """Reads this process's images and labels; all processes together read every image once.

        If the number of files is a multiple of the number of processes, each process reads its own files, the same in
        every pass. Otherwise each process reads everything and keeps every `world_size`-th image.

        Args:
            rank: number of this process.
            world_size: number of processes.
            shuffle: (seed, epoch), which decides the order of files, and of images within the buffer. None keeps the
                order.

        Raises:
            ConfigError: a label is not a class number.
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
        """Number of images that a process reads in a pass; None if it is unknown before reading."""
        if self.num_images is None:
            return None
        if world_size > 1 and self._has_own_files(world_size):
            return None  # files may hold different numbers of images
        return len(range(rank, self.num_images, world_size))

    def _has_own_files(self, world_size: int) -> bool:
        return not self.is_part and self.images.num_shards % world_size == 0

    def _items(self, files: Iterable[Any]) -> Iterator[tuple[EncodedImage, int | None]]:
        numbers = count()
        for rows in _batches(files):
            items = rows[self.image_column]
            labels = _labels(rows, self.label_column)
            feature = self.images.features[self.image_column]
            for place, (item, label, number) in enumerate(zip(items, labels, numbers, strict=False)):
                image = encoded(item, number, self.opens_paths, feature)
                if self.columns:
                    image = image._replace(columns={name: rows[name][place] for name in self.columns})
                yield image, None if self.label_column is None else self._checked(label)

    def _checked(self, label: Any) -> int:
        label = int(label) if isinstance(label, str) and is_whole(label) else label
        if not isinstance(label, int) or label < 0 or (self.class_names and label >= len(self.class_names)):
            message = f"the stream holds the label {shown(label)}; {allowed_labels(self.class_names)}"
            raise data_problem("label_column", message)
        return label


def _labels(rows: dict[str, Any], column: str | None) -> list[Any]:
    """The labels of a batch of rows, as they are stored; None without labels."""
    if column is None:
        return [None] * len(next(iter(rows.values())))
    return rows[column] if column in rows else [json_label(text, column) for text in rows[JSON]]


def _batches(files: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Batches of rows.

    Raises:
        ConfigError: a file cannot be read.
    """
    try:
        yield from chain.from_iterable(file.iter(batch_size=16) for file in files)
    except Exception as error:  # datasets raises exceptions of many types for damaged files
        raise data_problem("dataset", f"a file of the stream cannot be read: {reason(error)}") from error


def _shuffled(items: Iterable[T], buffer_size: int, rng: np.random.Generator) -> Iterator[T]:
    """Draws each item from a buffer and puts the next one in its place; a function of the generator's state.

    Not the buffer of `datasets`: its order changes between releases, and it waits 5 seconds after each pass over
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


def image_streams(config: DataConfig, train: Split, validation: Split | None) -> tuple[ImageStream, ImageStream]:
    """Training and validation images of `datasets.IterableDataset`s.

    Args:
        config: names the columns, and the fraction to hold out.
        train: the training split.
        validation: the validation split; None holds out the first training images.

    Raises:
        ConfigError: a column does not exist, its labels are not class numbers, or images must be held out of a stream
            of unknown length.
    """
    stream = _to_stream(config, train)
    if validation is not None:
        other = _to_stream(config, validation)
        if stream.label_column is None:
            return stream, replace(other, label_column=None, class_names=None)
        if other.label_column is None or other.class_names != stream.class_names:
            message = f"{config.validation_split!r} and {config.train_split!r} have different classes"
            raise data_problem("validation_split", f"{message}; set data.streaming to false to match them by name")
        return stream, other
    if stream.num_images is None:
        raise data_problem(
            "validation_split",
            "images cannot be held out of a stream of unknown length; name a split, or set data.streaming to false",
        )
    held_out = max(1, round(config.validation_fraction * stream.num_images))
    kept = stream.num_images - held_out
    if kept < 1:
        raise data_problem("dataset", f"{config.dataset!r} holds a single image; training needs at least two")
    return (
        replace(stream, images=stream.images.skip(held_out), num_images=kept, is_part=True),
        replace(stream, images=stream.images.take(held_out), num_images=held_out, is_part=True),
    )


def _to_stream(config: DataConfig, split: Split) -> ImageStream:
    from datasets import ClassLabel

    features = split.dataset.features
    if features is None:
        raise data_problem("streaming", f"{config.dataset!r} does not declare its columns; set data.streaming to false")
    image_column, label_column = find_columns(config, features)
    if label_column is None:
        label_column = json_column(config, features, lambda: _first(split.dataset, JSON))
    stored = label_column if label_column is None or label_column in features else JSON
    require_kept(config, features)
    columns = list(dict.fromkeys(column for column in (image_column, stored, *config.columns) if column is not None))
    images = split.dataset.select_columns(columns).cast_column(image_column, undecoded(features[image_column]))
    names = None
    if label_column is not None and stored is not None:
        feature = features.get(label_column)
        names = [class_name(name) for name in feature.names] if isinstance(feature, ClassLabel) else None
        if names is None:
            _require_numbers(split, label_column, stored)
    kept, size = tuple(config.columns), config.shuffle_buffer_size
    return ImageStream(images, image_column, label_column, names, split.num_images, size, columns=kept)


def _first(stream: Any, column: str) -> Any:
    """The first value of a column."""
    return next((rows[column][0] for rows in _batches([stream.select_columns([column])])), None)


def _require_numbers(split: Split, label_column: str, stored: str) -> None:
    """Refuses labels that are words, by the first of them.

    Raises:
        ConfigError: the first label is not a whole number.
    """
    value = _first(split.dataset, stored)
    (label,) = _labels({stored: [value]}, label_column)
    if isinstance(label, bool) or not (isinstance(label, int) or (isinstance(label, str) and is_whole(label))):
        raise data_problem(
            "label_column",
            f"received {label_column!r}, which holds {shown(label)}; the labels of a stream must be class numbers, "
            "because a stream is not searched for class names (set data.streaming or data.use_labels to false)",
        )
