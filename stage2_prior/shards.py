"""A shard of the code store: an Arrow file with one record batch, which `datasets.Dataset.from_file` also opens.

Columns: `codes`, a fixed-size list of uint16 (uint32 above 65,536 codes); for labeled images `label`, int64; with
further conditions `condition`, a fixed-size list of uint32, see `Shard`; and then the columns of the data set that
`data.columns` keeps, text or numbers.
The metadata of the schema holds notes about the images, and a checksum of the columns.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from configs.checksums import Damaged, sealed, unsealed
from configs.files import replacing
from stage1_vqgan import SkippedImage

if TYPE_CHECKING:
    from pydantic import TypeAdapter

# Key of the shard's notes in the metadata of its Arrow schema.
NOTES_KEY = b"tessella"
CODES, LABEL, CONDITION = "codes", "label", "condition"


@dataclass(frozen=True)
class ShardNotes:
    """Facts about a shard and its images.

    Attributes:
        name: name of the shard's file.
        images: number of images in the shard's range of the split.
        skipped: the images in this range that could not be decoded, with their numbers in the split.
        num_classes: highest label plus one; 0 without labels.
        rows: number of rows.
        checksum: see `Shard.checksum`.
    """

    name: str
    images: int
    skipped: list[SkippedImage]
    num_classes: int
    rows: int
    checksum: str


class Shard(NamedTuple):
    """The rows of a shard, as views of its memory map.

    Attributes:
        codes: uint16 or uint32 `(rows, L)`.
        labels: int64 `(rows,)`, or None without labels.
        columns: further columns of the data set, or None.
        conditions: uint32 `(rows, P')`, the tokens of all further conditions (`TokenLayout.segments`), each counted
            from 0 in its segment; the null token is the number of tokens of the segment. Or None.
    """

    codes: np.ndarray
    labels: np.ndarray | None
    columns: pa.Table | None = None
    conditions: np.ndarray | None = None

    def checksum(self) -> str:
        """The XXH3-128 checksum of codes, labels and columns, as 32 hexadecimal digits. It reads all of them."""
        digest = xxhash.xxh3_128(self.codes.data)
        digest.update(b"" if self.labels is None else self.labels.data)
        digest.update(b"" if self.columns is None else json.dumps(self.columns.to_pydict(), default=str).encode())
        digest.update(b"" if self.conditions is None else self.conditions.data)
        return digest.hexdigest()

    @property
    def form(self) -> str:
        """Shape and dtype in words."""
        rows, length = self.codes.shape
        names = () if self.columns is None else tuple(self.columns.column_names)
        width = 0 if self.conditions is None else self.conditions.shape[1]
        return described(rows, length, self.codes.dtype, self.labels is not None, names, width)


def described(
    rows: int, length: int, dtype: np.dtype, with_labels: bool, columns: Sequence[str] = (), conditions: int = 0
) -> str:
    """Shape and dtype of a shard in words."""
    text = f"{rows:,} rows of {length:,} codes ({dtype}) with{'' if with_labels else 'out'} labels"
    text += f", {conditions:,} condition tokens" if conditions else ""
    return text + (f" and with the columns {', '.join(columns)}" if columns else "")


def code_dtype(num_codes: int) -> np.dtype:
    """The smallest dtype for codes in [0, num_codes): uint16 or uint32."""
    return np.dtype(np.uint16 if num_codes <= 2**16 else np.uint32)


def write_shard(
    path: Path,
    codes: np.ndarray,
    labels: np.ndarray | None,
    images: int,
    skipped: Sequence[SkippedImage] = (),
    kept: pa.Table | None = None,
    conditions: np.ndarray | None = None,
) -> None:
    """Writes one shard atomically: a file with a shard's name is complete.

    Args:
        path: see `shard_path`.
        codes: uint16 or uint32 `(rows, L)`.
        labels: int64 `(rows,)`, or None.
        images: number of images in the shard's range of the split.
        skipped: the images in this range that could not be decoded.
        kept: further columns of the rows, or None.
        conditions: tokens of further conditions, see `Shard`, or None.
    """
    shard = Shard(
        np.ascontiguousarray(codes),
        None if labels is None else np.ascontiguousarray(labels, np.int64),
        kept,
        None if conditions is None else np.ascontiguousarray(conditions, np.uint32),
    )
    columns = {CODES: _lists(shard.codes)}
    if shard.labels is not None:
        columns[LABEL] = pa.array(shard.labels)
    if shard.conditions is not None:
        columns[CONDITION] = _lists(shard.conditions)
    if kept is not None:
        columns |= {name: kept[name].combine_chunks() for name in kept.column_names}
    num_classes = int(labels.max(initial=-1)) + 1 if labels is not None else 0
    notes = ShardNotes(path.name, images, list(skipped), num_classes, len(codes), shard.checksum())
    batch = pa.RecordBatch.from_pydict(columns, metadata={NOTES_KEY: json.dumps(sealed(asdict(notes)))})
    with replacing(path) as file, pa.ipc.new_stream(file, batch.schema) as writer:
        writer.write_batch(batch)


def read_notes(path: Path) -> ShardNotes:
    """Reads the notes of a shard, without its rows.

    Raises:
        Damaged: the file is not a shard, or its notes have changed.
    """
    try:
        with pa.OSFile(str(path)) as file:
            return _notes(pa.ipc.open_stream(file).schema, path)
    except (pa.ArrowException, OSError, MemoryError) as error:
        raise _damaged(path, error) from error


def map_shard(path: Path) -> tuple[Shard, ShardNotes]:
    """Maps a shard into memory, and checks its form but not its values.

    Raises:
        Damaged: the file is missing, is not a shard, or is cut short; its columns have other types or miss values; or
            its notes have changed or belong to another file.
    """
    if not path.is_file():
        raise Damaged(f"{path}: this file is missing")
    try:
        with pa.memory_map(str(path)) as source:  # the map stays valid after the file is closed
            reader = pa.ipc.open_stream(source)
            notes = _notes(reader.schema, path)
            batches = list(reader)
            if len(batches) != 1:
                raise Damaged(f"{path}: holds {len(batches)} record batches; a shard has one")
            batches[0].validate(full=True)
            shard = _shard(batches[0], path)
    except (pa.ArrowException, OSError, MemoryError) as error:
        raise _damaged(path, error) from error
    if notes.name != path.name:
        raise Damaged(f"{path}: this is the shard {notes.name}, renamed")
    return shard, notes


def check_shard(path: Path) -> ShardNotes:
    """Reads a whole shard, and compares it with its own notes.

    Raises:
        Damaged: see `map_shard`, or codes, labels or conditions have changed.
    """
    shard, notes = map_shard(path)
    if (notes.rows, notes.checksum) != (len(shard.codes), shard.checksum()):
        raise Damaged(f"{path}: the codes, labels or conditions of this file have changed since it was written")
    return notes


def _shard(batch: pa.RecordBatch, path: Path) -> Shard:
    is_clear = len(set(batch.schema.names)) == len(batch.schema.names)  # pyarrow allows two columns of one name
    own = [name for name in batch.schema.names[:3] if name in (CODES, LABEL, CONDITION)]
    arrays = {name: batch.column(name) for name in own} if is_clear else {}
    kinds = {CODES: [pa.uint16(), pa.uint32()], CONDITION: [pa.uint32()]}
    if (
        own != [name for name in (CODES, LABEL, CONDITION) if name in own]
        or CODES not in arrays
        or not all(_is_table(arrays[name], kinds[name]) for name in kinds.keys() & arrays.keys())
        or (LABEL in arrays and arrays[LABEL].type != pa.int64())
        or any(pa.types.is_nested(field.type) for field in list(batch.schema)[len(own) :])
    ):
        columns = ", ".join(f"{field.name}: {field.type}" for field in batch.schema)
        allowed = "codes (lists of uint16), label (int64) and condition (lists of uint32)"
        raise Damaged(f"{path}: holds the columns {columns}; allowed are {allowed}")
    if any(array.null_count or (name != LABEL and array.values.null_count) for name, array in arrays.items()):
        raise Damaged(f"{path}: values are missing (null)")
    labels, conditions = arrays.get(LABEL), arrays.get(CONDITION)
    names = batch.schema.names[len(own) :]
    return Shard(
        _table(arrays[CODES]),
        None if labels is None else labels.to_numpy(zero_copy_only=True),
        pa.Table.from_batches([batch]).select(names) if names else None,
        None if conditions is None else _table(conditions),
    )


def _lists(table: np.ndarray) -> pa.Array:
    """A table `(rows, n)` as an array of fixed-size lists."""
    return pa.FixedSizeListArray.from_arrays(pa.array(table.reshape(-1)), table.shape[1])


def _is_table(lists: pa.Array, values: list[pa.DataType]) -> bool:
    return pa.types.is_fixed_size_list(lists.type) and lists.type.value_type in values


def _table(lists: pa.Array) -> np.ndarray:
    """The inverse of `_lists`, without a copy."""
    return lists.flatten().to_numpy(zero_copy_only=True).reshape(len(lists), lists.type.list_size)


def _notes(schema: pa.Schema, path: Path) -> ShardNotes:
    from pydantic import ValidationError

    try:
        values = json.loads((schema.metadata or {}).get(NOTES_KEY, b"{}"))
        return _reader().validate_json(json.dumps(unsealed(values, path)))
    except Damaged:
        raise
    except (ValidationError, ValueError, RecursionError) as error:
        raise Damaged(f"{path}: the notes in this file are malformed") from error


def _damaged(path: Path, error: BaseException) -> Damaged:
    return Damaged(f"{path}: this file cannot be read ({' '.join(str(error).split())})")


@cache
def _reader() -> "TypeAdapter[ShardNotes]":
    from pydantic import ConfigDict, TypeAdapter, with_config

    return TypeAdapter(with_config(ConfigDict(extra="forbid", strict=True))(ShardNotes))
