"""A prior is a stock causal language model over a token layout: a new one, or one that was trained before.

Functions that read a prior from disk or from the Hub are in pretrained.py.
"""

import copy
import textwrap
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from configs import ConfigError, Problem
from configs.hub import is_repo_id
from configs.model_folder import local_folder
from stage2_prior.adapters import base_of_adapter, merge_adapter
from stage2_prior.pretrained import layout_of, load_causal_lm
from stage2_prior.sampling.decoder import EagerDecoder
from stage2_prior.vocabulary import FILE_NAME as LAYOUT_NAME, TokenLayout

# Field of stage 2's configuration that names the prior to start from.
BASE_KEY = "model_name_or_path"


def build_prior(model: dict[str, Any], layout: TokenLayout) -> PreTrainedModel:
    """A freshly initialised stock causal language model for a token layout.

    Args:
        model: `model_type`, and fields of that model's configuration.
        layout: decides vocabulary and positions.

    Raises:
        ConfigError: the settings fit no model of this type, or a model of this type cannot be a prior.
    """
    settings = {name: value for name, value in model.items() if name != "model_type"}
    try:
        return _initialise(AutoConfig.for_model(model["model_type"], **settings, **decided_by(layout)), layout)
    except ConfigError:
        raise
    except Exception as error:  # each architecture refuses its settings in its own way
        reason = textwrap.shorten(str(error) or type(error).__name__, 200, placeholder=" …")
        raise ConfigError([Problem("model", f"no {model['model_type']} has these settings: {reason}")]) from error


def decided_by(layout: TokenLayout) -> dict[str, Any]:
    """Fields of a model's configuration that follow from the token layout."""
    return {
        "vocab_size": layout.vocab_size,
        "max_position_embeddings": layout.length,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def _initialise(config: Any, layout: TokenLayout) -> PreTrainedModel:
    prior = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if has_experts(prior):
        reason = "a mixture of experts adds its router's loss to the loss of the codes; choose a model without experts"
        raise ConfigError([Problem("model.model_type", f"received {config.model_type!r}; {reason}")])
    if not reads_like_a_sequence(prior, layout):
        reason = "as a prior it must not look ahead, and must keep keys and values in a standard cache"
        raise ConfigError([Problem("model.model_type", f"received {config.model_type!r}; {reason}")])
    prior.generation_config = generation_config(layout)
    return prior


def has_experts(prior: PreTrainedModel) -> bool:
    """Whether a router sends each token to a few experts.

    A router needs a loss of its own. With it the logged loss is not that of the codes; without it the router learns to
    use few of the experts.
    """
    return any(name.rpartition(".")[2] in ("experts", "router") for name, _ in prior.named_modules())


@torch.no_grad()
def reads_like_a_sequence(prior: PreTrainedModel, layout: TokenLayout) -> bool:
    """Whether the sampler's cache gives the logits of reading all tokens at once.

    The first tokens are read one by one, then all but the last at once, then the last, where every window of attention
    acts. The logits differ if a model sees later tokens. A model that keeps another kind of state cannot use the cache.
    """
    prior.eval()
    tokens = torch.randint(layout.num_codes, (1, layout.length), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(prior.device)
    if tokens.device.type == "meta":
        return True
    whole = prior(input_ids=tokens).logits[0].float()
    decoder, row, last = EagerDecoder(prior, 1, layout.length), slice(0, 1), layout.length - 1
    alone = range(min(6, layout.length))
    try:
        found = [decoder.read(row, tokens[:, place : place + 1], place) for place in alone]
        decoder.read(row, tokens[:, : last or 1], 0)
        found.append(decoder.read(row, tokens[:, last:], last))
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    finally:
        prior.train()
    expected = whole[[*alone, last]]
    return torch.allclose(expected, torch.cat(found), rtol=1e-3, atol=1e-3 * float(whole.std()))


def generation_config(layout: TokenLayout) -> GenerationConfig:
    """Makes a bare `prior.generate(condition)` yield an image's codes and nothing else."""
    return GenerationConfig(
        suppress_tokens=list(range(layout.num_codes, layout.vocab_size)),
        max_new_tokens=layout.length,
        do_sample=True,
        top_k=0,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def load_prior(name: str, key: str = BASE_KEY) -> PreTrainedModel:
    """The prior in a folder or Hub repository. An adapter is merged into the prior that it was trained on.

    Args:
        name: folder or Hub id.
        key: field of the configuration that holds the name, for the message.

    Raises:
        ConfigError: the name is of an adapter, and peft is not installed or the prior of the adapter cannot be loaded.
        OSError, ValueError, SafetensorError: nothing can be loaded, or the weights do not fit the configuration.
    """
    folder = local_folder(name)
    base = base_of_adapter(folder, key)
    if base is None:
        return load_causal_lm(folder)
    try:
        prior = adapt_prior(base, {}, layout_of(name))
    except ConfigError as error:
        message = f"received {name!r}, an adapter of the prior {base!r}: {error.problems[0].message}"
        raise ConfigError([Problem(key, message)]) from error
    return merge_adapter(prior, folder)


def adapt_prior(name: str, model: dict[str, Any], layout: TokenLayout) -> PreTrainedModel:
    """A trained prior, changed to fit a token layout. It keeps the rows of codes and of classes with the same names.

    Args:
        name: output folder of stage 2, or Hub id of a prior that was pushed from there.
        model: fields of the architecture; each must equal that of the prior.
        layout: of the codes to train on; of the same tokenizer.

    Raises:
        ConfigError: no prior can be loaded, it has another architecture, it was trained on another tokenizer's codes,
            or it has learnt the positions of another number of codes.
    """
    known, trained = _load_known(name)
    _check_known(name, known, trained, model, layout)
    if known.to_dict() == layout.to_dict():
        return trained

    config = copy.deepcopy(trained.config)
    for field, value in decided_by(layout).items():
        setattr(config, field, value)
    prior = _initialise(config, layout)
    old, new = shared_tokens(known, layout)
    ends = (prior.get_input_embeddings(), prior.get_output_embeddings())
    by_token = {id(parameter) for end in ends for parameter in end.parameters()}
    before = dict(trained.named_parameters())
    with torch.no_grad():
        for parameter_name, parameter in prior.named_parameters():
            if id(parameter) in by_token:
                parameter[new] = before[parameter_name][old]
            elif parameter.shape == before[parameter_name].shape:
                parameter.copy_(before[parameter_name])
            else:  # a table of positions, which cannot be stretched
                learnt = f"which has learnt the positions of {known.length} codes; these images have {layout.length}"
                raise ConfigError([Problem(BASE_KEY, f"received {name!r}, {learnt}; train a new prior")])
    return prior


def _load_known(name: str) -> tuple[TokenLayout, PreTrainedModel]:
    """The layout and the weights of a trained prior."""
    if not (Path(name) / LAYOUT_NAME).is_file() and (Path(name).is_dir() or not is_repo_id(name)):
        message = f"received {name!r}; there is no trained prior in this place (train one with stage2_prior.train)"
        raise ConfigError([Problem(BASE_KEY, message)])
    try:
        return layout_of(name), load_prior(name)
    except ConfigError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        message = f"received {name!r}; no prior can be loaded from there (train one with stage2_prior.train): {reason}"
        raise ConfigError([Problem(BASE_KEY, message)]) from error


def _check_known(
    name: str, known: TokenLayout, trained: PreTrainedModel, model: dict[str, Any], layout: TokenLayout
) -> None:
    """Refuses a prior of another tokenizer's codes, or of another architecture than the configuration asks for."""
    try:
        known.require_fingerprint(
            layout.tokenizer_fingerprint, BASE_KEY, f"{name} was trained on those; choose another"
        )
    except ValueError as error:
        raise ConfigError([Problem.of_error(error)]) from error
    has = {field: getattr(trained.config, field, None) for field in model}
    different = [
        Problem(
            f"model.{field}",
            f"received {model[field]!r}, but {name} has {has[field]!r}; leave it out, the prior decides this",
        )
        for field in model
        if model[field] != has[field]
    ]
    if different:
        raise ConfigError(different)


def shared_tokens(old: TokenLayout, new: TokenLayout) -> Tensor:
    """int64 `(2, n)`: tokens of both layouts with the same meaning: codes, classes by name, the null token."""
    pairs = [(code, code) for code in range(new.num_codes)]
    for number, name in enumerate(new.class_names):
        if name in old.class_names:
            pairs.append((old.num_codes + old.class_names.index(name), new.num_codes + number))
    if old.has_null and new.has_null:
        pairs.append((old.null_token, new.null_token))
    return torch.tensor(pairs).T
