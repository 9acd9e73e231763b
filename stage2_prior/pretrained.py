"""Loads a trained prior from a folder or a Hub repository, and checks that the weights fit the configuration."""

import textwrap
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from configs.files import read_json
from configs.model_folder import check_model_folder, local_folder
from stage2_prior.vocabulary import TokenLayout

# transformers lists the weights that do not fit a configuration under these names.
MISFITS = ("missing_keys", "unexpected_keys", "mismatched_keys")


def load_causal_lm(folder: str | Path, trust_remote_code: bool = False, **options: Any) -> PreTrainedModel:
    """Loads a causal language model in evaluation mode. Every weight comes from the folder's safetensors.

    Args:
        folder: a folder that a model's `save_pretrained` wrote.
        trust_remote_code: run Python files of the folder, if its config.json names such files.
        **options: passed to `AutoModelForCausalLM.from_pretrained`, for instance `dtype`.

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
        ignore_mismatched_sizes=True,  # the error below names them
        **options,
    )
    model, info = loaded
    wrong = {kind: sorted(map(str, info[kind])) for kind in MISFITS if info[kind]}
    if wrong:
        listed = textwrap.shorten(str(wrong), 400, placeholder=" …")
        raise ValueError(f"{folder}: the weights do not fit config.json: {listed}; save or download the folder again")
    saved = read_json(Path(folder) / "config.json").get("architectures") or [type(model).__name__]
    # The check above cannot tell llama from gemma, for instance: their weights have the same names.
    if type(model).__name__ not in saved:
        raise ValueError(
            f"{folder}: config.json: model_type: received {model.config.model_type!r}, but the weights were saved from "
            f"{saved}; restore the model_type, or download the folder again"
        )
    return model


def layout_of(name: str) -> TokenLayout:
    """The token layout of the prior in a folder or Hub repository."""
    return TokenLayout.from_pretrained(local_folder(name))
