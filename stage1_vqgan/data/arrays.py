"""Images that are stored as arrays of numbers: files that Pillow does not read, and columns of lists."""

import importlib.util
import io
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# Types of numbers that a column of lists may hold.
NUMBERS = {
    "bool",
    "float16",
    "float32",
    "float64",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
}
# Extension of a file → the library that reads it, and how to install it.
MEDICAL = "pip install 'tessella[medical]'"
PLUGINS = {
    ".dcm": ("pydicom", MEDICAL),
    ".dicom": ("pydicom", MEDICAL),
    ".nii": ("nibabel", MEDICAL),
    ".nii.gz": ("nibabel", MEDICAL),
    ".heic": ("pillow_heif", "pip install pillow-heif"),
    ".heif": ("pillow_heif", "pip install pillow-heif"),
}
# A slice of a volume is named by the path of its file and its number.
SLICE = re.compile(r"(.+\.nii(?:\.gz)?)::(\d+)", re.IGNORECASE)


def extension_of(file: Path) -> str:
    """The extension in small letters; ".nii.gz" is one."""
    return ".nii.gz" if file.name.lower().endswith(".nii.gz") else file.suffix.lower()


def array_extensions() -> set[str]:
    """Extensions of the files that are read here, with what is installed."""
    return {
        ".npy",
        *(extension for extension in (".dcm", ".dicom", ".nii", ".nii.gz") if missing_plugin(extension) is None),
    }


def missing_plugin(extension: str) -> str | None:
    """The command that installs the library for a kind of file; None if nothing is missing, or no library helps."""
    module, command = PLUGINS.get(extension, (None, None))
    return command if module is not None and importlib.util.find_spec(module) is None else None


def plugin_hint(files: Iterable[Path]) -> str:
    """What to install to read some files, as the end of a message; empty if nothing helps."""
    missing = {extension: missing_plugin(extension) for extension in sorted({extension_of(file) for file in files})}
    commands = [f"{extension} is read after {command}" for extension, command in missing.items() if command]
    return "".join(f"; {command}" for command in commands)


def read_array(content: bytes) -> np.ndarray | None:
    """Reads a file by its first bytes: `.npy`, or DICOM with the values that its rescaling gives (Hounsfield units).

    Returns:
        Array of the stored shape; None if it is another file.

    Raises:
        ValueError: the file is damaged, or its library is not installed.
    """
    reader = next((reader for place, mark, reader in READERS if content.startswith(mark, place)), None)
    return None if reader is None else reader(content)


def slices_of(file: Path) -> Iterable[Path]:
    """A file itself; of a NIfTI volume, the names of its slices along the last axis.

    Raises:
        ValueError: the volume cannot be read, or has other than three dimensions.
    """
    if extension_of(file) not in (".nii", ".nii.gz"):
        return [file]
    return [file.with_name(f"{file.name}::{number}") for number in range(_volume(str(file)).shape[2])]


def read_slice(name: str) -> np.ndarray | None:
    """A slice that `slices_of` named, `(y, x)`, with the volume's scaling; None if the name is of another file."""
    match = SLICE.fullmatch(name)
    return None if match is None else np.asarray(_volume(match[1]).dataobj[..., int(match[2])]).T


@lru_cache(maxsize=4)
def _volume(path: str) -> Any:
    import nibabel

    volume: Any = nibabel.load(path)
    if len(volume.shape) != 3:
        raise ValueError(f"{path} has the shape {volume.shape}; needs a volume of three dimensions")
    return volume


def channels_last(image: np.ndarray, num_channels: int) -> np.ndarray:
    """Moves the channels of a stored array to the end: `(C, H, W)` → `(H, W, C)`.

    The channels are the first or the last axis, whichever has a length that `pixels_of` converts to `num_channels`.

    Raises:
        ValueError: neither axis has such a length, or both have; or there are other than two or three axes.
    """
    if image.ndim == 2:
        return image
    if image.ndim != 3:
        raise ValueError(
            f"image: received shape {image.shape}; needs rows of pixels, (H, W), (H, W, channels) or (channels, H, W): "
            "a list of numbers alone has no height and width"
        )
    known = {1, 3, 4} if num_channels in (1, 3) else {num_channels}
    first, last = image.shape[0] in known, image.shape[2] in known
    if first == last:
        which = "both its first and its last axis" if first else "neither its first nor its last axis"
        allowed = " or ".join(map(str, sorted(known)))
        raise ValueError(
            f"image: received shape {image.shape}; {which} can be the channels, which are {allowed} for a tokenizer "
            f"with in_channels {num_channels}"
        )
    return np.moveaxis(image, 0, 2) if first else image


def number_type(feature: Any) -> tuple[int, str] | None:
    """Depth and type of numbers of a column of nested lists or arrays, a feature of `datasets`; else None."""
    from datasets import Value

    depth = 0
    while not isinstance(feature, Value):
        if hasattr(feature, "shape") and hasattr(feature, "dtype"):  # Array2D and the like
            return (depth + len(feature.shape), feature.dtype) if feature.dtype in NUMBERS else None
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        if inner is None:
            return None
        feature, depth = inner, depth + 1
    return (depth, feature.dtype) if depth and feature.dtype in NUMBERS else None


def to_numbers(rows: Any, dtype: str) -> np.ndarray:
    """Nested lists as an array; of objects, which are refused, if rows differ in length or a number is missing."""
    try:
        return np.asarray(rows, dtype=dtype)
    except (TypeError, ValueError):
        return np.asarray([[None]], dtype=object)


def _read_npy(content: bytes) -> np.ndarray:
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)  # type: ignore[attr-defined]
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}  # type: ignore[attr-defined]
    if version not in read:
        raise ValueError(f"the .npy file has version {version}; needs 1.0 or 2.0")
    shape, fortran_order, dtype = read[version](file)
    if dtype.hasobject:
        raise ValueError("the .npy file holds Python objects, which are never read; save numbers")
    values = np.frombuffer(content, dtype, int(np.prod(shape)), file.tell())
    return values.reshape(shape, order="F" if fortran_order else "C").astype(dtype.newbyteorder("="), copy=False)


def _read_dicom(content: bytes) -> np.ndarray:
    if missing_plugin(".dcm"):
        raise ValueError(f"this is a DICOM file, which pydicom reads: {MEDICAL}")
    from pydicom import dcmread
    from pydicom.pixels import apply_rescale

    data = dcmread(io.BytesIO(content))
    frames, pixels = int(data.get("NumberOfFrames") or 1), int(data.Rows) * int(data.Columns)
    if frames > 1:
        raise ValueError(f"the DICOM file holds {frames} frames; save each of them as a file")
    if pixels > (Image.MAX_IMAGE_PIXELS or np.inf):
        raise ValueError(f"the DICOM file declares {pixels:,} pixels, more than PIL.Image.MAX_IMAGE_PIXELS")
    stored = data.pixel_array
    if data.PhotometricInterpretation == "MONOCHROME1":  # its lowest value is white
        stored = ~stored if data.PixelRepresentation else stored.dtype.type(2**data.BitsStored - 1) - stored
    return apply_rescale(stored, data).astype(np.float32) if "RescaleSlope" in data else stored


def _refuse_nifti(content: bytes) -> np.ndarray:
    raise ValueError("this is a NIfTI volume, which is read from a folder of files; or save its slices as .npy")


# Place and text of the mark by which a file is known, and its reader.
READERS: list[tuple[int, bytes, Callable[[bytes], np.ndarray]]] = [
    (0, b"\x93NUMPY", _read_npy),
    (128, b"DICM", _read_dicom),
    (344, b"n+1\0", _refuse_nifti),
]
