"""Reads the files of a saved adapter, which may come from a stranger.

peft would compile names in adapter_config.json as regular expressions, import modules that it names, and compute other
weights of the base. So only the settings of plain LoRA are read, with plain names; all others must have their defaults.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Gt
from safetensors.torch import load_file
from torch import Tensor

from configs.checksums import verify_checksums
from configs.files import read_json
from configs.model_folder import ADAPTER_CONFIG_NAME
from configs.problems import listed, shown
from configs.sections import NonNegative, Positive
from configs.values import read_value
from configs.weights_files import FLOATS, Stored, read_header, require_finite

ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"

Scale = Annotated[float, Gt(0)]

# Settings that are read, with their types.
READ: dict[str, Any] = {
    "r": Positive,
    "lora_alpha": Positive | Scale,
    "target_modules": list[str],
    "exclude_modules": list[str] | None,
    "modules_to_save": list[str] | None,
    "layers_to_transform": list[NonNegative] | NonNegative | None,
    "layers_pattern": list[str] | str | None,
    "rank_pattern": dict[str, Positive] | None,
    "alpha_pattern": dict[str, Positive | Scale] | None,
    "trainable_token_indices": dict[str, list[NonNegative]] | list[NonNegative] | None,
    "bias": Literal["none", "all", "lora_only"],
    "fan_in_fan_out": bool,
    "lora_bias": bool,
    "use_dora": bool,
    "use_rslora": bool,
}
# Settings that are checked but not needed, because the weights are saved.
CHECKED: dict[str, Any] = {
    "peft_type": Literal["LORA"],
    "task_type": Literal["CAUSAL_LM"] | None,
    "init_lora_weights": Literal[True, False, "gaussian"],
}
# Settings that describe the training or the base; peft never sees them.
UNUSED = {"auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_version", "revision"}

PLAIN_NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings of an adapter as arguments of `peft.LoraConfig`, and its weights by name.

    Raises:
        ValueError: a file is missing, damaged or in another format, or a setting is not one of plain LoRA.
    """
    config, weights = folder / ADAPTER_CONFIG_NAME, folder / ADAPTER_WEIGHTS_NAME
    if not weights.is_file():
        raise ValueError(f"{folder}: {ADAPTER_WEIGHTS_NAME} is missing; other formats than safetensors are not read")
    verify_checksums(folder, [config.name, weights.name])
    header, values = read_header(weights), read_json(config)
    for key, value in values.items():
        if reason := _problem(key, value):
            raise ValueError(f"{config}: {key}: received {shown(value)}; {reason}")
    _check_header(header, values, weights)
    tensors = load_file(weights)
    require_finite(tensors.items(), weights)
    return {key: values[key] for key in READ if key in values}, tensors


def _problem(key: str, value: Any) -> str | None:
    """What is wrong with a setting; None if nothing is."""
    import peft

    if key in UNUSED:
        return None
    hint = READ.get(key, CHECKED.get(key))
    if hint is None:
        is_default = value == peft.LoraConfig().to_dict().get(key) or value in (None, False)
        return None if is_default else "only adapters of plain LoRA are read; save it merged into its prior"
    try:
        read_value(hint, value, strict=True)
    except ValueError as error:
        return str(error).partition("; ")[2]
    odd = [name for name in _names(value) if not PLAIN_NAME.fullmatch(name)]
    return f"{shown(odd[0])} must be a plain name of a module, such as q_proj, not a pattern" if odd else None


def _names(value: Any) -> Iterator[str]:
    """All texts in a setting."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for entry in value:
            yield from _names(entry)


def _check_header(header: dict[str, Stored], values: dict[str, Any], path: Path) -> None:
    """Refuses other dtypes than floats, and ranks above those of the weights.

    Raises:
        ValueError: names the tensors or the setting.
    """
    if wrong := [f"{name} {stored.dtype}" for name, stored in header.items() if stored.dtype not in FLOATS]:
        raise ValueError(f"{path}: weights must be floating-point numbers; received {listed(wrong)}")
    stored = [entry.shape[0] for name, entry in header.items() if ".lora_" in name and entry.shape]
    for rank in (values.get("r", 1), *(values.get("rank_pattern") or {}).values()):
        if rank > max(stored, default=0):
            raise ValueError(f"{path}: the weights do not fit r: received rank {rank:,}, above that of every weight")
