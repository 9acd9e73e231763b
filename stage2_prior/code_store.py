"""The code store: every image's codes as Arrow files, with a manifest that says what they are.

    code_store/
      manifest.json                     token layout, splits, how the codes were made; written last
      train-00000.arrow …               shards of at most SHARD_ROWS rows, one record batch each
      validation-00000.arrow …

Columns: `codes`, a fixed-size list of uint16 (uint32 above 65,536 codes), and `label`, int64, unless there are no
labels. Shard s holds images s·B to (s + 1)·B - 1 of the split, B = `images_per_shard`: first view 0 of all of them,
then view 1, and so on. Images that could not be decoded have no rows; the shard's schema carries which those are.
`datasets.Dataset.from_file` opens a shard as well.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from configs import ConfigError, Problem
from stage1_vqgan import SkippedImage
from stage2_prior.vocabulary import TokenLayout

SHARD_ROWS = 65536
MANIFEST_NAME = "manifest.json"
NOTES_KEY = b"tessella"


@dataclass(frozen=True)
class ShardNotes:
    """What a shard was made from.

    Attributes:
        images: in its range of the split.
        skipped: those among them that could not be decoded; their numbers are of the split.
        num_classes: one more than its highest label; 0 without labels.
        rows: see above.
    """

    images: int
    skipped: list[SkippedImage]
    num_classes: int
    rows: int


def images_per_shard(num_views: int) -> int:
    """Images whose views make one shard."""
    return max(1, SHARD_ROWS // num_views)


def code_dtype(num_codes: int) -> np.dtype:
    """The smallest unsigned integer a store keeps codes in."""
    return np.dtype(np.uint16 if num_codes <= 2**16 else np.uint32)


def shard_path(folder: str | Path, split: str, shard: int) -> Path:
    """Where a shard lies."""
    return Path(folder) / f"{split}-{shard:05d}.arrow"


def write_shard(
    path: Path, codes: np.ndarray, labels: np.ndarray | None, images: int, skipped: Sequence[SkippedImage] = ()
) -> None:
    """Writes one shard beside, syncs and renames it, so that what has a shard's name is complete.

    Args:
        path: see `shard_path`.
        codes: uint16 or uint32 `(rows, L)`.
        labels: int64 `(rows,)`, or None.
        images, skipped: see `ShardNotes`.
    """
    columns = {"codes": pa.FixedSizeListArray.from_arrays(pa.array(codes.reshape(-1)), codes.shape[1])}
    if labels is not None:
        columns["label"] = pa.array(labels, type=pa.int64())
    num_classes = int(labels.max(initial=-1)) + 1 if labels is not None else 0
    notes = ShardNotes(images, list(skipped), num_classes, len(codes))
    batch = pa.RecordBatch.from_pydict(columns, metadata={NOTES_KEY: json.dumps(asdict(notes))})
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        with pa.ipc.new_stream(file, batch.schema) as writer:
            writer.write_batch(batch)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_notes(path: Path) -> ShardNotes:
    """What a shard was made from; its rows are not read."""
    with pa.OSFile(str(path)) as file:
        notes = json.loads(pa.ipc.open_stream(file).schema.metadata[NOTES_KEY])
    return ShardNotes(**{**notes, "skipped": [SkippedImage(*image) for image in notes["skipped"]]})


class CodeStore:
    """A finished store, read through memory maps.

    Args:
        folder: of the store.

    Raises:
        ConfigError: there is no finished store in the folder.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        manifest = self.folder / MANIFEST_NAME
        if not manifest.is_file():
            message = f"received {str(folder)!r}; there is no finished code store (run stage2_prior.tokenize first)"
            raise ConfigError([Problem("code_store", message)])
        self.manifest: dict[str, Any] = json.loads(manifest.read_text())
        if any("shard_rows" not in split for split in self.manifest["splits"].values()):
            message = f"{folder} was made by an earlier version; remove it and run stage2_prior.tokenize again"
            raise ConfigError([Problem("code_store", message)])
        self.layout = TokenLayout.from_dict(self.manifest["token_layout"])

    def split(self, name: str) -> "CodeSplit":
        """Opens "train" or "validation"."""
        return CodeSplit(self.folder, name, self.manifest["splits"][name]["shard_rows"])


class CodeSplit:
    """The rows of one split; its shards are mapped when the first are read, so that it can be sent to workers."""

    def __init__(self, folder: Path, name: str, shard_rows: Sequence[int]):
        self.folder, self.name = folder, name
        self.ends = np.cumsum(shard_rows, dtype=np.int64)
        self.starts = self.ends - shard_rows

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_columns"}

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Codes `(n, L)` and labels `(n,)` (or None) of int64 row numbers `(n,)`, without a loop over them."""
        shards = np.searchsorted(self.ends, rows, side="right")
        offsets = rows - self.starts[shards]
        codes, labels = self._columns
        return codes.take(shards, offsets), labels.take(shards, offsets)[:, 0] if labels is not None else None

    @cached_property
    def _columns(self) -> tuple["MappedRows", "MappedRows | None"]:
        """Codes, and labels if there are any, of all shards."""
        batches = []
        for shard in range(len(self.ends)):
            with pa.memory_map(str(shard_path(self.folder, self.name, shard))) as source:  # the map outlives the file
                batches.append(pa.ipc.open_stream(source).read_next_batch())
        width = batches[0].column("codes").type.list_size
        codes = MappedRows([batch.column("codes").flatten() for batch in batches], width)
        has_labels = "label" in batches[0].schema.names
        return codes, MappedRows([batch.column("label") for batch in batches], 1) if has_labels else None


class MappedRows:
    """Rows of several memory maps, taken all at once: one array strides over all the memory from the first map to the
    last, in which every row has an index. What lies between the maps is in no row and never touched.

    Args:
        shards: integers without nulls, the rows of a shard one after another.
        width: of a row.
    """

    def __init__(self, shards: Sequence[pa.Array], width: int):
        self.shards = [shard.to_numpy(zero_copy_only=True) for shard in shards]  # keeps the maps
        self.width = width
        filled = [shard for shard in self.shards if len(shard)]
        first = min(filled, key=_address)
        size = first.itemsize
        end = max(_address(shard) + shard.nbytes for shard in filled)
        shape = ((end - _address(first)) // size - width + 1, width)
        self.view = np.lib.stride_tricks.as_strided(first, shape, (size, size), writeable=False)
        self.starts = np.array([(_address(shard) - _address(first)) // size for shard in self.shards])

    def take(self, shards: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """A copy `(n, width)` of the rows with these numbers, int64 `(n,)`, in these shards, int64 `(n,)`."""
        return self.view[self.starts[shards] + offsets * self.width]


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]
