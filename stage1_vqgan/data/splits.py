"""Opens the splits of a source with `datasets`."""

import logging
from collections.abc import Collection, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from configs.problems import listed, one_line
from stage1_vqgan.data.config import DataConfig, data_problem
from stage1_vqgan.data.files import ALLOWED, SourceFiles, class_folders
from stage1_vqgan.data.labels import MOST_NAMED, numbered
from stage1_vqgan.data.lists import columns_of, read_list, require_files, with_metadata
from stage1_vqgan.data.tars import restrict_webdataset

# A row group is read as a whole. Above LARGE_GROUP bytes, it may be at most MAX_RATIO times as large as its file.
LARGE_GROUP, MAX_RATIO = 2**26, 100

logger = logging.getLogger(__name__)


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
    if config.validation_split is None and len(files.splits) > 1:
        unused = listed(sorted(files.splits.keys() - {config.train_split}), MOST_NAMED)
        message = "%s: the splits %s are not used; data.validation_split names the one to evaluate on"
        logger.warning(message, config.dataset, unused)
    if files.kind == "images":
        return _open_images(config, files, wanted)
    open_split = {"list": _open_lists, "saved": _open_saved}.get(files.kind, _open_packed)
    return {name: open_split(config, files.kind, files.splits[name]) for name in wanted}


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
        nothing_here = f"there is no file or folder {config.dataset!r}, and as a Hub dataset it cannot be loaded"
        raise data_problem("dataset", f"{nothing_here}: {reason(error)} ({ALLOWED})") from error
    _check_splits(config, splits)
    sizes = {name: len(split) if not config.streaming else _stated_size(split, name) for name, split in splits.items()}
    return {name: Split(split, sizes[name]) for name, split in splits.items()}


def _open_images(config: DataConfig, files: SourceFiles, wanted: Sequence[str]) -> dict[str, Split]:
    splits = {}
    with_labels = config.use_labels
    for name in wanted:
        images, columns = files.splits[name], dict[str, list]()
        if files.metadata:
            lists, everything = _beside(files.metadata, files.roots[name]), set(chain(*files.splits.values()))
            images, rows, unlisted = with_metadata(images, everything, lists)
            columns = columns_of(rows)
            if unlisted:
                logger.warning("%s: left out, because no metadata file lists them: %d images", name, len(unlisted))
        in_list = config.label_column or "label"
        classes = class_folders(images, files.roots[name]) if with_labels and in_list not in columns else None
        if name == config.train_split and classes is not None and len(set(classes)) == 1:
            with_labels, classes = False, None  # a single folder is not a class label
        splits[name] = _split_of_paths(images, columns, classes)
    return splits


def _beside(metadata: Sequence[Path], root: Path) -> list[Path]:
    """The metadata files that may list images below a folder: those in it, and in the folders above it."""
    return [path for path in metadata if path.parent.is_relative_to(root) or root.is_relative_to(path.parent)]


def _split_of_paths(images: Sequence[Path], columns: dict[str, list], classes: Sequence[str] | None) -> Split:
    """The split of some image files, with the columns of their lists and their classes."""
    from datasets import ClassLabel, Dataset, Image as ImageFeature
    from datasets.table import table_cast

    data = {"image": [str(image) for image in images]}
    data |= {name: values for name, values in columns.items() if name != "image"}
    if classes is not None:
        labels, names = numbered(classes)
        data["label"] = labels.tolist()
    dataset = Dataset.from_dict(data)
    features = dataset.features.copy()
    features["image"] = ImageFeature(decode=False)
    if classes is not None:
        features["label"] = ClassLabel(names=names)
    return Split(Dataset(table_cast(dataset.data, features.arrow_schema)), len(images))  # `cast` shows a progress bar


def _open_lists(config: DataConfig, kind: str, files: Sequence[Path]) -> Split:
    rows: dict[Path, dict[str, Any]] = {}
    for file in files:
        listed = read_list(file)
        require_files(file, list(listed))
        rows |= listed
    return _split_of_paths(list(rows), columns_of(list(rows.values())), None)


def _open_saved(config: DataConfig, kind: str, files: Sequence[Path]) -> Split:
    from datasets import load_from_disk

    try:
        dataset = load_from_disk(str(files[0]))
    except Exception as error:  # datasets raises exceptions of many types for files that it cannot load
        raise data_problem("dataset", f"{files[0]} cannot be loaded: {reason(error)}") from error
    return Split(dataset, len(dataset))


def _open_packed(config: DataConfig, kind: str, files: Sequence[Path]) -> Split:
    import datasets

    restrict_webdataset()
    rows = _parquet_rows(config, files) if kind == "parquet" else None
    builder = "parquet" if kind == "parquet" else "webdataset"
    names = {"train": [str(file) for file in files]}
    types = {"features": _plain_features(files[0])} if kind == "parquet" else {}
    try:
        dataset = datasets.load_dataset(builder, data_files=names, split="train", streaming=config.streaming, **types)
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


def _plain_features(file: Path) -> Any:
    """The features of a parquet file if a column is a view of texts or bytes, which `datasets` cannot cast; else None.

    A view (`string_view`, `binary_view`) holds the same values as `string` and `binary`, laid out in another way.
    """
    import pyarrow.parquet
    from datasets import Features

    schema = pyarrow.parquet.read_schema(file)
    plain = pyarrow.schema([entry.with_type(_plain_type(entry.type)) for entry in schema], schema.metadata)
    return None if plain == schema else Features.from_arrow_schema(plain)


def _plain_type(kind: Any) -> Any:
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return pyarrow.struct([kind.field(n).with_type(_plain_type(kind.field(n).type)) for n in range(len(kind))])
    views = {pyarrow.string_view(): pyarrow.string(), pyarrow.binary_view(): pyarrow.binary()}
    return views.get(kind, kind)


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
