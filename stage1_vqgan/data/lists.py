"""Lists of images with labels and other columns: `metadata.csv` and `metadata.jsonl` beside images, and list files.

A `.csv`, `.tsv` or `.jsonl` list has a column `file_name`, as the "imagefolder" of `datasets` wants it. A line of a
`.txt` or `.lst` list is `path label`, or a path alone. Paths are relative to the folder of the list.
"""

import csv
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from configs import ConfigError
from stage1_vqgan.data.config import data_problem

METADATA_NAMES = ("metadata.csv", "metadata.jsonl")
FILE_NAME = "file_name"
MOST_CHECKED = 1000  # files of a list whose existence is checked before the first is read

Row = dict[str, Any]


def read_list(path: Path) -> dict[Path, Row]:
    """The images of a list in its order, with the other columns of each.

    Raises:
        ConfigError: the list is empty, malformed or no UTF-8, names an image twice, or names files that do not exist.
    """
    rows: dict[Path, Row] = {}
    try:
        for number, row in READERS[path.suffix.lower()](path):
            name = row.pop(FILE_NAME, None)
            if not isinstance(name, str) or not name:
                raise _problem(path, number, f"names no image; it needs a column {FILE_NAME}, not {list(row)}")
            image = path.parent / name
            if image in rows:
                raise _problem(path, number, f"{name} is in the list twice")
            rows[image] = row
    except (UnicodeError, csv.Error) as error:
        raise data_problem("dataset", f"{path} cannot be read: {error}") from error
    if not rows:
        raise data_problem("dataset", f"{path} lists no images")
    return rows


def require_files(path: Path, images: Sequence[Path]) -> None:
    """Checks that the first images of a list exist.

    Raises:
        ConfigError: some do not.
    """
    first = images[:MOST_CHECKED]
    missing = [str(image) for image in first if not image.is_file()]
    if missing:
        where = f"{path} lists files that do not exist, {len(missing)} of the first {len(first)}: {missing[0]}"
        raise data_problem("dataset", f"{where}; paths must be absolute, or relative to the folder of the list")


def with_metadata(
    images: Sequence[Path], everything: Collection[Path], lists: Iterable[Path]
) -> tuple[list[Path], list[Row], list[Path]]:
    """The images that metadata files list, in the order of `images`, their columns, and the images that none lists.

    Args:
        images: the images of a split.
        everything: the images of all splits.
        lists: the metadata files.

    Raises:
        ConfigError: a list is malformed, or names an image that is not in `everything`.
    """
    rows: dict[Path, Row] = {}
    for path in lists:
        listed = read_list(path)
        unknown = [image for image in listed if image not in everything]
        if unknown:
            message = f"{path} names {len(unknown)} images that the folder does not hold, such as {unknown[0]}"
            raise data_problem("dataset", f"{message}; correct the list or remove it")
        rows |= listed
    kept = [image for image in images if image in rows]
    return kept, [rows[image] for image in kept], [image for image in images if image not in rows]


def columns_of(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Columns of rows: those that hold only numbers, only booleans or only text; None where a row lacks a value."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    return {name: _of_one_type(values) for name, values in columns.items() if _is_plain(values)}


def _is_plain(values: Sequence[Any]) -> bool:
    return {type(value) for value in values} <= {str, int, float, bool, type(None)}


def _of_one_type(values: list[Any]) -> list[Any]:
    """Text in place of values of several types; whole numbers and fractions are one type."""
    kinds = {type(value) for value in values} - {type(None)}
    return values if len(kinds) <= 1 or kinds == {int, float} else [None if v is None else str(v) for v in values]


def _csv_rows(path: Path) -> Iterator[tuple[int, Row]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        for row in reader:
            if None in row:
                raise _problem(path, reader.line_num, f"has more values than there are columns: {row[None]}")
            yield reader.line_num, {name: value or None for name, value in row.items()}


def _json_rows(path: Path) -> Iterator[tuple[int, Row]]:
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _problem(path, number, f"is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise _problem(path, number, f"is not a JSON object: {line[:60]}")
        yield number, row


def _text_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Lines of a path and a label, divided by the last space or tab; or of paths alone, if the first line is a file."""
    has_labels = None
    for number, line in _lines(path):
        if has_labels is None:
            has_labels = not (path.parent / line).is_file()
        name, *label = line.rsplit(None, 1) if has_labels else [line]
        if has_labels and not label:
            raise _problem(path, number, f"holds {line!r}; a line must be 'path label', or every line a path")
        yield number, {FILE_NAME: name.strip(), **({"label": label[0]} if has_labels else {})}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with open(path, encoding="utf-8-sig") as file:
        yield from ((number, line.strip()) for number, line in enumerate(file, 1) if line.strip())


def _problem(path: Path, line: int, message: str) -> ConfigError:
    return data_problem("dataset", f"{path}, line {line}: {message}")


READERS: dict[str, Callable[[Path], Iterator[tuple[int, Row]]]] = {
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".jsonl": _json_rows,
    ".txt": _text_rows,
    ".lst": _text_rows,
}
