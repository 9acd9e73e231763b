"""Images in files on disk. Several processes write them, an interrupted run goes on, and all are read in parts.

folder/
  inputs.json    what the images were made of
  00000.npy      a shard: uint8 or float32 (n, H, W, C). A file of this name is complete
  00000.json     notes of the shard, written before it

Shape letters: N images, n images of a shard, H W image size, C channels.
"""

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs.checksums import Damaged
from configs.files import make_folder, read_json, replacing, write_json
from stage1_vqgan import normalize

INPUTS_NAME = "inputs.json"
SHARD_SIZE = 256  # images
MOST_OPEN = 128  # shards of a set that are mapped into memory at once; each takes an open file


class ImageShards:
    """The images in the shards of a folder, an `ImageSet`.

    Args:
        folder: the folder. All its shards are complete.
        labels: class of each image, int64 `(N,)`; None if they have no classes.

    Raises:
        Damaged: a shard cannot be read.
    """

    def __init__(self, folder: Path, labels: np.ndarray | None = None):
        self.labels = labels
        self._paths = sorted(folder.glob("[0-9]*.npy"))
        self._opened = lru_cache(MOST_OPEN)(open_shard)
        self._starts = np.cumsum([0, *(len(self._opened(path)) for path in self._paths)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def shape(self) -> tuple[int, int, int]:
        """H, W, C."""
        return self._opened(self._paths[0]).shape[1:]

    def read(self, rows: range) -> Tensor:
        """See `ImageSet.read`."""
        return pixels_of_levels(self.stored(rows))

    def stored(self, rows: range) -> np.ndarray:
        """The images of these rows as they are stored, uint8 or float32 `(B, H, W, C)`."""
        first, last = np.searchsorted(self._starts, [rows.start, rows.stop - 1], side="right") - 1
        parts = []
        for number in range(first, last + 1):
            shard, start = self._opened(self._paths[number]), self._starts[number]
            parts.append(shard[max(0, rows.start - start) : rows.stop - start])
        return np.concatenate(parts)


def open_shard(path: Path) -> np.ndarray:
    """Maps a shard into memory.

    Raises:
        Damaged: the file is not a whole shard.
    """
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise Damaged(f"{path}: cannot be read ({reason}); remove it, and the same command writes it again") from error


def pixels_of_levels(stored: np.ndarray) -> Tensor:
    """Stored images, uint8 or float32 `(B, H, W, C)`, as pixels float32 `(B, C, H, W)` in [-1, 1]."""
    images = torch.from_numpy(stored).permute(0, 3, 1, 2)
    return normalize(images) if images.dtype == torch.uint8 else images


def levels_of(pixels: Tensor) -> Tensor:
    """Pixels float32 `(B, C, H, W)` in [-1, 1], rounded to uint8 `(B, H, W, C)`."""
    return ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def claim(folder: Path, inputs: dict[str, Any]) -> None:
    """Prepares a folder for the shards of some inputs. Shards of the same inputs stay, those of others are removed.

    Args:
        folder: created if it does not exist.
        inputs: everything that determines the images, as JSON.
    """
    make_folder(folder)
    inputs = json.loads(json.dumps(inputs))
    if recorded_inputs(folder) == inputs:
        return
    old = sorted(folder.glob("[0-9]*.npy"))
    if old:
        print(f"{folder}: {len(old):,} files with images of other weights or settings are replaced")
    # before the new record: after a crash, no old shard stands beside it
    for path in (*old, *folder.glob("[0-9]*.json")):
        path.unlink()
    write_json(folder / INPUTS_NAME, inputs)


def recorded_inputs(folder: Path) -> dict[str, Any] | None:
    """What the images in a folder were made of; None if no readable file says it."""
    try:
        return read_json(folder / INPUTS_NAME)
    except (FileNotFoundError, ValueError):
        return None


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.npy"


def ranges(count: int) -> list[range]:
    """The rows of each shard of `count` images."""
    return [range(start, min(start + SHARD_SIZE, count)) for start in range(0, count, SHARD_SIZE)]


def missing_of(folder: Path, shards: Sequence[Any], rank: int, world_size: int) -> Iterator[tuple[Path, Any]]:
    """Path and contents of each shard that this process still has to write.

    Process r of R writes the shards s with s mod R = r, whatever the others have done.
    """
    for number in range(rank, len(shards), world_size):
        path = shard_path(folder, number)
        if not path.is_file():
            yield path, shards[number]


def write_shard(path: Path, images: np.ndarray, notes: dict[str, Any] | None = None) -> None:
    """Writes a shard atomically, after its notes.

    Args:
        path: see `shard_path`.
        images: uint8 or float32 `(n, H, W, C)`.
        notes: facts about the images, as JSON.
    """
    if notes is not None:
        write_json(path.with_suffix(".json"), notes)
    with replacing(path) as file:
        np.save(file, np.ascontiguousarray(images), allow_pickle=False)
