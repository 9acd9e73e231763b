"""Reads weights of Flax (`flax_model.msgpack`), and gives them the names and the shapes of PyTorch.

A file is a tree in MessagePack. Its leaves are arrays in the extension type 1, each a tuple of shape, dtype and values.
Large arrays are cut into chunks.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ARRAY, CHUNKED = 1, "__msgpack_chunked_array__"
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float16, torch.float32, torch.float64)}
DTYPES |= {"bfloat16": torch.bfloat16, "int32": torch.int32, "int64": torch.int64, "uint8": torch.uint8}
LISTS = re.compile(r"(down|up|block|attn)_(\d+)")  # submodules in a list; those of `mid` have such names in PyTorch too
PARAMETERS = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def read_flax(path: Path) -> dict[str, Tensor]:
    """Reads the weights of a file, by their names in PyTorch.

    Raises:
        ModuleNotFoundError: msgpack is not installed.
        Exception: the file is damaged, or holds other things than arrays.
    """
    import msgpack

    tree = msgpack.unpackb(path.read_bytes(), ext_hook=_array)
    return {_name(keys): _to_torch(keys[-1], value) for keys, value in _leaves(tree)}


def _array(code: int, data: bytes) -> Tensor:
    import msgpack

    if code != ARRAY:
        raise ValueError(f"unknown extension type {code}")
    shape, dtype, values = msgpack.unpackb(data)
    if dtype not in DTYPES:
        raise ValueError(f"arrays of {dtype} are not weights")
    return torch.frombuffer(bytearray(values), dtype=DTYPES[dtype]).reshape(shape)


def _leaves(tree: Any) -> Iterator[tuple[list[str], Tensor]]:
    """The arrays of a tree, with the keys that lead to them."""
    waiting: list[tuple[list[str], Any]] = [([], tree)]
    while waiting:
        keys, value = waiting.pop()
        if isinstance(value, dict) and CHUNKED in value:
            chunks, shape = value["chunks"], value["shape"]
            value = torch.cat([chunks[key] for key in sorted(chunks, key=int)])
            value = value.reshape([shape[key] for key in sorted(shape, key=int)])
        if isinstance(value, dict):
            waiting += [([*keys, str(key)], inner) for key, inner in value.items()]
        elif isinstance(value, Tensor) and keys:
            yield keys, value
        else:
            raise ValueError(f"{'.'.join(keys) or 'it'} is no array")


def _name(keys: list[str]) -> str:
    parents = ["", *keys[:-1]]
    parts = [
        LISTS.sub(r"\1.\2", key) if LISTS.fullmatch(key) and parent != "mid" else key
        for parent, key in zip(parents, keys, strict=True)
    ]
    parts[-1] = PARAMETERS.get(parts[-1], parts[-1])
    return ".".join(part for number, part in enumerate(parts) if number or part != "params")


def _to_torch(parameter: str, value: Tensor) -> Tensor:
    """Kernels `(H, W, I, O)` → `(O, I, H, W)` and `(I, O)` → `(O, I)`; scales and biases `(1, 1, 1, C)` → `(C,)`."""
    if parameter == "kernel":
        value = value.permute(3, 2, 0, 1) if value.ndim == 4 else value.T
    elif parameter in ("scale", "bias"):
        value = value.flatten()
    return value.contiguous()
