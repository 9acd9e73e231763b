"""Loads trained priors from a folder or a Hub repository: whole models, and adapters of them."""

import textwrap
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from configs.files import read_json
from configs.model_folder import check_model_folder, local_folder
from stage2_prior.vocabulary import TokenLayout

# Kinds of keys by which transformers reports that weights do not fit a configuration.
MISFITS = ("missing_keys", "unexpected_keys", "mismatched_keys")


def load_causal_lm(folder: str | Path, trust_remote_code: bool = False, **options: Any) -> PreTrainedModel:
    """A causal language model in evaluation mode. Every weight comes from the folder's safetensors.

    Args:
        folder: as a model's `save_pretrained` writes it.
        trust_remote_code: run Python files of the folder, if its config.json names such files.
        **options: of `AutoModelForCausalLM.from_pretrained`, for instance `dtype`.

    Raises:
        OSError: a file is missing or damaged.
        ValueError: the weights do not fit config.json, or the folder refers to code or files outside itself.
    """
    check_model_folder(folder)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        str(folder),
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below by name, with the other kinds
        **options,
    )
    model, info = loaded
    wrong = {kind: sorted(map(str, info[kind])) for kind in MISFITS if info[kind]}
    if wrong:
        listed = textwrap.shorten(str(wrong), 400, placeholder=" …")
        raise ValueError(f"{folder}: the weights do not fit config.json: {listed}; save or download the folder again")
    saved = read_json(Path(folder) / "config.json").get("architectures") or [type(model).__name__]
    if type(model).__name__ not in saved:  # some architectures share all names of weights, llama and gemma for instance
        raise ValueError(
            f"{folder}: config.json: model_type: received {model.config.model_type!r}, but the weights were saved from "
            f"{saved}; restore the model_type, or download the folder again"
        )
    return model


def layout_of(name: str) -> TokenLayout:
    """The token layout of the prior in a folder or Hub repository."""
    return TokenLayout.from_pretrained(local_folder(name))
