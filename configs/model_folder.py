"""Checks a saved model's folder before transformers reads it, because the folder may come from a stranger.

Files in such a folder can make transformers open other files, in three ways: they name shards of the weights, the base
of an adapter, or kernels to download and run. A folder of this project needs no file outside itself.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.files import read_json

WEIGHTS_NAMES = ("model.safetensors", "model.safetensors.index.json")
ADAPTER_CONFIG_NAME = "adapter_config.json"

# Any other name may refer to a kernel on the Hub, even "flash_attention_2" if flash-attn is not installed.
LOCAL_IMPLEMENTATIONS = {"eager", "sdpa", "flex_attention", "batched_mm", "grouped_mm"}


def local_folder(name: str) -> Path:
    """The folder of a model; downloads it if the name is a Hub id.

    Raises:
        OSError, ValueError: neither exists.
    """
    from huggingface_hub import snapshot_download

    if Path(name).is_dir():
        return Path(name)
    return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"], ignore_patterns="*/*"))


def check_model_folder(folder: str | Path) -> None:
    """Refuses a folder without safetensors, and one that would make transformers read other places or run code.

    Raises:
        FileNotFoundError: there are no weights, or only pickled ones.
        ValueError: the folder holds an adapter, its index names shards elsewhere, or its config.json names a kernel, a
            quantization method or a weights file.
    """
    folder = Path(folder)
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        raise ValueError(f"{folder}: this folder holds an adapter of another model, not a model")
    if not any((folder / name).is_file() for name in WEIGHTS_NAMES):
        raise FileNotFoundError(f"{folder}: {WEIGHTS_NAMES[0]} is missing; other formats are not read")
    if (folder / WEIGHTS_NAMES[1]).is_file():
        _check_shards(folder / WEIGHTS_NAMES[1])
    if (folder / "config.json").is_file():
        _check_config(folder / "config.json")


def _check_shards(index: Path) -> None:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict):
        raise ValueError(f"{index}: weight_map: received {shards!r}; must map names of weights to files")
    for shard in shards.values():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or set(shard) & set("/\\:"):
            raise ValueError(
                f"{index}: weight_map: received {shard!r}; must name a .safetensors file in the same folder"
            )


def _check_config(path: Path) -> None:
    for key, value in _fields(read_json(path)):
        if value is None:
            continue
        if key in ("quantization_config", "transformers_weights"):
            raise ValueError(f"{path}: {key}: received {value!r}; only plain weights in model.safetensors are read")
        if key.strip("_").removesuffix("_internal") in ("attn_implementation", "experts_implementation"):
            for name in value.values() if isinstance(value, dict) else [value]:
                if name is not None and str(name) not in LOCAL_IMPLEMENTATIONS:
                    raise ValueError(
                        f"{path}: {key}: received {name!r}; a saved model must not choose a kernel; remove the field "
                        "and pass attn_implementation to from_pretrained"
                    )


def _fields(values: Any) -> Iterator[tuple[str, Any]]:
    """Every `(key, value)` in nested containers."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        yield str(key), value
        if isinstance(value, dict | list):
            yield from _fields(value)
