"""Loads a trained prior from a folder or a Hub repository, and checks that the weights fit the configuration."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from configs.files import read_json
from configs.model_folder import WEIGHTS_NAMES, check_model_folder, local_folder
from configs.problems import shown
from configs.weights_files import FLOATS, Stored, in_our_words, require_finite, require_none, size
from stage2_prior.vocabulary import Family, TokenLayout

# The class of transformers that builds and loads the priors of a family.
AUTO_CLASSES: dict[Family, Any] = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM}

# transformers lists the weights that do not fit a configuration under these names.
MISFITS = ("missing_keys", "unexpected_keys", "mismatched_keys")

# Weights that may be missing before memory is a concern.
SLACK = 2**24


def load_language_model(
    folder: str | Path, family: Family = "causal", trust_remote_code: bool = False, **options: Any
) -> PreTrainedModel:
    """Loads a causal or masked language model in evaluation mode. Every weight comes from the folder's safetensors.

    Args:
        folder: a folder that a model's `save_pretrained` wrote.
        family: "causal" or "masked", as the token layout of the prior says.
        trust_remote_code: run Python files of the folder, if its config.json names such files.
        **options: passed to `from_pretrained`, for instance `dtype`.

    Raises:
        OSError: a file is missing or damaged.
        ValueError: the weights do not fit config.json, or the folder refers to code or files outside itself.
    """
    folder = Path(folder)
    stored = check_model_folder(folder)
    if not trust_remote_code:
        _check_size(folder, family, stored)
    with in_our_words(folder):
        loaded: Any = AUTO_CLASSES[family].from_pretrained(
            str(folder),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the error below names them
            **options,
        )
    model, info = loaded
    parameters = dict(model.named_parameters())
    require_none(
        folder,
        "config.json",
        **{kind.removesuffix("_keys"): sorted(map(str, info[kind])) for kind in MISFITS},
        wrong_dtype=[
            f"{name} {stored[name].dtype}" for name in parameters if name in stored and stored[name].dtype not in FLOATS
        ],
    )
    require_finite(model.state_dict().items(), folder / WEIGHTS_NAMES[0])
    saved = read_json(folder / "config.json").get("architectures") or [type(model).__name__]
    if not isinstance(saved, list):
        raise ValueError(f"{folder}: config.json: architectures: received {shown(saved)}; must be a list of names")
    # The check above cannot tell llama from gemma, for instance: their weights have the same names.
    if type(model).__name__ not in saved:
        raise ValueError(
            f"{folder}: config.json: model_type: received {model.config.model_type!r}, but the weights were saved from "
            f"{saved}; restore the model_type, or download the folder again"
        )
    return model


def _check_size(folder: Path, family: Family, stored: dict[str, Stored]) -> None:
    """Refuses a config.json of a larger model than the weights, before a model of this size takes memory."""
    with in_our_words(folder / "config.json"), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        implied = AUTO_CLASSES[family].from_config(config, trust_remote_code=False).num_parameters()
    if implied > 2 * size(stored) + SLACK:  # below it, transformers lists the weights that are missing
        raise ValueError(
            f"{folder}: the weights do not fit config.json, which describes a model of {implied:,} weights, but "
            f"{size(stored):,} are stored; save or download the folder again"
        )


def layout_of(name: str) -> TokenLayout:
    """The token layout of the prior in a folder or Hub repository."""
    return TokenLayout.from_pretrained(local_folder(name))
