"""The files of a checkpoint: tensors in safetensors, plain values in JSON. Neither can run code when it is read.

A state is a nested structure of both, for instance an optimizer's. It is saved as two files of one name: the tensors,
and a JSON file that holds the plain values and describes every tensor.

Weights and states may be spread over processes (FSDP 2): they are gathered when they are saved, and each process takes
its shard when they are loaded. So the files do not depend on the number of processes.
"""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from configs.checksums import CHECKED_SUFFIXES, Damaged
from configs.files import read_json
from configs.problems import shown

# A tensor of a state is `{TENSOR: "float32 [2, 3]"}` in the JSON file.
TENSOR = "tensor"


def refuse_pickles(checkpoint: Path) -> None:
    """Refuses a checkpoint that holds other files than safetensors and JSON. Call it before anything reads a file.

    Raises:
        Damaged: the message names the file.
    """
    for path in sorted(checkpoint.rglob("*")):
        if not path.is_dir() and path.suffix not in CHECKED_SUFFIXES:
            raise Damaged(
                f"{path}: this project writes no pickles, and reads only .json and .safetensors files. If an earlier "
                "version saved this checkpoint, finish the run with that version, or start anew in another output_dir"
            )


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered if it is sharded. Then all processes must call this."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(target: Tensor, value: Tensor) -> None:
    """Copies a whole tensor into `target`, or this process's shard of it. Strides and device of `target` stay."""
    if isinstance(target, DTensor):
        shard = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(shard.to_local())
    else:
        target.copy_(value)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], is_main_process: bool = True) -> None:
    """Writes a safetensors file. All processes must call this if tensors are sharded; the main process writes."""
    gathered = {}
    for name, tensor in tensors.items():
        value = whole(tensor)
        if is_main_process:
            gathered[name] = value.cpu().contiguous()
    if is_main_process:
        save_file(gathered, path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file, to the CPU.

    Raises:
        Damaged: the file is missing or damaged, or a number in it is not finite.
    """
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise Damaged(f"{path}: this file is missing") from None
    except SafetensorError as error:
        raise Damaged(f"{path}: this file is damaged ({error})") from error
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise Damaged(f"{path}: {name}: not all numbers are finite")
    return tensors


def require_like(saved: Mapping[str, Tensor], like: Mapping[str, Tensor], path: Path) -> None:
    """Compares names, dtypes and shapes of saved tensors with those of the run.

    Raises:
        Damaged: the message names the file `path` and the first entry that is missing, unknown or misshapen.
    """
    for name in sorted({*saved, *like}):
        found, wanted = (_described(tensors[name]) if name in tensors else "nothing" for tensors in (saved, like))
        if found != wanted:
            raise Damaged(f"{path}: {name}: received {found}; this run has {wanted}")


def require_values_like(saved: Any, like: Any, path: Path, place: str) -> None:
    """Compares the structure, the types and the strings of plain values with those of the run.

    Where `like` is None, every value is accepted.

    Raises:
        Damaged: the message names the file `path` and the place in it.
    """
    if isinstance(saved, dict) and isinstance(like, dict) and saved.keys() == like.keys():
        for key in like:
            require_values_like(saved[key], like[key], path, f"{place}/{key}")
    elif isinstance(saved, list) and isinstance(like, list | tuple) and len(saved) == len(like):
        for number, (one, other) in enumerate(zip(saved, like, strict=True)):
            require_values_like(one, other, path, f"{place}/{number}")
    elif like is not None and not _is_alike(saved, like):
        raise Damaged(f"{path}: {place}: received {shown(saved)}; this run has {shown(like)}")


def write_state(path: Path, state: dict[str, Any], is_main_process: bool = True) -> None:
    """Writes a state to `path`.json and `path`.safetensors. All processes must call this if tensors are sharded.

    Args:
        path: both files without their suffixes.
        state: nested dicts, with strings as keys, and lists of tensors and plain values.
        is_main_process: this process writes.
    """
    tensors: dict[str, Tensor] = {}
    values = _split(state, "", tensors)
    write_tensors(path.with_suffix(".safetensors"), tensors, is_main_process)
    if is_main_process:
        path.with_suffix(".json").write_text(json.dumps(values))


def read_state(path: Path) -> dict[str, Any]:
    """Reads what `write_state` wrote; tuples have become lists.

    Raises:
        Damaged: a file is missing or damaged, or the two do not belong together.
    """
    tensors, file = read_tensors(path.with_suffix(".safetensors")), path.with_suffix(".json")
    try:
        state = _join(read_json(file), "", tensors, path.with_suffix(".safetensors"))
    except FileNotFoundError:
        raise Damaged(f"{file}: this file is missing") from None
    except Damaged:
        raise
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{file}: {str(error).removeprefix(f'{file}: ')}") from error
    if tensors:
        raise Damaged(f"{path.with_suffix('.safetensors')}: {min(tensors)}: {file.name} does not know this entry")
    return state


def _split(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Moves the tensors of a state to `tensors`, by their place, and returns the rest for JSON."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {TENSOR: _described(value)}
    if isinstance(value, dict):
        return {key: _split(item, f"{name}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_split(item, f"{name}/{number}", tensors) for number, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name}: received a {type(value).__name__}; a state holds tensors and plain values")


def _join(value: Any, name: str, tensors: dict[str, Tensor], path: Path) -> Any:
    """The reverse of `_split`; removes the entries of `tensors` that it uses."""
    if isinstance(value, list):
        return [_join(item, f"{name}/{number}", tensors, path) for number, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if value.keys() != {TENSOR}:
        return {key: _join(item, f"{name}/{key}", tensors, path) for key, item in value.items()}
    found = tensors.pop(name, None)
    if found is None or _described(found) != value[TENSOR]:
        received = "nothing" if found is None else _described(found)
        raise Damaged(f"{path}: {name}: received {received}; {value[TENSOR]} was saved")
    return found


def _described(tensor: Tensor) -> str:
    """Dtype and shape, for instance "float32 [2, 3]"."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _is_alike(saved: Any, like: Any) -> bool:
    """Whether a value of JSON, or a tensor, can stand for another. Integers and floats count as one type."""
    if isinstance(like, bool | str):
        return type(saved) is type(like) and (saved == like or isinstance(like, bool))
    if isinstance(like, int | float):
        is_number = isinstance(saved, int | float) and not isinstance(saved, bool)
        return is_number and (abs(saved) <= sys.float_info.max or not math.isfinite(like))
    return isinstance(saved, Tensor) and isinstance(like, Tensor)
