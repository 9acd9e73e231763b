"""Checks the arguments of VQGANPipeline that need more than a type and a range."""

import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi
from torch import Tensor, nn

from configs.arguments import choice, described, instance, whole
from configs.hub import is_repo_id
from pipelines.hub import one_device

LONGEST_TEXT = 4096  # characters, the longest path of Linux

# The types of the arguments of `from_pretrained`.
LOADING: dict[str, tuple[type, ...]] = {
    "pretrained_model_name_or_path": (str, Path),
    "revision": (str, NoneType),
    "token": (str, bool, NoneType),
    "cache_dir": (str, Path, NoneType),
    "local_files_only": (bool,),
    "subfolder": (str,),
    "attn_implementation": (str, NoneType),
    "trust_remote_code": (bool,),
}

# The dtypes in which the models can compute, by name.
DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "float16", "bfloat16")}


def listed_labels(labels: Any) -> Sequence[Any]:
    """Class labels as a list: ids or names, one or a sequence, a tensor or an array of one axis.

    Raises:
        ValueError: the labels are in another container or have more axes, or there are none.
    """
    if isinstance(labels, Tensor | np.ndarray):
        if labels.ndim > 1 or (isinstance(labels, Tensor) and not has_values(labels)):
            raise ValueError(f"class_labels: received {described(labels)}; needs one axis")
        labels = np.atleast_1d(np.asarray(labels.tolist(), dtype=object))
    if isinstance(labels, str | bytes) or not isinstance(labels, Sequence | np.ndarray):
        labels = [labels]
    try:
        count = len(labels)
    except OverflowError as error:  # a range of more than 2⁶³ numbers
        raise ValueError(f"class_labels: received {described(labels)}; needs fewer labels") from error
    if not count:
        raise ValueError("class_labels: received an empty list; needs at least one label")
    return labels


# The axes of codes, by their number; see `TokenLayout.codes_shape`.
AXES = {2: "(N, L)", 3: "(N, h, w)", 4: "(N, h, w, G)"}


def int64_codes(codes: Any, num_axes: int = 3) -> Tensor:
    """Codes `(N, h, w)` as a dense int64 tensor, on their device or the CPU.

    Args:
        codes: a tensor, an array or nested lists of whole numbers; floats and booleans are refused.
        num_axes: number of axes of the codes, see `AXES`.

    Raises:
        ValueError: the values are not whole numbers, or the shape is another one.
    """
    needed = f"needs whole numbers {AXES[num_axes]}, each at least 1"
    if isinstance(codes, Tensor) and not has_values(codes):
        raise ValueError(f"codes: received {described(codes)}, without values; {needed}")
    table = codes if isinstance(codes, Tensor) and codes.dtype == torch.int64 else _int64(codes, needed)
    if table.ndim != num_axes or not table.numel():
        raise ValueError(f"codes: received shape {tuple(table.shape)}; {needed}")
    return table


def _int64(codes: Any, needed: str) -> Tensor:
    """A tensor of another dtype, an array or nested lists as an int64 tensor."""
    instance("codes", codes, (Tensor, np.ndarray, list, tuple), "a tensor, an array or nested lists")
    try:
        array = np.asarray(codes.cpu() if isinstance(codes, Tensor) else codes)
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"codes: received {described(codes)}; {needed}") from error
    if array.dtype.kind not in "iu" or (array.dtype.kind == "u" and array.size and array.max() > 2**63 - 1):
        raise ValueError(f"codes: received {described(codes)} of type {array.dtype}; {needed}")
    return torch.from_numpy(array.astype(np.int64))


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor is a plain table of numbers: not on the device "meta", and not sparse."""
    return not tensor.is_meta and tensor.layout == torch.strided


def require_move(name: str, *args: Any, **kwargs: Any) -> None:
    """Refuses arguments of `torch.nn.Module.to` that would fail after one model has moved, or would lose the weights.

    Raises:
        ValueError: there is no such device, or the dtype cannot hold weights.
    """
    received = ", ".join([*map(described, args), *(f"{key}={described(value)}" for key, value in kwargs.items())])
    for value in args:  # torch takes the number 1.0 for a double
        instance(name, value, (str, int, torch.device, torch.dtype, Tensor), "a device or a dtype")
    try:
        probe = nn.Linear(1, 1).to(*args, **kwargs).weight
    except Exception as error:  # each backend of torch raises its own exceptions
        reason = str(error).strip().partition("\n")[0][:120]
        raise ValueError(f"{name}: received {received}; torch refuses it: {reason}") from error
    if probe.is_meta or probe.dtype not in DTYPES.values():
        allowed = f"must be a device that holds numbers, or one of the dtypes {', '.join(DTYPES)}"
        raise ValueError(f"{name}: received {received}; {allowed}")


def require_device(device: Any, device_map: Any) -> torch.device | None:
    """The device that `device` or `device_map` names; None if neither is given.

    Raises:
        ValueError: there is no such device, both are given, or the map spreads a model over several devices.
    """
    if device is not None:
        instance("device", device, (str, torch.device), "a device such as 'cpu' or 'cuda'")
        require_move("device", device)
    kinds = (str, int, torch.device, dict, NoneType)
    instance("device_map", device_map, kinds, "'auto', a device, or a dictionary with one device")
    if isinstance(device_map, int):
        whole("device_map", device_map, least=0, most=2**15)
    where = one_device(device, device_map)
    if where is not None:
        require_move("device" if device_map is None else "device_map", where)
    return where


def require_loading(**values: Any) -> None:
    """Refuses arguments of `VQGANPipeline.from_pretrained` of another type than in LOADING, or that no path can hold.

    Raises:
        ValueError: names the first such argument.
    """
    for name, value in values.items():
        instance(name, value, LOADING[name], " or ".join(kind.__name__ for kind in LOADING[name]))
        if isinstance(value, str) and (len(value) > LONGEST_TEXT or "\0" in value):
            allowed = f"must have at most {LONGEST_TEXT} characters, and no NUL"
            raise ValueError(f"{name}: received {described(value)}; {allowed}")


def require_dtype(dtype: Any) -> None:
    """Refuses all but None, "auto", and the dtypes in which the models can compute; a dtype may be given by name.

    Raises:
        ValueError: it is another value.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in DTYPES.values()):
        choice("dtype", dtype, ["auto", *DTYPES])


NOT_FOR_USERS = {"self", "repo_id", "operations", "repo_type", "run_as_future", "_hot_reload"}


def require_upload(repo_id: Any, private: Any, commit_message: Any, options: dict[str, Any]) -> None:
    """Refuses arguments of `VQGANPipeline.push_to_hub`, before anything is sent.

    Raises:
        TypeError: an option is neither `license` nor one of `huggingface_hub.HfApi.create_commit`.
        ValueError: an argument has another type, or the repository's name is not valid.
    """
    if not isinstance(repo_id, str) or not is_repo_id(repo_id):
        raise ValueError(f"repo_id: received {described(repo_id)}; must be a name on the Hub, as 'user/name'")
    instance("private", private, (bool, NoneType), "True, False or None")
    instance("commit_message", commit_message, str, "text")
    instance("token", options.get("token"), (str, bool, NoneType), "text, True, False or None")
    instance("license", options.get("license"), (str, NoneType), "an identifier of the Hub")
    known = set(inspect.signature(HfApi.create_commit).parameters) - NOT_FOR_USERS | {"token", "license"}
    if unknown := sorted(options.keys() - known):
        raise TypeError(f"push_to_hub() got an unexpected keyword argument {unknown[0]!r}")


def shard_size(size: Any) -> dict[str, Any]:
    """The option `max_shard_size` of the models' `save_pretrained`; empty for None.

    Raises:
        ValueError: it is not a size.
    """
    if size is None:
        return {}
    if isinstance(size, str) and not re.fullmatch(r"[1-9]\d{0,8} ?[KMGT]B", size, re.ASCII):
        raise ValueError(f"max_shard_size: received {described(size)}; must be bytes, or text such as '5GB'")
    return {"max_shard_size": size if isinstance(size, str) else whole("max_shard_size", size)}
