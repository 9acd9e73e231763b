"""Opens the splits of a source with `datasets`."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from configs.problems import one_line
from stage1_vqgan.data.config import DataConfig, data_problem
from stage1_vqgan.data.files import ALLOWED, SourceFiles, class_folders
from stage1_vqgan.data.tars import restrict_webdataset

# A row group is read as a whole. Above LARGE_GROUP bytes, it may be at most MAX_RATIO times as large as its file.
LARGE_GROUP, MAX_RATIO = 2**26, 100


class Split(NamedTuple):
    """A split that `datasets` opened, and the number of its images, or None if it is unknown."""

    dataset: Any
    num_images: int | None


def open_files(config: DataConfig, files: SourceFiles) -> dict[str, Split]:
    """Opens the configured splits of local files.

    Each split is opened from its list of files, because `datasets` would infer splits from words in their paths. Images
    are listed here too: the "imagefolder" of `datasets` accepts fewer extensions, and guesses splits and classes.

    Raises:
        ConfigError: a split does not exist, or its files cannot be read.
    """
    _check_splits(config, files.splits)
    wanted = [name for name in (config.train_split, config.validation_split) if name is not None]
    if files.kind == "images":
        return _open_images(config, files, wanted)
    return {name: _open_packed(config, files.kind, files.splits[name]) for name in wanted}


def open_hub(config: DataConfig) -> dict[str, Split]:
    """Opens all splits of a dataset on the Hub.

    Raises:
        ConfigError: the dataset cannot be loaded, or a configured split does not exist.
    """
    import datasets

    restrict_webdataset()
    try:
        splits = datasets.load_dataset(config.dataset, name=config.dataset_config_name, streaming=config.streaming)
    except Exception as error:  # datasets raises exceptions of many types for a source that it cannot load
        raise data_problem("dataset", f"{config.dataset!r} cannot be loaded: {reason(error)} ({ALLOWED})") from error
    _check_splits(config, splits)
    sizes = {name: len(split) if not config.streaming else _stated_size(split, name) for name, split in splits.items()}
    return {name: Split(split, sizes[name]) for name, split in splits.items()}


def _open_images(config: DataConfig, files: SourceFiles, wanted: Sequence[str]) -> dict[str, Split]:
    from datasets import ClassLabel, Dataset, Features, Image as ImageFeature

    splits = {}
    with_labels = config.use_labels
    for name in wanted:
        columns: dict[str, list] = {"image": [str(file) for file in files.splits[name]]}
        features: dict[str, Any] = {"image": ImageFeature(decode=False)}
        classes = class_folders(files.splits[name], files.roots[name]) if with_labels else None
        if name == config.train_split:
            with_labels = classes is not None and len(set(classes)) > 1  # a single folder is not a class label
        if with_labels and classes is not None:
            names, labels = np.unique(classes, return_inverse=True)
            columns["label"], features["label"] = labels.tolist(), ClassLabel(names=names.tolist())
        splits[name] = Split(Dataset.from_dict(columns, features=Features(features)), len(columns["image"]))
    return splits


def _open_packed(config: DataConfig, kind: str, files: Sequence[Path]) -> Split:
    import datasets

    restrict_webdataset()
    rows = _parquet_rows(config, files) if kind == "parquet" else None
    builder = "parquet" if kind == "parquet" else "webdataset"
    names = {"train": [str(file) for file in files]}
    try:
        dataset = datasets.load_dataset(builder, data_files=names, split="train", streaming=config.streaming)
    except Exception as error:  # datasets raises exceptions of many types for files that it cannot load
        form = "" if kind == "parquet" else " (for every image, a tar holds the same files, such as 0001.jpg, 0001.cls)"
        raise data_problem("dataset", f"{config.dataset!r} cannot be loaded{form}: {reason(error)}") from error
    return Split(dataset, rows)


def _parquet_rows(config: DataConfig, files: Sequence[Path]) -> int:
    import pyarrow.parquet

    rows = 0
    for file in files:
        try:
            metadata = pyarrow.parquet.read_metadata(file)
            groups = [metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups)]
        except Exception as error:
            raise data_problem("dataset", f"{file} is not a parquet file: {error}") from error
        rows += metadata.num_rows
        unpacked, size = max(groups, default=0), file.stat().st_size
        if unpacked > max(LARGE_GROUP, MAX_RATIO * size):
            message = f"{file} has {size:,} bytes, but a row group of it unpacks to {unpacked:,}"
            raise data_problem("dataset", f"{message}; images hardly become smaller, so the file is not read")
    if not rows:
        raise data_problem("dataset", f"{config.dataset!r} has a split without images")
    return rows


def _stated_size(stream: Any, name: str) -> int | None:
    stated = (stream.info.splits or {}).get(name)
    return stated.num_examples or None if stated is not None else None


def _check_splits(config: DataConfig, splits: Collection[str]) -> None:
    for field in ("train_split", "validation_split"):
        name = getattr(config, field)
        if name is not None and name not in splits:
            raise data_problem(field, f"received {name!r}; the dataset has {sorted(splits)}")


def reason(error: Exception) -> str:
    """Type and text of an error of `datasets`, in one line."""
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {one_line(cause)}"
