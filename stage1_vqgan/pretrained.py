"""A trained tokenizer by its name, for the commands that need one."""

import textwrap
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError
from transformers import PreTrainedConfig

from configs import ConfigError, Problem
from stage1_vqgan.configuration_vqgan import VQGANConfig
from stage1_vqgan.modeling_vqgan import VQGANModel
from stage1_vqgan.quantizers import QUANTIZERS, option_problems

# What may change when a trained tokenizer is loaded: everything else decides the weights, or what they mean.
CHANGEABLE = {"image_size", "dropout", "quantizer_options"}


def load_tokenizer(name: str, key: str = "tokenizer", **changes: Any) -> VQGANModel:
    """The tokenizer in a folder or Hub repository, in evaluation mode on the CPU.

    Args:
        name: folder or Hub id.
        key: of the configuration that named it, for the message.
        changes: fields of its configuration to change.

    Raises:
        ConfigError: there is none, or its weights do not fit.
    """
    folder, makes, reason = Path(name), "stage1_vqgan.train makes one", ""
    if not folder.is_dir() and not is_repo_id(name):
        reason = f"there is no such folder ({makes})"
    elif folder.is_dir() and not (folder / "config.json").is_file():
        reason = f"this folder holds no trained tokenizer ({makes})"
    else:
        try:
            kind = PreTrainedConfig.get_config_dict(name)[0].get("model_type")
            if kind == VQGANConfig.model_type:
                changes = _checked(name, changes)
                return VQGANModel.from_pretrained(name, **changes).eval()
            reason = f"this is no tokenizer but a model of type {kind!r} ({makes})"
        except SafetensorError:
            reason = "its weights file is damaged; save or download it again"
        except ConfigError:
            raise
        except (OSError, ValueError, StrictDataclassError) as error:
            reason = f"no tokenizer can be loaded from it: {textwrap.shorten(str(error), 160, placeholder=' …')}"
    raise ConfigError([Problem(key, f"received {name!r}; {reason}")])


def _checked(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The changes that may be made to a tokenizer; options of its quantizer that are not given stay."""
    config = VQGANConfig.from_pretrained(name)
    kind = QUANTIZERS[config.quantizer].Options
    options = config.quantizer_options | changes.get("quantizer_options", {})
    problems = [
        Problem(f"model.{field}", f"received {value!r}, but {name} has {has!r}; leave it out, its weights fit no other")
        for field, value in changes.items()
        if field not in CHANGEABLE and (has := _plain(getattr(config, field))) != _plain(value)
    ]
    for field, value, allowed in option_problems(config.quantizer, options, config.num_embeddings, config.embed_dim):
        problems.append(Problem(f"model.{field}", f"received {value!r}; {allowed}"))
    if not problems:
        has, wanted = kind(**config.quantizer_options), kind(**options)
        problems = [
            Problem(f"model.quantizer_options.{option}", f"{name} has {getattr(has, option)!r}; leave it out")
            for option in kind.DECIDE_CODES
            if _plain(getattr(has, option)) != _plain(getattr(wanted, option))
        ]
    if problems:
        raise ConfigError(problems)
    if "quantizer_options" in changes:
        changes = changes | {"quantizer_options": options}
    if changes.get("image_size", config.image_size) != config.image_size:
        changes = changes | {"fingerprint": None}  # codes on another grid are other codes
    return changes


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def is_repo_id(name: str) -> bool:
    """Whether a repository on the Hub can have this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
