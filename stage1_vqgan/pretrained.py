"""Loads a trained tokenizer for the commands, with errors that name the configuration field."""

import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from configs import ConfigError, Problem
from configs.files import read_json
from configs.hub import is_repo_id
from configs.model_folder import check_model_folder, local_folder
from configs.problems import one_line, shown
from configs.staging import finish_interrupted
from configs.uploads import without_paths
from configs.weights_files import in_our_words, read_header, require_finite, require_fit
from stage1_vqgan.configuration_architecture import VQGANArchitecture
from stage1_vqgan.configuration_vqgan import VQGANConfig
from stage1_vqgan.data.config import DataConfig
from stage1_vqgan.image_processing_values import ValueRange
from stage1_vqgan.image_processing_vqgan import VQGANImageProcessor
from stage1_vqgan.modeling_vqgan import VQGANModel
from stage1_vqgan.quantizers import QUANTIZERS, option_problems

# Fields that may change when a trained tokenizer is loaded. All others determine the shapes or the meaning of weights.
CHANGEABLE = {"image_size", "dropout", "quantizer_options"}

# File in a tokenizer's folder with the discriminator it was trained with, and the settings of its network.
DISCRIMINATOR_NAME, SETTINGS = "discriminator.safetensors", "settings"
PROCESSOR_NAME = "preprocessor_config.json"


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
    finish_interrupted(folder)
    if not folder.is_dir() and not is_repo_id(name):
        reason = f"there is no such folder ({advice})"
    elif folder.is_dir() and not (folder / "config.json").is_file():
        reason = f"this folder holds no trained tokenizer ({advice})"
    else:
        try:
            folder = local_folder(name)
            model = load_vqgan(folder, lambda config: _checked(name, config, changes))
            model.config.fingerprint = model.config.fingerprint or model.compute_fingerprint()
            return model
        except ConfigError:
            raise
        except (OSError, ValueError) as error:
            found = str(error).replace(f"{folder}/", "").removeprefix(f"{folder}: ")
            reason = f"no tokenizer can be loaded from it: {one_line(found, 320)}"
    raise ConfigError([Problem(field, f"received {name!r}; {reason}")])


def load_vqgan(
    folder: str | Path, change: Callable[[VQGANConfig], dict[str, Any]] = lambda config: {}, **options: Any
) -> VQGANModel:
    """Loads the tokenizer of a folder, in evaluation mode. The folder may come from a stranger.

    Args:
        folder: a folder that `save_pretrained` of a tokenizer wrote.
        change: returns the fields of the configuration to change.
        **options: passed to `VQGANModel.from_pretrained`, for instance `dtype`.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a file is damaged, the files are not those of one tokenizer, or they refer to code or other files.
    """
    stored = check_model_folder(folder)
    kind = read_json(Path(folder) / "config.json").get("model_type")
    if kind != VQGANConfig.model_type:
        advice = "train one with stage1_vqgan.train"
        raise ValueError(f"{folder}: this is not a tokenizer but a model of type {kind!r} ({advice})")
    with in_our_words(folder):
        config = VQGANConfig.from_pretrained(folder)
        with torch.device("meta"):
            expected = VQGANModel(config).state_dict()
    require_fit(stored, expected, folder)
    return VQGANModel.from_pretrained(folder, **change(config), **options).eval()


def load_image_processor(folder: str | Path, config: VQGANConfig) -> VQGANImageProcessor:
    """Loads the image processor of a tokenizer's folder.

    Args:
        folder: folder of the tokenizer.
        config: configuration of the tokenizer.

    Raises:
        OSError: preprocessor_config.json is missing.
        ValueError: it is malformed, or for images of another kind than those of the tokenizer.
    """
    path = Path(folder) / PROCESSOR_NAME
    with in_our_words(path):  # from_pretrained would prefer a processor_config.json
        processor = VQGANImageProcessor.from_dict(read_json(path))
    height, width = config.image_shape
    for field, wanted in {"size": {"height": height, "width": width}, "num_channels": config.in_channels}.items():
        if (value := getattr(processor, field)) != wanted:
            raise ValueError(f"{path}: {field}: received {shown(value)}, but the tokenizer has {wanted}; restore it")
    return processor


def recorded_range(name: str) -> ValueRange | None:
    """The range of pixel values with which the tokenizer of a folder or Hub repository was trained.

    None if it was that of the dtype, or if the tokenizer was saved without an image processor.
    """
    try:
        return VQGANImageProcessor.from_pretrained(name).values
    except OSError:
        return None


def trained_range(data: DataConfig, name: str) -> ValueRange | None:
    """The range for images that a trained tokenizer encodes: the one with which it was trained.

    Args:
        data: null and "auto" take this range.
        name: folder or Hub id of the tokenizer.

    Raises:
        ConfigError: `data.value_range` is another range.
    """
    return require_range(data, recorded_range(name), name)


def require_range(data: DataConfig, found: ValueRange | None, name: str) -> ValueRange | None:
    """Returns `found`, the range with which the tokenizer `name` was trained.

    Raises:
        ConfigError: `data.value_range` is another range.
    """
    wanted = data.value_range
    has = None if found is None else [found.low, found.high]
    if wanted not in (None, has) and not (wanted == "auto" and found is not None):
        with_range = "the range of the dtype (null)" if has is None else f"{has}"
        advice = "leave data.value_range out" + (f", or write value_range into its {PROCESSOR_NAME}" if not has else "")
        message = f"received {wanted!r}, but {name} was trained with {with_range}; {advice}"
        raise ConfigError([Problem("data.value_range", message)])
    return found


def _checked(name: str, config: VQGANConfig, changes: dict[str, Any]) -> dict[str, Any]:
    """Checks changes of a tokenizer's configuration, and adds the options of its quantizer that are not changed."""
    changes, problems = _by_level(config, changes)
    kind = QUANTIZERS[config.quantizer].Options
    options = config.quantizer_options | changes.get("quantizer_options", {})
    wrong = {problem.key for problem in problems}
    problems += [
        Problem(f"model.{field}", f"received {value!r}, but {name} has {has!r}; leave it out")
        for field, value in changes.items()
        if f"model.{field}" not in wrong
        and field not in CHANGEABLE
        and (has := _plain(getattr(config, field))) != _plain(value)
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
    return changes | ({"quantizer_options": options} if "quantizer_options" in changes else {})


def _by_level(config: VQGANConfig, changes: dict[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Names levels with attention by number, if the changes name them by resolution; and problems of the new size."""
    known = {field.name: getattr(config, field.name) for field in fields(VQGANArchitecture)}
    by_resolution = {"attn_levels": None} if "attn_resolutions" in changes else {}
    wanted = VQGANArchitecture(**known | by_resolution | changes)
    found = {name: (value, allowed) for name, value, allowed in wanted.architecture_problems()}
    problems = [
        Problem(f"model.{name}", f"received {found[name][0]!r}; {found[name][1]}")
        for name in ("image_size", "attn_resolutions")
        if name in found
    ]
    if by_resolution and not problems:
        changes = {name: value for name, value in changes.items() if name != "attn_resolutions"}
        changes["attn_levels"] = [level for level, attends in enumerate(wanted.attention) if attends]
    return changes, problems


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def save_discriminator(discriminator: nn.Module, settings: Mapping[str, Any], folder: Path) -> None:
    """Saves a discriminator in the folder of its tokenizer, for `start_discriminator`.

    Args:
        discriminator: without the wrappers of accelerate.
        settings: the settings that decide its network. Of local paths, only the last part is saved.
        folder: folder of the tokenizer.
    """
    weights = {key: value.detach().cpu().contiguous() for key, value in discriminator.state_dict().items()}
    save_file(weights, folder / DISCRIMINATOR_NAME, {SETTINGS: json.dumps(without_paths(dict(settings)))})


def start_discriminator(discriminator: nn.Module, name: str, settings: Mapping[str, Any]) -> str | None:
    """Loads the weights that were saved with a tokenizer into a new discriminator, if they exist and fit.

    Args:
        discriminator: changed in place.
        name: folder or Hub id of the tokenizer.
        settings: the settings that decide the network of the new discriminator.

    Returns:
        A sentence for the log; None if the tokenizer has no discriminator.

    Raises:
        ConfigError: the file of the discriminator is damaged.
    """
    path = Path(name) / DISCRIMINATOR_NAME
    if not Path(name).is_dir():
        try:
            path = Path(hf_hub_download(name, DISCRIMINATOR_NAME))
        except LocalEntryNotFoundError:
            return (
                f"the discriminator starts from random weights: the Hub, which may have that of {name}, is out of reach"
            )
        except EntryNotFoundError:
            return None
    if not path.is_file():
        return None
    try:
        header, own = read_header(path), discriminator.state_dict()
        difference = _other_settings(path, without_paths(dict(settings)))
        if not difference and {key: value.shape for key, value in header.items()} != {
            key: tuple(value.shape) for key, value in own.items()
        }:
            difference = "has another shape"
        if difference:
            return f"the discriminator starts from random weights: that of {name} {difference}"
        require_fit(header, own, path, "the discriminator")
        weights = load_file(path)
        require_finite(weights.items(), path)
    except (OSError, ValueError) as error:
        message = (
            f"received {name!r}; its {DISCRIMINATOR_NAME} cannot be used; remove it, or download it again: {error}"
        )
        raise ConfigError([Problem("model_name_or_path", message)]) from error
    discriminator.load_state_dict(weights)
    return f"the discriminator starts from the weights of {name}"


def _other_settings(path: Path, settings: dict[str, Any]) -> str:
    """How the settings in the metadata of a saved discriminator differ from `settings`, in words; "" if they do not.

    A converted discriminator has none, and an older version may lack some: only those that both have are compared.
    """
    with safe_open(str(path), framework="pt") as file:
        saved = json.loads((file.metadata() or {}).get(SETTINGS, "{}"))
    if not isinstance(saved, dict):
        raise ValueError(f"{path}: its settings are {shown(saved)}; must be a JSON object")
    return " and ".join(
        f"has discriminator.{key} {shown(saved[key])}, not {shown(value)}"
        for key, value in settings.items()
        if key in saved and saved[key] != value
    )
