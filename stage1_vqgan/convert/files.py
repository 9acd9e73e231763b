"""Files of strangers → tensors and plain values. Nothing in them is run, nothing they name is imported."""

import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import safe_globals

from configs import ConfigError, Problem
from configs.problems import shown
from configs.yaml_files import parse_yaml

# Bytes of a configuration, and values in it: YAML may say thrice what it holds once, and so on.
LARGEST_CONFIG, MOST_VALUES = 2**20, 10_000
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class StandIn:
    """Takes the place of an object that training scripts save beside the weights; it has no behaviour."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# What checkpoints of the original code bases hold beside tensors and plain containers.
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
    """The error for a file that cannot be used; `key` is the command's key that named it."""
    return ConfigError([Problem(field, f"received {shown(str(path))}; {reason}")])


def read_tensors(path: Path, entries: Sequence[str] = (), field: str = "checkpoint") -> dict[str, Tensor]:
    """The tensors of a checkpoint, on the CPU in the dtypes they are stored in.

    Args:
        path: safetensors, or a pickle of `torch.save`, which is only read with `weights_only=True`.
        entries: where the weights may lie in a pickle that holds more than them; the first that is there counts.
        key: of the command, for the message.

    Raises:
        ConfigError: it is no such file, is damaged, or asks for more than tensors and plain containers.
    """
    if not path.is_file():
        reason = "it is a folder; give the file of the weights in it" if path.is_dir() else "there is no such file"
        raise refuse(field, path, reason)
    content = _read_safetensors(path, field) if path.suffix == ".safetensors" else _read_pickle(path, field)
    holder = next((name for name in entries if isinstance(content.get(name), Mapping)), None)
    weights = content if holder is None else content[holder]
    foreign = [str(name) for name, value in weights.items() if not isinstance(value, Tensor)]
    if foreign or not weights:
        found = f"{listed(foreign)} {'are' if len(foreign) > 1 else 'is'} no tensor" if foreign else "it is empty"
        wanted = "a state dict" + (f", alone or under {' or '.join(map(repr, entries))}" if entries else "")
        raise refuse(field, path, f"{found}; needed is {wanted}")
    return {str(name): value for name, value in weights.items()}


def as_float32(weights: Mapping[str, Tensor], path: Path, field: str = "checkpoint") -> dict[str, Tensor]:
    """The same weights as contiguous float32.

    Raises:
        ConfigError: one is no floating-point tensor, not finite, or larger than what the file stores of it.
    """
    # sparse and expanded tensors can have any size
    plain = {
        name: value.layout == torch.strided and value.nbytes <= value.untyped_storage().nbytes()
        for name, value in weights.items()
    }
    wrong = [f"{name} ({value.dtype})" for name, value in weights.items() if value.dtype not in FLOATS]
    hollow = [name for name, stored in plain.items() if not stored]
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
    """The keys and values of a YAML or JSON file.

    Raises:
        ConfigError: it is no such file.
    """
    if not path.is_file():
        reason = "it is a folder; give a YAML or JSON file" if path.is_dir() else "there is no such file"
        raise refuse(field, path, reason)
    if path.stat().st_size > LARGEST_CONFIG:
        raise refuse(field, path, f"it has {path.stat().st_size:,} bytes; this is no configuration")
    try:
        text = path.read_text(encoding="utf-8")
        values, repeated = (json.loads(text), []) if path.suffix == ".json" else parse_yaml(text)
    except UnicodeDecodeError:
        raise refuse(field, path, "it is not a text file; a YAML or JSON file is needed") from None
    except RecursionError:
        raise refuse(field, path, "it is nested too deeply") from None
    except ValueError as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise refuse(field, path, f"it is not valid {kind}: {error}") from None
    if repeated:
        raise ConfigError(repeated, str(path))
    if not isinstance(values, dict):
        raise refuse(field, path, f"it holds {type(values).__name__}; needed are keys and values")
    if not _is_small(values):
        raise refuse(field, path, f"it holds more than {MOST_VALUES:,} values; this is no configuration")
    return values


def listed(names: Sequence[str], most: int = 12) -> str:
    """Names for a message, the first of them when there are many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


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


def _read_pickle(path: Path, field: str) -> dict[str, Any]:
    is_zip = zipfile.is_zipfile(path)
    if is_zip and any(entry.compress_type for entry in _entries(path, field)):
        raise refuse(field, path, "parts of it are compressed, which torch.save never does; this is no checkpoint")
    try:
        with safe_globals([(StandIn, name) for name in STAND_INS]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # a broken pickle raises errors of many kinds
        unwanted = re.search(r"\bGLOBAL ([\w.]+)", str(error))
        if unwanted is None:
            reason = "it is not a complete checkpoint of torch.save; download it again"
            raise refuse(field, path, f"{reason} ({_reason(error)})") from None
        reason = (
            f"it asks for {unwanted[1]}, which is code, not weights; nothing was run. If you trust it, save its "
            "weights alone where it was made: torch.save({'state_dict': model.state_dict()}, 'weights.ckpt')"
        )
        raise refuse(field, path, reason) from None
    if not isinstance(content, Mapping):
        raise refuse(field, path, f"it holds {type(content).__name__}; needed is a state dict")
    return dict(content)


def _entries(path: Path, field: str) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise refuse(field, path, f"it is damaged; download it again ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    text = str(error).rpartition("WeightsUnpickler error: ")[2].strip()  # what goes before is advice to torch's callers
    return (text or type(error).__name__).splitlines()[0][:120]
