"""A shard of the code store: an Arrow file with one record batch, which `datasets.Dataset.from_file` also opens.

Columns: `codes`, a fixed-size list of uint16 (uint32 above 65,536 codes), for labeled images `label`, int64, and then
the columns of the data set that `data.columns` keeps, text or numbers.
The metadata of the schema holds notes about the images, and a checksum of the columns.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
COLUMNS = ["codes", "label"]


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
    """

    codes: np.ndarray
    labels: np.ndarray | None
    columns: pa.Table | None = None

    def checksum(self) -> str:
        """The XXH3-128 checksum of codes, labels and columns, as 32 hexadecimal digits. It reads all of them."""
        digest = xxhash.xxh3_128(self.codes.data)
        digest.update(b"" if self.labels is None else self.labels.data)
        digest.update(b"" if self.columns is None else json.dumps(self.columns.to_pydict(), default=str).encode())
        return digest.hexdigest()

    @property
    def form(self) -> str:
        """Shape and dtype in words."""
        rows, length = self.codes.shape
        names = () if self.columns is None else tuple(self.columns.column_names)
        return described(rows, length, self.codes.dtype, self.labels is not None, names)


def described(rows: int, length: int, dtype: np.dtype, with_labels: bool, columns: Sequence[str] = ()) -> str:
    """Shape and dtype of a shard in words."""
    text = f"{rows:,} rows of {length:,} codes ({dtype}) with{'' if with_labels else 'out'} labels"
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
) -> None:
    """Writes one shard atomically: a file with a shard's name is complete.

    Args:
        path: see `shard_path`.
        codes: uint16 or uint32 `(rows, L)`.
        labels: int64 `(rows,)`, or None.
        images: number of images in the shard's range of the split.
        skipped: the images in this range that could not be decoded.
        kept: further columns of the rows, or None.
    """
    shard = Shard(np.ascontiguousarray(codes), None if labels is None else np.ascontiguousarray(labels, np.int64), kept)
    columns = {"codes": pa.FixedSizeListArray.from_arrays(pa.array(shard.codes.reshape(-1)), codes.shape[1])}
    if shard.labels is not None:
        columns["label"] = pa.array(shard.labels)
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
        Damaged: see `map_shard`, or codes or labels have changed.
    """
    shard, notes = map_shard(path)
    if (notes.rows, notes.checksum) != (len(shard.codes), shard.checksum()):
        raise Damaged(f"{path}: the codes or labels of this file have changed since it was written")
    return notes


def _shard(batch: pa.RecordBatch, path: Path) -> Shard:
    schema = batch.schema
    num_own = 2 if schema.names[:2] == COLUMNS else 1
    codes_type: Any = schema.field(0).type if len(schema) else None
    allowed = [pa.uint16(), pa.uint32()]
    if (
        schema.names[:num_own] != COLUMNS[:num_own]
        or not pa.types.is_fixed_size_list(codes_type)
        or codes_type.value_type not in allowed
        or (num_own == 2 and schema.field(1).type != pa.int64())
        or any(pa.types.is_nested(field.type) for field in list(schema)[num_own:])
    ):
        columns = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise Damaged(f"{path}: holds the columns {columns}; allowed are codes (lists of uint16) and label (int64)")
    lists = batch.column(0)
    labels = batch.column(1) if num_own == 2 else None
    if lists.null_count or lists.values.null_count or (labels is not None and labels.null_count):
        raise Damaged(f"{path}: values are missing (null)")
    codes = lists.flatten().to_numpy(zero_copy_only=True).reshape(len(lists), codes_type.list_size)
    kept = pa.Table.from_batches([batch]).select(schema.names[num_own:]) if len(schema) > num_own else None
    return Shard(codes, None if labels is None else labels.to_numpy(zero_copy_only=True), kept)


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
