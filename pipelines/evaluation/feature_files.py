"""Features of one set of images in files, written part by part.

    <folder>/
        record.json     network, number of images, widths, and a checksum of the images of each part that is done
        pooled.npy      float32 (N, D); networks with further outputs have a file for each

A part counts as done when the record names it, which is after its features are on disk.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs.disk_space import naming_full_disk
from configs.files import make_folder, read_json, remove_tree, write_json

RECORD_NAME = "record.json"


class FeatureFiles:
    """The files of a set. Those of another network or another number of images are removed.

    Args:
        folder: where the files are.
        network: checksum of the network.
        images: N.
        part: images of a part.
    """

    def __init__(self, folder: Path, network: str, images: int, part: int):
        self.folder, self.images, self.part = folder, images, part
        self.about = {"network": network, "images": images, "part": part}
        record = self._saved()
        if not record:
            remove_tree(folder)
        self.parts: list[str] = record.get("parts", [])
        self.widths: dict[str, int] = record.get("widths", {})

    def write(self, first: int, checksums: list[str], rows: dict[str, Tensor]) -> None:
        """Writes parts that follow one another.

        Args:
            first: number of the first part; at most the number of parts that are done.
            checksums: of the images of each part.
            rows: features of all images of these parts, float32 `(B, D)`, by the name of the output.

        Raises:
            DiskFull: the message names the file.
        """
        make_folder(self.folder)
        for name, values in rows.items():
            self._write_rows(name, first * self.part, values.cpu().numpy().astype("<f4", copy=False))
        self.widths = {name: values.shape[1] for name, values in rows.items()}
        self.parts[first : first + len(checksums)] = checksums
        write_json(self.folder / RECORD_NAME, {**self.about, "widths": self.widths, "parts": self.parts})

    def read(self) -> dict[str, Tensor]:
        """The features of all images, float32 `(N, D)`, by the name of the output. They stay on disk until used."""
        return {name: torch.from_numpy(np.load(self._path(name), mmap_mode="c")) for name in self.widths}

    def _saved(self) -> dict[str, Any]:
        """The record of the same network and images, if all its files are there."""
        try:
            record = read_json(self.folder / RECORD_NAME)
            shapes = {name: np.load(self._path(name), mmap_mode="r").shape for name in record["widths"]}
        except (OSError, ValueError, KeyError):  # incomplete or damaged files are written again
            return {}
        is_same = {key: record.get(key) for key in self.about} == self.about
        return record if is_same and shapes == {name: (self.images, D) for name, D in record["widths"].items()} else {}

    def _write_rows(self, name: str, start: int, values: np.ndarray) -> None:
        path = self._path(name)
        if not path.exists():
            self._create(path, values.shape[1])
        with naming_full_disk(path), open(path, "r+b") as file:
            file.seek(-values.shape[1] * values.itemsize * (self.images - start), os.SEEK_END)
            file.write(values.tobytes())
            file.flush()
            os.fsync(file.fileno())

    def _create(self, path: Path, width: int) -> None:
        """An array of zeros, which takes no room on the disk yet."""
        with open(path, "xb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (self.images, width)}
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + 4 * self.images * width)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"
