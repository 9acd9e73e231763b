"""Images in an .npz file, in the form of the field: `arr_0`, uint8 `(N, H, W, 3)`, and `arr_1`, their classes `(N,)`.

The suite that made the form usual evaluates such files: Dhariwal and Nichol 2021, "Diffusion models beat GANs on image
synthesis". They are written and read in parts.
"""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from configs import ConfigError, Problem
from configs.disk_space import require_space
from configs.files import replacing
from pipelines.evaluation.image_set import ImageSet
from pipelines.evaluation.reading import SomeImages, parts
from pipelines.evaluation.shards import levels_of, missing_of, ranges, shard_path, write_shard

IMAGES, CLASSES = "arr_0.npy", "arr_1.npy"
FORM = "needs arr_0, uint8 (N, H, W, 3), and for classes arr_1, whole numbers (N,), as numpy.savez writes them"
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class Header(NamedTuple):
    """Shape and dtype of an array in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype


def export_npz(path: Path, images: ImageSet) -> None:
    """Writes a set in the form of the field. After an interruption there is no file, or the older one.

    The images of the classes alternate, because the Inception Score of the field compares parts of the file.

    Args:
        path: the file; an older one is replaced.
        images: gray images become RGB.

    Raises:
        ConfigError: they have neither 1 nor 3 channels.
    """
    _, channels, height, width = images.read(range(1)).shape
    if channels not in (1, 3):
        message = f"received {str(path)!r}, but these images have {channels} channels; the form holds RGB"
        raise ConfigError([Problem("export", f"{message}; leave it out")])
    if images.labels is not None:
        images = SomeImages(images, alternating(images.labels))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        with writing(archive, IMAGES, Header((len(images), height, width, 3), np.dtype(np.uint8))) as entry:
            for part in tqdm(parts(images), desc="exporting", unit="part", total=len(ranges(len(images)))):
                entry.write(levels_of(part).expand(-1, -1, -1, 3).numpy().tobytes())
        if images.labels is not None:
            with writing(archive, CLASSES, Header(images.labels.shape, np.dtype(np.int64))) as entry:
                entry.write(images.labels.astype(np.int64).tobytes())
    gray = "; the gray images are RGB there, with three equal channels" if channels == 1 else ""
    print(f"{path} holds the {len(images):,} images{gray}")


def alternating(labels: np.ndarray) -> np.ndarray:
    """An order int64 `(N,)` in which the classes take turns: the first image of each class, the second of each, …"""
    turns = np.zeros(len(labels), np.int64)
    for one in np.unique(labels):
        turns[labels == one] = np.arange((labels == one).sum())
    return np.lexsort((labels, turns))


@contextmanager
def writing(archive: zipfile.ZipFile, name: str, header: Header) -> Iterator[IO[bytes]]:
    """Opens an array of an .npz file, after its header. It is no larger than it says."""
    with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as entry:
        descr = np.lib.format.dtype_to_descr(header.dtype)
        np.lib.format.write_array_header_1_0(entry, {"descr": descr, "fortran_order": False, "shape": header.shape})
        yield entry


# ---------------------------------------------------------------------- import


def npz_header(path: Path) -> Header:
    """Shape and dtype of the images in an .npz file.

    Raises:
        ConfigError: the file is missing, damaged, or has another form.
    """
    with opened(path) as archive, archive.open(IMAGES) as entry:
        return images_header(path, entry)


def read_labels(path: Path, count: int) -> np.ndarray | None:
    """The classes of the images in an .npz file, int64 `(N,)`; None if it has none.

    Raises:
        ConfigError: they are no classes of `count` images.
    """
    with opened(path) as archive:
        if CLASSES not in archive.namelist():
            return None
        with archive.open(CLASSES) as entry:
            header = read_header(path, entry)
            if header.shape != (count,) or header.dtype.kind not in "iu":
                found = f"arr_1 is {header.dtype} {header.shape} beside {count:,} images"
                raise refused(path, f"{found}; {FORM}, or no arr_1")
            labels = np.frombuffer(entry.read(count * header.dtype.itemsize), header.dtype)
    if len(labels) < count or labels.min() < 0:
        raise refused(
            path, "arr_1 is cut or has negative classes; classes are counted from 0; without classes, leave it out"
        )
    return labels.astype(np.int64)


def import_images(path: Path, folder: Path) -> None:
    """Copies the images of an .npz file into the shards of a folder, unless all are there.

    Args:
        path: the file.
        folder: claimed for the images of this file.

    Raises:
        ConfigError: the file is damaged, or has another form.
        DiskFull: the images do not fit on the disk.
    """
    shape = npz_header(path).shape
    shards, size = ranges(shape[0]), prod(shape[1:])
    if not list(missing_of(folder, shards, 0, 1)):
        return
    require_space(folder, shape[0] * size, f"the images of {path}")
    with opened(path) as archive, archive.open(IMAGES) as entry:
        read_header(path, entry)
        for number, rows in enumerate(tqdm(shards, desc="importing", unit="part")):
            content = entry.read(len(rows) * size)
            if len(content) < len(rows) * size:
                raise refused(path, f"arr_0 ends before image {rows.stop:,} of {shape[0]:,}; copy the file again")
            if number == len(shards) - 1 and entry.read(1):  # the end of the array, where its checksum is compared
                raise refused(path, "arr_0 is longer than its header says; copy the file again")
            write_shard(shard_path(folder, number), np.frombuffer(content, np.uint8).reshape(-1, *shape[1:]))


@contextmanager
def opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Opens an .npz file. Inside this context, what is wrong with it becomes a ConfigError.

    Raises:
        ConfigError: the file is missing, or damaged, or holds no arr_0.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if IMAGES not in archive.namelist():
                held = ", ".join(name.removesuffix(".npy") for name in archive.namelist()[:5]) or "nothing"
                raise refused(path, f"it holds {held}; {FORM}")
            yield archive
    except FileNotFoundError:
        raise refused(path, "there is no such file") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise refused(
            path, f"it is no whole .npz file ({reason}); copy it again, or write it by numpy.savez"
        ) from error


def images_header(path: Path, entry: IO[bytes]) -> Header:
    header = read_header(path, entry)
    shape = header.shape
    if header.dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or not all(shape):
        raise refused(path, f"arr_0 is {header.dtype} {shape}; {FORM}")
    return header


def read_header(path: Path, entry: IO[bytes]) -> Header:
    """Reads the header of an array. Nothing is unpickled: arrays of Python objects are refused.

    Raises:
        ConfigError: it is no header of a plain array.
    """
    try:
        shape, is_fortran, dtype = HEADERS[np.lib.format.read_magic(entry)](entry)
    except (ValueError, KeyError) as error:
        raise refused(path, f"it holds no array of numpy ({' '.join(str(error).split())[:120]}); {FORM}") from error
    if dtype.hasobject:
        raise refused(path, f"it holds Python objects, which could run code when they are read; {FORM}")
    if is_fortran:
        raise refused(path, f"its array is in Fortran order; {FORM}, after numpy.ascontiguousarray")
    return Header(shape, dtype)


def refused(path: Path, reason: str) -> ConfigError:
    return ConfigError([Problem("samples", f"received {str(path)!r}; {reason}")])
