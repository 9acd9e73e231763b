"""Checks the arguments of VQGANPipeline that need more than a type and a range."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from configs.arguments import described


def listed_labels(labels: Any) -> Sequence[Any]:
    """Class labels as a list: ids or names, one or a sequence, a tensor or an array of one axis.

    Raises:
        ValueError: the labels are in another container, have more axes, or are none.
    """
    if isinstance(labels, Tensor | np.ndarray):
        if labels.ndim > 1 or (isinstance(labels, Tensor) and not _has_values(labels)):
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


def int64_codes(codes: Any) -> Tensor:
    """Codes `(N, h, w)` as a dense int64 tensor, on their device or the CPU.

    Args:
        codes: a tensor, an array or nested lists of whole numbers; floats and booleans are none.

    Raises:
        ValueError: the values are no whole numbers, or the shape is another one.
    """
    if isinstance(codes, Tensor) and not _has_values(codes):
        raise ValueError(f"codes: received {described(codes)}, without values; {NEEDED}")
    if isinstance(codes, Tensor) and codes.dtype == torch.int64:
        return _with_three_axes(codes)
    try:
        array = np.asarray(codes.cpu() if isinstance(codes, Tensor) else codes)
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"codes: received {described(codes)}; {NEEDED}") from error
    if array.dtype.kind not in "iu" or (array.dtype.kind == "u" and array.size and array.max() > 2**63 - 1):
        raise ValueError(f"codes: received {described(codes)} of type {array.dtype}; {NEEDED}")
    return _with_three_axes(torch.from_numpy(array.astype(np.int64)))


NEEDED = "needs whole numbers (N, h, w), each at least 1"


def _has_values(tensor: Tensor) -> bool:
    """Whether a tensor is a plain table of numbers: not on the device "meta", and not sparse."""
    return not tensor.is_meta and tensor.layout == torch.strided


def _with_three_axes(codes: Tensor) -> Tensor:
    if codes.ndim != 3 or not codes.numel():
        raise ValueError(f"codes: received shape {tuple(codes.shape)}; {NEEDED}")
    return codes


def require_move(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses arguments of `torch.nn.Module.to` that would fail after one model has moved, or would lose the weights.

    Raises:
        ValueError: there is no such device, or the dtype cannot hold weights.
    """
    received = ", ".join([*map(described, args), *(f"{name}={described(value)}" for name, value in kwargs.items())])
    try:
        probe = nn.Linear(1, 1).to(*args, **kwargs).weight
    except Exception as error:  # each backend of torch raises its own exceptions
        reason = str(error).strip().partition("\n")[0][:120]
        raise ValueError(f"device or dtype: received {received}; torch refuses it: {reason}") from error
    if probe.is_meta or not probe.is_floating_point():
        allowed = "must be a device that holds numbers, or a dtype of floats"
        raise ValueError(f"device or dtype: received {received}; {allowed}")
