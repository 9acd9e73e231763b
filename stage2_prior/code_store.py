"""The code store: every image's codes as Arrow files, with a manifest that says what they are.

    code_store/
      manifest.json                     token layout, splits, how the codes were made; written last
      train-00000.arrow …               shards of at most SHARD_ROWS rows, one record batch each
      validation-00000.arrow …

Columns: `codes`, a fixed-size list of uint16 (uint32 above 65,536 codes), and `label`, int64, unless there are no
labels. Row `view · images + image` holds a view of an image. `datasets.Dataset.from_file` opens a shard as well.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from configs import ConfigError, Problem
from stage2_prior.vocabulary import TokenLayout

SHARD_ROWS = 65536
MANIFEST_NAME = "manifest.json"


def code_dtype(num_codes: int) -> np.dtype:
    """The smallest unsigned integer a store keeps codes in."""
    return np.dtype(np.uint16 if num_codes <= 2**16 else np.uint32)


def shard_path(folder: str | Path, split: str, shard: int) -> Path:
    """Where a shard lies."""
    return Path(folder) / f"{split}-{shard:05d}.arrow"


def write_shard(path: Path, codes: np.ndarray, labels: np.ndarray | None) -> None:
    """Writes one shard beside and renames it, so that what has a shard's name is complete.

    Args:
        path: see `shard_path`.
        codes: uint16 or uint32 `(rows, L)`.
        labels: int64 `(rows,)`, or None.
    """
    columns = {"codes": pa.FixedSizeListArray.from_arrays(pa.array(codes.reshape(-1)), codes.shape[1])}
    if labels is not None:
        columns["label"] = pa.array(labels, type=pa.int64())
    batch = pa.RecordBatch.from_pydict(columns)
    partial = path.with_suffix(".partial")
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    partial.replace(path)


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
        self.layout = TokenLayout.from_dict(self.manifest["token_layout"])

    def split(self, name: str) -> "CodeSplit":
        """Opens "train" or "validation"."""
        return CodeSplit(self.folder, name, self.manifest["splits"][name]["rows"])


class CodeSplit:
    """The rows of one split; shards are mapped when first read, so that it can be sent to worker processes."""

    def __init__(self, folder: Path, name: str, rows: int):
        self.folder, self.name, self.rows = folder, name, rows
        self._shards: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}

    def __len__(self) -> int:
        return self.rows

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Codes `(n, L)` and labels `(n,)` (or None) of int64 row numbers `(n,)`."""
        shards, offsets = np.divmod(rows, SHARD_ROWS)
        first = int(shards[0])
        if (shards == first).all():
            codes, labels = self._shard(first)
            return codes[offsets], labels[offsets] if labels is not None else None
        parts = [self._shard(int(shard)) for shard in shards]
        codes = np.stack([part[0][offset] for part, offset in zip(parts, offsets, strict=True)])
        if parts[0][1] is None:
            return codes, None
        labels = np.array([part[1][offset] for part, offset in zip(parts, offsets, strict=True)])  # type: ignore[index]
        return codes, labels

    def _shard(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        if index not in self._shards:
            source = pa.memory_map(str(shard_path(self.folder, self.name, index)))
            batch = pa.ipc.open_stream(source).read_next_batch()
            column = batch.column("codes")
            codes = column.flatten().to_numpy(zero_copy_only=True).reshape(len(batch), column.type.list_size)
            has_labels = "label" in batch.schema.names
            self._shards[index] = (codes, batch.column("label").to_numpy() if has_labels else None)
        return self._shards[index]
