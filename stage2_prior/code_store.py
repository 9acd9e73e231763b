"""The code store: the codes of all images as Arrow files, and a manifest that describes them.

    code_store/
      origin.json                       settings and data that determine the codes; written first
      manifest.json                     token layout, splits, origin, checksums; written last
      train-00000.arrow …               shards of at most SHARD_ROWS rows, see `shards.py`
      validation-00000.arrow …

Shard s holds images s·B to (s + 1)·B - 1 of the split, B = `images_per_shard`: view 0 of all of them, then view 1 of
all of them, and so on. Images that could not be decoded have no rows; the notes of the shard list them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from configs import ConfigError, Problem
from configs.checksums import Damaged
from configs.files import read_json, write_json
from configs.problems import listed
from stage2_prior.manifest import MANIFEST_NAME, read_manifest, store_problem
from stage2_prior.shards import Shard, check_shard, code_dtype, described, map_shard
from stage2_prior.vocabulary import TokenLayout

SHARD_ROWS = 65536
ORIGIN_NAME = "origin.json"
REPAIR = f"copy the store again, or remove these shards and {MANIFEST_NAME} and run stage2_prior.tokenize"


def images_per_shard(num_views: int) -> int:
    """Number of images whose views fill one shard, at least 1."""
    return max(1, SHARD_ROWS // num_views)


def shard_path(folder: str | Path, split: str, shard: int) -> Path:
    """Path of a shard."""
    return Path(folder) / f"{split}-{shard:05d}.arrow"


def claim_folder(folder: Path, origin: dict[str, Any], unset: Mapping[str, Any] | None = None) -> int:
    """Records in a folder the settings that determine its codes, before the first shard is written.

    The shards of an interrupted run are read, so that nothing is built on damaged ones.

    Args:
        folder: folder of the store; it is created if it does not exist.
        origin: settings and data that determine the codes, as JSON values.
        unset: what null means in the settings of a store, for those that may be null.

    Returns:
        Number of rows in the shards that an interrupted run has already written.

    Raises:
        ConfigError: the folder holds codes of another origin, or a damaged shard.
    """
    path = folder / ORIGIN_NAME
    shards, is_finished = sorted(folder.glob("*.arrow")), (folder / MANIFEST_NAME).is_file()
    if not shards and not is_finished:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, origin)
        return 0
    if not path.is_file():
        raise store_problem(f"{folder} holds codes of unknown origin; choose another folder")
    try:
        before = read_json(path)
    except ValueError as error:
        raise store_problem(f"{error}; or choose another code_store") from error
    before |= {name: value for name, value in (unset or {}).items() if before.get(name) is None}
    _require_origin(folder, before, json.loads(json.dumps(origin)))
    orders = [", ".join(each.get("conditions", {})) for each in (before, origin)]
    if not is_finished and orders[0] != orders[1]:
        message = f"{folder} holds codes with the conditions {orders[0]}, but their order is now {orders[1]}"
        raise store_problem(f"{message}; restore the order, or remove the folder to encode the images again")
    try:
        return 0 if is_finished else sum(check_shard(shard).rows for shard in shards)
    except Damaged as error:
        raise store_problem(f"{error}; remove it and run the same command, which encodes its images again") from error


def _require_origin(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    problems = [
        Problem("code_store", f"{folder} holds codes with {name} {before.get(name)!r}, but {name} is now {value!r}")
        for name, value in now.items()
        if before.get(name) != value
    ]
    if problems:
        problems.append(Problem("code_store", "choose another folder, or remove this one to encode the images again"))
        raise ConfigError(problems, "code store")


class CodeStore:
    """A finished code store. It is read through memory maps.

    Opening it reads every shard once, to compare codes and labels with their checksums and ranges. That takes about a
    second for 4 GB, plus the time of the disk. If a file is cut short later, while it is mapped, the operating system
    ends the process (SIGBUS).

    Args:
        folder: folder of the store.

    Raises:
        ConfigError: the folder holds no finished store, or a store of an earlier version; or a file of the store is
            missing, damaged, malformed, exchanged or not listed.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.layout = TokenLayout.from_dict(self.manifest["token_layout"])
        columns = self.manifest["origin"]["data"].get("columns", ())
        self._splits = {
            name: CodeSplit(self.folder, name, summary["shard_rows"], self.layout, columns)
            for name, summary in self.manifest["splits"].items()
        }
        self._check_files()
        for name, split in self._splits.items():
            try:
                split.check(self.manifest["splits"][name]["shard_checksums"])
            except Damaged as error:
                raise store_problem(f"{error}; {REPAIR}") from error

    def split(self, name: str) -> "CodeSplit":
        """The rows of a split, "train" or "validation"."""
        return self._splits[name]

    def _check_files(self) -> None:
        """Compares the names of the shards with the manifest."""
        expected = {path.name for split in self._splits.values() for path in split.paths}
        found = {path.name for path in self.folder.glob("*.arrow")}
        if missing := sorted(expected - found):
            raise store_problem(f"{self.folder} lacks {listed(missing, 5)}; {REPAIR}")
        if extra := sorted(found - expected):
            raise store_problem(
                f"{self.folder} holds {listed(extra, 5)}, which the manifest does not list; remove what is extra"
            )


class Rows(NamedTuple):
    """Rows of a split.

    Attributes:
        codes: uint16 or uint32 `(n, L)`.
        labels: int64 `(n,)`, or None for a store without labels.
        conditions: uint32 `(n, P')`, tokens of further conditions, see `shards.Shard`, or None.
    """

    codes: np.ndarray
    labels: np.ndarray | None
    conditions: np.ndarray | None


def _tables(shard: Shard) -> Rows:
    return Rows(shard.codes, shard.labels, shard.conditions)


def _empty(table: np.ndarray | None, rows: int) -> np.ndarray | None:
    """An array for rows of such a table."""
    return None if table is None else np.empty((rows, *table.shape[1:]), table.dtype)


class CodeSplit:
    """The rows of one split.

    The first read maps the shards into memory. A pickle excludes the maps, so worker processes can receive a split.

    Args:
        folder: folder of the store.
        name: "train" or "validation".
        shard_rows: number of rows of each shard.
        layout: token layout of the codes.
        columns: names of the columns of the data set that the store keeps.
    """

    def __init__(
        self, folder: Path, name: str, shard_rows: Sequence[int], layout: TokenLayout, columns: Sequence[str] = ()
    ):
        self.paths = [shard_path(folder, name, shard) for shard in range(len(shard_rows))]
        self.layout, self.columns = layout, tuple(columns)
        self.ends = np.cumsum(shard_rows, dtype=np.int64)
        self.starts = self.ends - shard_rows

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_shards"}

    def read(self, rows: np.ndarray) -> "Rows":
        """Reads rows in any order, across shards.

        Args:
            rows: int64 `(n,)`, row numbers of the split.

        Raises:
            Damaged: a shard has another form than the layout and `shard_rows` say.
        """
        shards = np.searchsorted(self.ends, rows, side="right")
        offsets = rows - self.starts[shards]
        tables = [_empty(first, len(rows)) for first in _tables(self._shards[0])]
        for shard in np.unique(shards):
            places = np.flatnonzero(shards == shard)
            for table, source in zip(tables, _tables(self._shards[shard]), strict=True):
                if table is not None and source is not None:
                    table[places] = source[offsets[places]]
        return Rows(*tables)  # type: ignore[arg-type]

    def read_columns(self, rows: np.ndarray) -> dict[str, list[Any]]:
        """The kept columns (`data.columns`) of rows in any order: text or numbers, None where a value is missing.

        Args:
            rows: int64 `(n,)`, row numbers of the split.
        """
        tables = [shard.columns for shard in self._shards]
        return pa.concat_tables(tables).take(rows).to_pydict() if self.columns else {}

    def check(self, checksums: Sequence[str]) -> None:
        """Reads all rows, and compares them with the checksum of each shard and the ranges of the layout.

        Raises:
            Damaged: a shard has another form, other contents, or values out of range.
        """
        if len(checksums) != len(self.paths):
            raise Damaged(f"{MANIFEST_NAME}: {len(checksums)} checksums for {len(self.paths)} shards")
        for path, shard, checksum in zip(self.paths, self._shards, checksums, strict=True):
            if shard.checksum() != checksum:
                raise Damaged(f"{path}: this is not the shard that the manifest lists, or its contents have changed")
            for name, values, limit in (
                ("codes", shard.codes, self.layout.num_codes),
                ("labels", shard.labels, self.layout.num_classes),
                *self._segments_of(shard),
            ):
                if values is not None and values.size and not (values.min() >= 0 and values.max() < limit):
                    raise Damaged(
                        f"{path}: holds {name} from {values.min()} to {values.max()}; allowed are 0 to {limit - 1}"
                    )

    def _segments_of(self, shard: Shard) -> Iterator[tuple[str, np.ndarray | None, int]]:
        """Name, values and limit of each further condition; its null token is allowed."""
        if shard.conditions is None:
            return
        start = 0
        for segment in self.layout.segments:
            end = start + segment.length
            yield f"tokens of {segment.name}", shard.conditions[:, start:end], segment.num_tokens + 1
            start = end

    @cached_property
    def _shards(self) -> list[Shard]:
        """The rows of every shard. Each has the number of rows, the length and the dtype that it must have."""
        shards = []
        for path, start, end in zip(self.paths, self.starts, self.ends, strict=True):
            shard, _ = map_shard(path)
            layout = self.layout
            width, dtype = sum(segment.length for segment in layout.segments), code_dtype(layout.num_codes)
            form = described(end - start, layout.length, dtype, layout.num_classes > 0, self.columns, width)
            if shard.form != form:
                raise Damaged(f"{path}: holds {shard.form}; the manifest says {form}")
            shards.append(shard)
        return shards
