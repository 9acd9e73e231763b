"""The code store: the codes of all images as Arrow files, and a manifest that describes them.

    code_store/
      origin.json                       settings and data that determine the codes; written first
      manifest.json                     token layout, splits, origin; written last
      train-00000.arrow …               shards of at most SHARD_ROWS rows, one record batch each
      validation-00000.arrow …

Columns: `codes`, a fixed-size list of uint16 (uint32 above 65,536 codes), and, for labeled images, `label`, int64.
Shard s holds images s·B to (s + 1)·B - 1 of the split, B = `images_per_shard`: view 0 of all of them, then view 1 of
all of them, and so on. Images that could not be decoded have no rows; the metadata of the shard's schema lists them.
`datasets.Dataset.from_file` also opens a shard.
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
from configs.files import write_json
from stage1_vqgan import SkippedImage
from stage2_prior.vocabulary import TokenLayout

SHARD_ROWS = 65536
ORIGIN_NAME, MANIFEST_NAME = "origin.json", "manifest.json"
# Key of the shard's notes in the metadata of its Arrow schema.
NOTES_KEY = b"tessella"


@dataclass(frozen=True)
class ShardNotes:
    """Facts about the images of a shard.

    Attributes:
        images: number of images in the shard's range of the split.
        skipped: the images in this range that could not be decoded, with their numbers in the split.
        num_classes: highest label plus one; 0 without labels.
        rows: number of rows.
    """

    images: int
    skipped: list[SkippedImage]
    num_classes: int
    rows: int


def images_per_shard(num_views: int) -> int:
    """Number of images whose views fill one shard, at least 1."""
    return max(1, SHARD_ROWS // num_views)


def code_dtype(num_codes: int) -> np.dtype:
    """The smallest dtype for codes in [0, num_codes): uint16 or uint32."""
    return np.dtype(np.uint16 if num_codes <= 2**16 else np.uint32)


def shard_path(folder: str | Path, split: str, shard: int) -> Path:
    """Path of a shard."""
    return Path(folder) / f"{split}-{shard:05d}.arrow"


def write_shard(
    path: Path, codes: np.ndarray, labels: np.ndarray | None, images: int, skipped: Sequence[SkippedImage] = ()
) -> None:
    """Writes one shard to a temporary file, syncs it and renames it: a file with a shard's name is complete.

    Args:
        path: see `shard_path`.
        codes: uint16 or uint32 `(rows, L)`.
        labels: int64 `(rows,)`, or None.
        images: number of images in the shard's range of the split.
        skipped: the images in this range that could not be decoded.
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
    """Reads the notes of a shard, without its rows."""
    with pa.OSFile(str(path)) as file:
        notes = json.loads(pa.ipc.open_stream(file).schema.metadata[NOTES_KEY])
    return ShardNotes(**{**notes, "skipped": [SkippedImage(*image) for image in notes["skipped"]]})


def claim_folder(folder: Path, origin: dict[str, Any]) -> int:
    """Records in a folder the settings that determine its codes, before the first shard is written.

    Args:
        folder: folder of the store; it is created if it does not exist.
        origin: settings and data that determine the codes, as JSON values.

    Returns:
        Number of rows in the shards that an interrupted run has already written.

    Raises:
        ConfigError: the folder holds codes of another origin.
    """
    path = folder / ORIGIN_NAME
    shards = sorted(folder.glob("*.arrow"))
    if not shards and not (folder / MANIFEST_NAME).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, origin)
        return 0
    if not path.is_file():
        raise ConfigError([Problem("code_store", f"{folder} holds codes of unknown origin; choose another folder")])
    before, now = json.loads(path.read_text()), json.loads(json.dumps(origin))
    problems = [
        Problem("code_store", f"{folder} holds codes with {name} {before.get(name)!r}, but {name} is now {value!r}")
        for name, value in now.items()
        if before.get(name) != value
    ]
    if problems:
        problems.append(Problem("code_store", "choose another folder, or remove this one to encode the images again"))
        raise ConfigError(problems, "code store")
    return sum(read_notes(shard).rows for shard in shards)


def write_manifest(
    folder: Path, layout: TokenLayout, splits: dict[str, list[ShardNotes]], origin: dict[str, Any], seconds: float
) -> None:
    """Writes the manifest, which marks a store as finished.

    Args:
        folder: folder of the store.
        layout: token layout of the codes.
        splits: notes of the shards of every split.
        origin: see `claim_folder`.
        seconds: time in which this run encoded the images.
    """
    summaries = {
        name: {
            "images": sum(shard.images for shard in shards),
            "rows": sum(shard.rows for shard in shards),
            "shard_rows": [shard.rows for shard in shards],
            "skipped": [image._asdict() for shard in shards for image in shard.skipped],
        }
        for name, shards in splits.items()
    }
    manifest = {
        "token_layout": layout.to_dict(),
        "splits": summaries,
        "origin": origin,
        "seconds": round(seconds, 1),
    }
    write_json(folder / MANIFEST_NAME, manifest)


class CodeStore:
    """A finished code store. It is read through memory maps.

    Args:
        folder: folder of the store.

    Raises:
        ConfigError: the folder holds no finished store, or a store of an earlier version.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        manifest = self.folder / MANIFEST_NAME
        if not manifest.is_file():
            message = f"received {str(folder)!r}; it holds no finished code store (run stage2_prior.tokenize first)"
            raise ConfigError([Problem("code_store", message)])
        self.manifest: dict[str, Any] = json.loads(manifest.read_text())
        if any("shard_rows" not in split for split in self.manifest["splits"].values()):
            message = f"{folder} was written by an earlier version; remove it and run stage2_prior.tokenize again"
            raise ConfigError([Problem("code_store", message)])
        self.layout = TokenLayout.from_dict(self.manifest["token_layout"])

    def split(self, name: str) -> "CodeSplit":
        """The rows of a split, "train" or "validation"."""
        return CodeSplit(self.folder, name, self.manifest["splits"][name]["shard_rows"])


class CodeSplit:
    """The rows of one split.

    The first read maps the shards into memory. A pickle excludes the maps, so worker processes can receive a split.

    Args:
        folder: folder of the store.
        name: "train" or "validation".
        shard_rows: number of rows of each shard.
    """

    def __init__(self, folder: Path, name: str, shard_rows: Sequence[int]):
        self.folder, self.name = folder, name
        self.ends = np.cumsum(shard_rows, dtype=np.int64)
        self.starts = self.ends - shard_rows

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_shards"}

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Reads rows in any order, across shards.

        Args:
            rows: int64 `(n,)`, row numbers of the split.

        Returns:
            Codes, uint16 or uint32 `(n, L)`, and labels, int64 `(n,)`, or None for a store without labels.
        """
        shards = np.searchsorted(self.ends, rows, side="right")
        offsets = rows - self.starts[shards]
        first_codes, first_labels = self._shards[0]
        codes = np.empty((len(rows), first_codes.shape[1]), first_codes.dtype)
        labels = None if first_labels is None else np.empty(len(rows), first_labels.dtype)
        for shard in np.unique(shards):
            shard_codes, shard_labels = self._shards[shard]
            places = np.flatnonzero(shards == shard)
            codes[places] = shard_codes[offsets[places]]
            if labels is not None and shard_labels is not None:
                labels[places] = shard_labels[offsets[places]]
        return codes, labels

    @cached_property
    def _shards(self) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Codes `(rows, L)` and labels `(rows,)` of every shard, as views of its memory map."""
        shards = []
        for shard in range(len(self.ends)):
            # The map stays valid after the file is closed.
            with pa.memory_map(str(shard_path(self.folder, self.name, shard))) as source:
                batch = pa.ipc.open_stream(source).read_next_batch()
            codes = batch.column("codes")
            rows = codes.flatten().to_numpy(zero_copy_only=True).reshape(-1, codes.type.list_size)
            labels = batch.column("label").to_numpy(zero_copy_only=True) if "label" in batch.schema.names else None
            shards.append((rows, labels))
        return shards
