"""The start of a prior from a pretrained language model, whose text tokens become those of a text condition."""

import copy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from transformers import PreTrainedModel

from configs import ConfigError, Problem
from configs.hub import is_repo_id
from configs.model_folder import local_folder
from configs.problems import one_line
from stage2_prior.condition_text import TOKENIZER_NAME, read_tokenizer_file, text_fingerprint
from stage2_prior.conditions import Segment
from stage2_prior.pretrained import load_causal_lm
from stage2_prior.prior import BASE_KEY, check_architecture, decided_by, with_vocabulary
from stage2_prior.vocabulary import FILE_NAME as LAYOUT_NAME, TokenLayout


def is_language_model(name: str) -> bool:
    """Whether a folder or Hub repository holds a model with a text tokenizer and without a token layout."""
    if Path(name).is_dir():
        return (Path(name) / TOKENIZER_NAME).is_file() and not (Path(name) / LAYOUT_NAME).is_file()
    if not is_repo_id(name):
        return False
    try:
        hf_hub_download(name, LAYOUT_NAME)
    except EntryNotFoundError as error:
        return "Local" not in type(error).__name__  # LocalEntryNotFoundError: the Hub is out of reach
    except (OSError, ValueError):
        return False
    return False


def prior_from_language_model(name: str, model: dict[str, Any], layout: TokenLayout) -> PreTrainedModel:
    """Loads a causal language model, and exchanges its vocabulary for that of a token layout.

    The tokens of the text condition keep the rows of the language model, in its embeddings and in its output layer. The
    codes, the classes and the null tokens start with random rows. All other weights stay.

    Args:
        name: folder or Hub id of the language model, with its tokenizer.
        model: fields of the architecture; each must equal the field of the language model.
        layout: the token layout; one of its text conditions must have the tokenizer of the language model.

    Raises:
        ConfigError: no text condition has this tokenizer; or the model cannot be loaded, has another architecture, or
            reads too few tokens.
    """
    try:
        folder = local_folder(name)
        segment = _text_of(name, folder, layout)
        trained: Any = load_causal_lm(folder, dtype=torch.float32)
    except ConfigError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        message = f"received {name!r}; this language model cannot be loaded: {one_line(error, 300)}"
        raise ConfigError([Problem(BASE_KEY, message)]) from error
    check_architecture(name, trained, model)
    rows = trained.get_input_embeddings().weight.shape[0]
    if segment.num_tokens > rows:
        message = f"received {name!r}, which has {rows:,} tokens; its tokenizer has {segment.num_tokens:,}"
        raise ConfigError([Problem(BASE_KEY, f"{message}; choose a model whose tokenizer fits")])
    config = copy.deepcopy(trained.config)
    positions = getattr(config, "max_position_embeddings", None) or layout.num_positions
    own = {"max_position_embeddings": max(positions, layout.num_positions), "dtype": torch.float32}
    fields = decided_by(layout) | own
    for field, value in fields.items():
        setattr(config, field, value)
    old = torch.arange(segment.num_tokens)
    new = old + layout.first_tokens[segment.name]
    return with_vocabulary(trained, config, layout, torch.stack([old, new]), repr(name))


def _text_of(name: str, folder: Path, layout: TokenLayout) -> Segment:
    """The text condition whose tokenizer is that of a language model."""
    try:
        fingerprint = text_fingerprint(read_tokenizer_file(folder))
    except FileNotFoundError:
        fingerprint = ""
    for segment in layout.segments:
        if segment.kind == "text" and segment.fingerprint == fingerprint:
            return segment
    message = f"received {name!r}, a language model; it can only start a prior with a text condition of its tokenizer"
    advice = f"set conditions.NAME.kind text and conditions.NAME.tokenizer {name}, and run stage2_prior.tokenize"
    raise ConfigError([Problem(BASE_KEY, f"{message}: {advice}")])
