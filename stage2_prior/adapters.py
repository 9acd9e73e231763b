"""Low-rank adapters of priors, with peft: attached for training, merged for everything else.

Source: Hu et al. 2021, "LoRA: low-rank adaptation of large language models".
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from configs import ConfigError, Problem
from stage2_prior.training.config import NO_PEFT, LoraConfig


def attach_adapter(prior: PreTrainedModel, base: str, lora: LoraConfig, tokens: list[int]) -> Any:
    """Freezes a prior and gives its layers adapters.

    Args:
        prior: changed in place.
        base: folder or Hub id it was loaded from, which the adapter will name.
        lora: rank, scale and place of the adapters.
        tokens: whose rows in the embedding and in the output layer are trained as well.

    Returns:
        `peft.PeftModel`; its `save_pretrained` saves the adapter and the rows of `tokens`; the whole of both layers
        if their number of tokens is not that of `base`.

    Raises:
        ConfigError: the prior has no such modules.
    """
    import peft

    ends = (prior.get_input_embeddings(), prior.get_output_embeddings())
    names = [name for name, module in prior.named_modules() if module in ends]
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        trainable_token_indices=dict.fromkeys(names, tokens) if tokens else None,
    )
    prior.name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    try:
        return peft.get_peft_model(prior, settings)
    except ValueError as error:
        message = f"received {lora.target_modules!r}; peft refuses it for this prior: {error}"
        raise ConfigError([Problem("lora.target_modules", message)]) from error


def base_of_adapter(name: str, key: str) -> str | None:
    """The prior, folder or Hub id, that the adapter in a folder or Hub repository changes; None if it holds none.

    Args:
        name: of the folder or repository.
        key: of the configuration that named it, for the message.

    Raises:
        ConfigError: peft is not installed.
    """
    if find_adapter_config_file(name) is None:
        return None
    if find_spec("peft") is None:
        raise ConfigError([Problem(key, f"received {name!r}, which holds an adapter; {NO_PEFT}")])
    import peft

    return peft.PeftConfig.from_pretrained(name).base_model_name_or_path


def merge_adapter(base: PreTrainedModel, name: str) -> PreTrainedModel:
    """The prior that a base and the adapter in a folder or Hub repository make together."""
    import peft

    return peft.PeftModel.from_pretrained(base, name).merge_and_unload()
