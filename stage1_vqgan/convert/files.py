"""Untrusted files → tensors and plain values. No code in these files is run, and nothing they name is imported."""

import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import safe_globals

from configs import ConfigError, Problem
from configs.problems import listed, shown
from configs.yaml_files import parse_yaml
from stage1_vqgan.convert.flax import read_flax

# Largest size of a configuration in bytes, and its largest number of values: aliases of YAML can multiply them.
LARGEST_CONFIG, MOST_VALUES = 2**20, 10_000
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class StandIn:
    """Replaces an object that a training script saved with the weights. It does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# Classes and functions that checkpoints of the original code bases contain besides tensors and plain containers.
STAND_INS = [
    *(
        f"{package}.callbacks.{name}"
        for package in ("pytorch_lightning", "lightning.pytorch")
        for name in (
            "model_checkpoint.ModelCheckpoint",
            "early_stopping.EarlyStopping",
            "lr_monitor.LearningRateMonitor",
            "base.Callback",
        )
    ),
    "argparse.Namespace",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
]


def refuse(field: str, path: Path, reason: str) -> ConfigError:
    """The error for a file that cannot be used; `field` is the configuration field that names the file."""
    return ConfigError([Problem(field, f"received {shown(str(path))}; {reason}")])


def read_tensors(path: Path, field: str = "checkpoint") -> dict[str, Tensor]:
    """Reads the tensors of a file that holds nothing else, on the CPU, in their stored dtypes.

    Args:
        path: see `read_content`.
        field: configuration field for the error.

    Raises:
        ConfigError: the file does not exist, is damaged, or contains more than tensors.
    """
    content = read_content(path, field)
    if not isinstance(content, Mapping):
        raise refuse(field, path, f"it holds {type(content).__name__}; it must hold a state dict")
    return require_tensors(content, path, field)


def require_tensors(state: Mapping[Any, Any], path: Path, field: str = "checkpoint") -> dict[str, Tensor]:
    """A state dict that was read from a file.

    Raises:
        ConfigError: it is empty, or holds more than tensors.
    """
    foreign = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if foreign or not state:
        found = f"not a tensor: {listed(foreign)}" if foreign else "it is empty"
        raise refuse(field, path, f"{found}; the file must hold a state dict")
    return {str(name): value for name, value in state.items()}


def read_content(path: Path, field: str = "checkpoint") -> Any:
    """Reads a file with tensors, on the CPU, in their stored dtypes: a mapping or whatever was saved.

    Args:
        path: safetensors file, .msgpack of Flax, or pickle of `torch.save`, which is only read with
            `weights_only=True`.
        field: configuration field for the error.

    Raises:
        ConfigError: the file does not exist, is damaged, or contains more than tensors and plain containers.
    """
    if not path.is_file():
        reason = "it is a folder; give the file of the weights in it" if path.is_dir() else "there is no such file"
        raise refuse(field, path, reason)
    if path.suffix == ".safetensors":
        return _read_safetensors(path, field)
    return _read_flax(path, field) if path.suffix == ".msgpack" else _read_pickle(path, field)


def is_stored(tensor: Tensor) -> bool:
    """Whether the file stores every number of a tensor. The size of sparse and expanded tensors has no limit."""
    return tensor.layout == torch.strided and tensor.nbytes <= tensor.untyped_storage().nbytes()


def as_float32(weights: Mapping[str, Tensor], path: Path, field: str = "checkpoint") -> dict[str, Tensor]:
    """Converts weights to contiguous float32.

    Raises:
        ConfigError: a weight is not a floating-point tensor, not finite, or larger than its stored data.
    """
    wrong = [f"{name} ({value.dtype})" for name, value in weights.items() if value.dtype not in FLOATS]
    hollow = [name for name, value in weights.items() if not is_stored(value)]
    problems = [
        Problem(field, f"{listed(names)}: {reason}")
        for names, reason in (
            (wrong, "weights must be float16, bfloat16, float32 or float64"),
            (hollow, "the file stores fewer numbers than these tensors have"),
        )
        if names
    ]
    if problems:
        raise ConfigError(problems, str(path))
    converted = {name: value.to(torch.float32).contiguous() for name, value in weights.items()}
    infinite = [name for name, value in converted.items() if not value.isfinite().all()]
    if infinite:
        raise ConfigError([Problem(field, f"{listed(infinite)}: not every number is finite in float32")], str(path))
    return converted


def read_mapping(path: Path, field: str = "config") -> dict[str, Any]:
    """Reads the keys and values of a YAML or JSON file.

    Raises:
        ConfigError: the file does not exist, is not valid, or is too large.
    """
    if not path.is_file():
        reason = "it is a folder; give a YAML or JSON file" if path.is_dir() else "there is no such file"
        raise refuse(field, path, reason)
    if path.stat().st_size > LARGEST_CONFIG:
        raise refuse(
            field, path, f"it has {path.stat().st_size:,} bytes; a configuration has at most {LARGEST_CONFIG:,}"
        )
    try:
        text = path.read_text(encoding="utf-8")
        values, repeated = (json.loads(text), []) if path.suffix == ".json" else parse_yaml(text)
    except UnicodeDecodeError:
        raise refuse(field, path, "it is not a text file; give a YAML or JSON file") from None
    except RecursionError:
        raise refuse(field, path, "it is nested too deeply") from None
    except ValueError as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise refuse(field, path, f"it is not valid {kind}: {error}") from None
    if repeated:
        raise ConfigError(repeated, str(path))
    if not isinstance(values, dict):
        raise refuse(field, path, f"it holds {type(values).__name__}; it must hold keys and values")
    if not _is_small(values):
        raise refuse(field, path, f"it holds more than {MOST_VALUES:,} values, too many for a configuration")
    return values


def _is_small(values: Any) -> bool:
    waiting, seen = [values], 0
    while waiting and seen <= MOST_VALUES:
        value, seen = waiting.pop(), seen + 1
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return not waiting


def _read_safetensors(path: Path, field: str) -> dict[str, Any]:
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise refuse(field, path, f"it is not a complete safetensors file ({error}); download it again") from None


def _read_flax(path: Path, field: str) -> dict[str, Any]:
    try:
        return read_flax(path)
    except ModuleNotFoundError:
        raise refuse(field, path, "msgpack is not installed: pip install 'tessella[convert]'") from None
    except Exception as error:  # msgpack raises exceptions of many types
        raise refuse(field, path, f"it is not a complete file of Flax; download it again ({_reason(error)})") from None


def _read_pickle(path: Path, field: str) -> Any:
    is_zip = zipfile.is_zipfile(path)
    if is_zip and any(entry.compress_type for entry in _entries(path, field)):
        raise refuse(field, path, "parts of it are compressed, which torch.save never does; it is not a checkpoint")
    try:
        with safe_globals([(StandIn, name) for name in STAND_INS]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # a broken pickle raises exceptions of many types
        unwanted = re.search(r"\bGLOBAL ([\w.]+)", str(error))
        if unwanted is None:
            reason = "it is not a complete checkpoint of torch.save; download it again"
            raise refuse(field, path, f"{reason} ({_reason(error)})") from None
        reason = (
            f"it asks for {unwanted[1]}, which is code, not weights; nothing was run. If you trust it, save only its "
            "weights where it was made: torch.save({'state_dict': model.state_dict()}, 'weights.ckpt')"
        )
        raise refuse(field, path, reason) from None
    return content


def _entries(path: Path, field: str) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise refuse(field, path, f"it is damaged; download it again ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    text = str(error).rpartition("WeightsUnpickler error: ")[2].strip()  # the part before it is advice to programmers
    return (text or type(error).__name__).splitlines()[0][:120]
