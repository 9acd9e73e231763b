"""Low-rank adapters of priors, with peft. Training attaches them; sampling and saving merge them into the weights.

Source: Hu et al. 2021, "LoRA: low-rank adaptation of large language models".
"""

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from configs import ConfigError, Problem
from configs.files import read_json
from configs.model_folder import ADAPTER_CONFIG_NAME
from configs.problems import shown
from configs.weights_files import in_our_words, read_header, require_fit
from stage2_prior.adapter_files import ADAPTER_WEIGHTS_NAME, read_adapter
from stage2_prior.pretrained import layout_of
from stage2_prior.training.config import NO_PEFT, LoraConfig


def attach_adapter(prior: PreTrainedModel, base: str, lora: LoraConfig, tokens: list[int]) -> Any:
    """Freezes a prior and adds adapters to its layers.

    Args:
        prior: changed in place.
        base: folder or Hub id of the prior; the saved adapter names it.
        lora: rank and scale of the adapters, and the modules that get one.
        tokens: training also updates the rows of these tokens in the embedding and the output layer.

    Returns:
        `peft.PeftModel`. Its `save_pretrained` saves the adapter and the rows of `tokens`. It saves both layers
        completely if `base` has another number of tokens.

    Raises:
        ConfigError: peft finds no such modules in the prior.
    """
    import peft

    ends = (prior.get_input_embeddings(), prior.get_output_embeddings())
    names = [name for name, module in prior.named_modules() if module in ends]
    settings = peft.LoraConfig(
        task_type=task_type(prior),
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        trainable_token_indices=dict.fromkeys(names, tokens) if tokens else None,
    )
    is_local = Path(base).is_dir()
    prior.name_or_path = str(Path(base).resolve()) if is_local else base
    try:
        adapted: Any = peft.get_peft_model(prior, settings)
    except ValueError as error:
        message = f"received {lora.target_modules!r}; peft refuses it for this prior: {error}"
        raise ConfigError([Problem("lora.target_modules", message)]) from error
    if isinstance(settings.target_modules, str):  # a saved adapter with a regular expression is not loaded
        settings.target_modules = sorted(adapted.targeted_module_names)
    # peft's model card shows this name; only adapter_config.json needs the path
    prior.name_or_path = prior.config.name_or_path = Path(base).resolve().name if is_local else base
    return adapted


def task_type(prior: PreTrainedModel) -> str | None:
    """The task by which peft chooses the class of the adapted model; it has none for masked language models."""
    return "CAUSAL_LM" if prior.can_generate() else None


def base_of_adapter(folder: Path, key: str) -> str | None:
    """Folder or Hub id of the prior that an adapter was trained on; None if the folder holds no adapter.

    Args:
        folder: a folder that peft or transformers saved.
        key: field of the configuration that named the folder, for the message.

    Raises:
        ConfigError: peft is not installed, or the adapter does not name its prior.
    """
    if not (folder / ADAPTER_CONFIG_NAME).is_file():
        return None
    if find_spec("peft") is None:
        raise ConfigError([Problem(key, f"received {str(folder)!r}, which holds an adapter; {NO_PEFT}")])
    base = _named_base(folder)
    if base is None:
        message = f"received {str(folder)!r}; its {ADAPTER_CONFIG_NAME} lacks base_model_name_or_path"
        raise ConfigError([Problem(key, message)])
    seen, place = {folder.resolve()}, Path(base)
    while (place / ADAPTER_CONFIG_NAME).is_file():  # the base is an adapter of another prior, and so on
        if place.resolve() in seen:
            message = f"received {str(folder)!r}; its base_model_name_or_path leads back to {str(place)!r}"
            raise ConfigError([Problem(key, f"{message}; it must name a prior")])
        seen.add(place.resolve())
        place = Path(_named_base(place) or "")
    return base


def check_layout_of_adapter(folder: Path, base: str, key: str) -> None:
    """Refuses an adapter for other codes than those of its base, before a prior for them takes memory.

    Args:
        folder: folder of the adapter.
        base: folder or Hub id of its prior.
        key: field of the configuration that named the folder, for the message.

    Raises:
        ConfigError: names the field of token_layout.json that differs.
    """
    try:
        known, layout = layout_of(base), layout_of(str(folder))
    except (OSError, ValueError):  # reported by those who read these files next
        return
    for field in ("num_codes", "grid", "downsampling_factor", "family"):
        has, wanted = getattr(layout, field), getattr(known, field)
        if has != wanted:
            message = f"its token_layout.json has {field} {shown(has)}, that of {base} has {shown(wanted)}"
            raise ConfigError([Problem(key, message)])


def _named_base(folder: Path) -> str | None:
    base = read_json(folder / ADAPTER_CONFIG_NAME).get("base_model_name_or_path")
    return base if isinstance(base, str) and base and "\0" not in base else None


def merge_adapter(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Merges the adapter in a folder into its base prior, and returns the result in evaluation mode.

    Args:
        base: changed in place.
        folder: its adapter_config.json and adapter_model.safetensors are read, and nothing else.

    Raises:
        ValueError: a file is damaged, the adapter is not one of plain LoRA, or its weights do not fit.
    """
    import peft

    settings, weights = read_adapter(folder)
    with in_our_words(folder):
        adapted: Any = peft.get_peft_model(base, peft.LoraConfig(task_type=task_type(base), **settings))
        needed, allowed = (
            peft.get_peft_model_state_dict(adapted, save_embedding_layers=whole) for whole in (False, True)
        )
    expected = {name: allowed[name] for name in allowed if name in needed or name in weights}
    require_fit(read_header(folder / ADAPTER_WEIGHTS_NAME), expected, folder, ADAPTER_CONFIG_NAME)
    with in_our_words(folder):
        peft.set_peft_model_state_dict(adapted, weights)
        return adapted.merge_and_unload(safe_merge=True).eval()


def without_adapters(prior: Any) -> PreTrainedModel:
    """The prior itself if it has no adapters; else a copy into which its active adapters are merged.

    Args:
        prior: a model, with or without adapters from its `load_adapter`, or a `peft.PeftModel`.

    Raises:
        ValueError: adapters of this kind cannot be merged.
    """
    if not hasattr(prior, "peft_config"):
        return prior
    prior = copy.deepcopy(prior)
    try:
        if hasattr(prior, "merge_and_unload"):
            return prior.merge_and_unload()
        return _merge_injected(prior)
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(
            f"prior: its adapters cannot be merged ({error}); remove them, or build the pipeline from a merged prior"
        ) from error


def _merge_injected(prior: PreTrainedModel) -> PreTrainedModel:
    """Merges adapters that transformers' `load_adapter` added; peft itself merges only those of a PeftModel."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    replaced: list[str] = []
    for name, module in list(prior.named_modules()):
        if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) or name.startswith(tuple(replaced)):
            continue
        if isinstance(module, AuxiliaryTrainingWrapper):
            merged = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            plain = module.original_module if module.disable_adapters else merged
        else:
            if not module.disable_adapters:
                module.merge()
            plain = module.get_base_layer()
        prior.set_submodule(name, plain)
        replaced.append(f"{name}.")
    with torch.random.fork_rng():  # load_state_dict overwrites these random weights
        fresh: Any = type(prior)(copy.deepcopy(prior.config))
    # A new model, because load_adapter sets attributes on the old one that would rename the saved weights.
    fresh.to(prior.device, prior.dtype).load_state_dict(prior.state_dict())
    fresh.generation_config = prior.generation_config
    return fresh.eval()
