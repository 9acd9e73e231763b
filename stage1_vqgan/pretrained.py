"""Loads a trained tokenizer for the commands, with errors that name the configuration field."""

import textwrap
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedConfig

from configs import ConfigError, Problem
from configs.hub import is_repo_id
from configs.model_folder import check_model_folder, local_folder
from stage1_vqgan.configuration_vqgan import VQGANConfig
from stage1_vqgan.modeling_vqgan import VQGANModel
from stage1_vqgan.quantizers import QUANTIZERS, option_problems

# Fields that may change when a trained tokenizer is loaded. All others determine the shapes or the meaning of weights.
CHANGEABLE = {"image_size", "dropout", "quantizer_options"}

# File in a tokenizer's folder with the weights of the discriminator it was trained with, if they were saved.
DISCRIMINATOR_NAME = "discriminator.safetensors"


def load_tokenizer(name: str, field: str = "tokenizer", **changes: Any) -> VQGANModel:
    """Loads the tokenizer of a folder or Hub repository, in evaluation mode on the CPU.

    Args:
        name: folder or Hub id.
        field: configuration field that holds `name`; the error names it.
        changes: fields of the tokenizer's configuration to change.

    Raises:
        ConfigError: the folder or repository holds no tokenizer, its weights do not fit, or a field cannot change.
    """
    folder, advice, reason = Path(name), "train one with stage1_vqgan.train", ""
    if not folder.is_dir() and not is_repo_id(name):
        reason = f"there is no such folder ({advice})"
    elif folder.is_dir() and not (folder / "config.json").is_file():
        reason = f"this folder holds no trained tokenizer ({advice})"
    else:
        try:
            folder = local_folder(name)
            check_model_folder(folder)
            kind = PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
            if kind == VQGANConfig.model_type:
                changes = _checked(name, folder, changes)
                return VQGANModel.from_pretrained(folder, use_safetensors=True, **changes).eval()
            reason = f"this is not a tokenizer but a model of type {kind!r} ({advice})"
        except SafetensorError:
            reason = "its weights file is damaged; save or download it again"
        except ConfigError:
            raise
        except (OSError, ValueError, StrictDataclassError) as error:
            reason = f"no tokenizer can be loaded from it: {textwrap.shorten(str(error), 160, placeholder=' …')}"
    raise ConfigError([Problem(field, f"received {name!r}; {reason}")])


def _checked(name: str, folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Checks changes of a tokenizer's configuration, and adds the options of its quantizer that are not changed."""
    config = VQGANConfig.from_pretrained(folder)
    kind = QUANTIZERS[config.quantizer].Options
    options = config.quantizer_options | changes.get("quantizer_options", {})
    problems = [
        Problem(f"model.{field}", f"received {value!r}, but {name} has {has!r}; leave it out")
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
        changes = changes | {"fingerprint": None}  # the codes depend on the image size
    return changes


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def start_discriminator(discriminator: nn.Module, name: str) -> str | None:
    """Loads the weights that were saved with a tokenizer into a new discriminator, if they exist and fit.

    Args:
        discriminator: changed in place.
        name: folder or Hub id of the tokenizer.

    Returns:
        A sentence for the log; None if the tokenizer has no discriminator.

    Raises:
        ConfigError: the file of the discriminator is damaged.
    """
    path = Path(name) / DISCRIMINATOR_NAME
    if not Path(name).is_dir():
        try:
            path = Path(hf_hub_download(name, DISCRIMINATOR_NAME))
        except EntryNotFoundError:
            return None
    if not path.is_file():
        return None
    try:
        weights, own = load_file(path), discriminator.state_dict()
    except SafetensorError:
        message = f"received {name!r}; its {DISCRIMINATOR_NAME} is damaged; remove it, or download it again"
        raise ConfigError([Problem("model_name_or_path", message)]) from None
    if {entry: value.shape for entry, value in weights.items()} != {entry: value.shape for entry, value in own.items()}:
        return f"the discriminator starts from random weights: the discriminator of {name} has another shape"
    discriminator.load_state_dict(weights)
    return f"the discriminator starts from the weights of {name}"
