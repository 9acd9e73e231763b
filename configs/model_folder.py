"""Checks a saved model's folder before transformers reads it, because the folder may come from a stranger.

Files in such a folder can make transformers open other files, in four ways: they name shards of the weights, other
configurations, the base of an adapter, or kernels to download and run. A folder of this project needs no file outside
itself. They can also describe a model that no machine can hold.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.checksums import verify_checksums
from configs.files import read_json
from configs.problems import shown
from configs.staging import finish_interrupted
from configs.weights_files import Stored, read_headers

WEIGHTS_NAMES = ("model.safetensors", "model.safetensors.index.json")
ADAPTER_CONFIG_NAME = "adapter_config.json"

# Any other name may refer to a kernel on the Hub, even "flash_attention_2" if flash-attn is not installed.
LOCAL_IMPLEMENTATIONS = {"eager", "sdpa", "flex_attention", "batched_mm", "grouped_mm"}

# Architectures whose layers download a kernel by themselves when they run on a GPU.
DOWNLOADING = {"rwkv"}

FLOATS = {"float64", "float32", "float16", "bfloat16"}

# Fields that choose other files or code.
REFUSED = {
    "quantization_config": "only plain weights in model.safetensors are read",
    "transformers_weights": "only plain weights in model.safetensors are read",
    "configuration_files": "only config.json is read",
    "fusion_config": "a saved model must not replace layers",
    "custom_generate": "a saved model must not bring code",
}

# Fields that count layers. A model has no more layers than tensors, or than COUNTED if it has few of them.
COUNTS, COUNTED = re.compile("layer|blocks|labels|experts|codebooks|depth|streams"), 1024
LARGEST, DEEPEST = 2**31, 20


def local_folder(name: str) -> Path:
    """The folder of a model; downloads it if the name is a Hub id.

    Raises:
        OSError, ValueError: neither exists.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    if Path(name).is_dir():
        finish_interrupted(name)
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"], ignore_patterns="*/*"))
    except (LocalEntryNotFoundError, RepositoryNotFoundError) as error:
        reason = "there is no such folder"
        if not Path(name).parent.is_dir() or Path(name).parent == Path():  # it may be the name of a repository
            unknown = isinstance(error, RepositoryNotFoundError)
            reason += ", and the Hub " + ("shows you no such repository" if unknown else "cannot be asked for it")
        raise FileNotFoundError(reason) from error


def check_model_folder(folder: str | Path) -> dict[str, Stored]:
    """Refuses a folder that is damaged, lacks safetensors, or would make transformers read other places or run code.

    Returns:
        The tensors of the folder's weights files, by name, without values.

    Raises:
        FileNotFoundError: there is no config.json, or there are no weights, or only pickled ones.
        ValueError: the folder holds an adapter or a pipeline, a file differs from checksums.json, the index names
            shards elsewhere, a file is damaged, or a configuration names code, other files, or sizes far above those
            of the weights.
    """
    folder = Path(folder)
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        raise ValueError(
            f"{folder}: this folder holds an adapter of another model, not a model; pipelines.build merges an adapter "
            "into its prior"
        )
    if (folder / "model_index.json").is_file():
        raise ValueError(f"{folder}: this folder holds a pipeline; its tokenizer is in vqgan, its prior in prior")
    files = weights_files(folder)
    verify_checksums(folder, ["config.json", *(path.name for path in files)])
    stored = read_headers(files)
    _check_config(folder / "config.json", most=max(COUNTED, len(stored)))
    if (folder / "generation_config.json").is_file():
        _check_config(folder / "generation_config.json", most=LARGEST)
    return stored


def weights_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: one, or the shards that its index names.

    Raises:
        FileNotFoundError: there are none, or a shard is missing.
        ValueError: the index is malformed or names files elsewhere, or the folder holds shards of a distributed model.
    """
    if distributed := sorted(folder.glob("shard-*-model-*.safetensors")):
        raise ValueError(
            f"{distributed[0]}: shards of a distributed model are not read; consolidate them, or remove them"
        )
    if (folder / WEIGHTS_NAMES[0]).is_file():
        return [folder / WEIGHTS_NAMES[0]]
    index = folder / WEIGHTS_NAMES[1]
    if not index.is_file():
        raise FileNotFoundError(f"{folder}: {WEIGHTS_NAMES[0]} is missing; other formats are not read")
    shards = [folder / name for name in _shards(index)]
    for shard in shards:
        if not shard.is_file():
            raise FileNotFoundError(f"{shard}: this file is missing, but {index.name} names it; download it again")
    return shards


def _shards(index: Path) -> list[str]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict):
        raise ValueError(f"{index}: weight_map: received {shown(shards)}; must map names of weights to files")
    for shard in shards.values():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or set(shard) & set("/\\:"):
            raise ValueError(
                f"{index}: weight_map: received {shown(shard)}; must name a .safetensors file in the same folder"
            )
    return sorted(set(shards.values()))


def _check_config(path: Path, most: int) -> None:
    for key, value in _fields(read_json(path), path):
        problem = None if value is None else _problem(key, value, most)
        if problem is not None:
            raise ValueError(f"{path}: {key}: received {shown(value)}; {problem}")


def _problem(key: str, value: Any, most: int) -> str | None:
    """What is wrong with a field of a model's configuration; None if nothing is."""
    if key in REFUSED:
        return REFUSED[key]
    if key.strip("_").removesuffix("_internal") in ("attn_implementation", "experts_implementation"):
        names = value.values() if isinstance(value, dict) else [value]
        if not all(name is None or str(name) in LOCAL_IMPLEMENTATIONS for name in names):
            advice = "remove the field and pass attn_implementation to from_pretrained"
            return f"a saved model must not choose a kernel; {advice}"
    if key in ("dtype", "torch_dtype") and not (isinstance(value, str) and value in FLOATS):
        return f"allowed are {', '.join(sorted(FLOATS))}"
    if key == "model_type" and str(value) in DOWNLOADING:
        return "this architecture downloads and runs a kernel"
    if isinstance(value, int) and abs(value) > LARGEST:
        return f"no field of a model exceeds {LARGEST:,}"
    if isinstance(value, int) and COUNTS.search(key) and value > most:
        return f"the weights are far fewer; allowed are at most {most:,}"
    if isinstance(value, list) and len(value) > most:
        return f"the weights are far fewer; a list has at most {most:,} entries"
    return None


def _fields(values: dict[str, Any], path: Path) -> Iterator[tuple[str, Any]]:
    """Every `(key, value)` in nested containers. An entry of a list has the key of the list."""
    waiting: list[tuple[str, Any, int]] = [("", values, 0)]
    while waiting:
        key, value, depth = waiting.pop()
        if depth > DEEPEST:
            raise ValueError(f"{path}: this file is nested more than {DEEPEST} deep; no configuration of a model is")
        yield key, value
        if isinstance(value, dict):
            waiting += [(str(name), item, depth + 1) for name, item in value.items()]
        elif isinstance(value, list):
            waiting += [(key, item, depth + 1) for item in value]
