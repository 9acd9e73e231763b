"""Builds a prior, a stock causal or masked language model over a token layout, or adapts a trained one to new classes.

pretrained.py reads the files of a trained prior.
"""

import copy
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from configs import ConfigError, Problem
from configs.hub import is_repo_id
from configs.memory import is_out_of_memory, shortage
from configs.model_folder import local_folder
from configs.problems import one_line
from configs.staging import finish_interrupted
from stage2_prior.adapters import base_of_adapter, check_layout_of_adapter, merge_adapter
from stage2_prior.conditions import Segment
from stage2_prior.pretrained import AUTO_CLASSES, layout_of, load_language_model
from stage2_prior.sampling.decoder import EagerDecoder
from stage2_prior.vocabulary import FILE_NAME as LAYOUT_NAME, TokenLayout

# Configuration field that names the prior to fine-tune.
BASE_KEY = "model_name_or_path"

# What the model of a prior must be, for the message.
CAUSAL = "a causal prior must be causal, and must support the standard cache of keys and values"
MASKED = "a masked prior must predict every token from all tokens before and after it"

# Layers of the largest model that is built to count the weights of a deeper one.
COUNTED = 4


def build_prior(model: dict[str, Any], layout: TokenLayout) -> PreTrainedModel:
    """Builds a stock language model with random weights for a token layout.

    Args:
        model: `model_type`, and fields of that model's configuration.
        layout: determines the family, the size of the vocabulary and the number of positions.

    Raises:
        ConfigError: a model of this type refuses the settings, cannot be a prior, or does not fit in memory.
    """
    settings = {name: value for name, value in model.items() if name != "model_type"}
    check_size(model, layout)
    try:
        return _initialise(AutoConfig.for_model(model["model_type"], **settings, **decided_by(layout)), layout)
    except ConfigError:
        raise
    except Exception as error:  # each architecture raises its own exceptions
        if is_out_of_memory(error):
            raise
        message = f"{model['model_type']} refuses these settings: {one_line(error, 200)}"
        raise ConfigError([Problem("model", message)]) from error


def check_size(model: dict[str, Any], layout: TokenLayout) -> None:
    """Compares the float32 weights of a new prior with the free memory, before anything is allocated.

    Raises:
        ConfigError: they do not fit.
    """
    count = num_weights(model, layout)
    lack = None if count is None else shortage(4 * count, torch.device("cpu"))
    if lack is not None:
        advice = "choose smaller model.hidden_size, model.intermediate_size or model.num_hidden_layers"
        raise ConfigError([Problem("model", f"{count:,} weights: {lack}; {advice}")])


def num_weights(model: dict[str, Any], layout: TokenLayout) -> int | None:
    """The number of parameters of a prior, without memory for them; None if the architecture does not tell.

    A model of up to COUNTED layers is built on the device "meta", which holds no numbers. Of a deeper one, models of 1
    to COUNTED layers are. Every further layer counts as much as the smallest of these, so that the number is not too
    large for usual architectures.
    """
    try:
        depth = AutoConfig.for_model(**model, **decided_by(layout)).num_hidden_layers
        if depth <= COUNTED:
            return _count(model, layout, depth)
        counts = [_count(model, layout, layers) for layers in range(1, COUNTED + 1)]
    except Exception:  # each architecture raises its own exceptions, also when it is built for real
        return None
    return counts[-1] + (depth - COUNTED) * min(more - less for less, more in pairwise(counts))


def _count(model: dict[str, Any], layout: TokenLayout, layers: int) -> int:
    """The number of parameters of a prior with this number of layers."""
    fields = AutoConfig.for_model(model["model_type"]).attribute_map
    own = {name: value for name, value in model.items() if fields.get("num_hidden_layers", "num_hidden_layers") != name}
    config = AutoConfig.for_model(**{**own, "num_hidden_layers": layers}, **decided_by(layout))
    with torch.device("meta"):
        return int(AUTO_CLASSES[layout.family].from_config(config, trust_remote_code=False).num_parameters())


def decided_by(layout: TokenLayout) -> dict[str, Any]:
    """The fields of a model's configuration that the token layout determines."""
    masked = layout.family == "masked"
    others = {"cls_token_id": None, "mask_token_id": layout.mask_token, "sep_token_id": None} if masked else {}
    return {
        "vocab_size": layout.vocab_size,
        "max_position_embeddings": layout.num_positions,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **others,
    }


def _initialise(config: Any, layout: TokenLayout) -> PreTrainedModel:
    prior = AUTO_CLASSES[layout.family].from_config(config, trust_remote_code=False)
    if has_experts(prior):
        reason = "the router of its experts adds its own loss to the loss of the codes; choose a model without experts"
        raise ConfigError([Problem("model.model_type", f"received {config.model_type!r}; {reason}")])
    suits, needs = (reads_like_a_sequence, CAUSAL) if layout.family == "causal" else (sees_both_sides, MASKED)
    if not suits(prior, layout):
        raise ConfigError(
            [Problem("model.model_type", f"received {config.model_type!r}; {needs}; choose another model")]
        )
    if layout.family == "causal":
        prior.generation_config = generation_config(layout)
    return prior


def has_experts(prior: PreTrainedModel) -> bool:
    """Whether a router sends each token to a few experts.

    A router needs an auxiliary loss. With this loss, the logged loss is not that of the codes. Without it, the router
    learns to use only a few experts.
    """
    return any(name.rpartition(".")[2] in ("experts", "router") for name, _ in prior.named_modules())


@torch.no_grad()
def reads_like_a_sequence(prior: PreTrainedModel, layout: TokenLayout) -> bool:
    """Whether a forward with the sampler's cache gives the same logits as a forward of all tokens at once.

    The cached forward reads the first tokens one by one, then all up to the last at once, then the last one, where
    every attention window hides tokens. The comparison fails if the model is not causal, or if its state is not
    made of keys and values.
    """
    prior.eval()
    tokens = torch.randint(layout.num_codes, (1, layout.num_positions), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(prior.device)
    if tokens.device.type == "meta":
        return True
    whole = prior(input_ids=tokens).logits[0].float()
    decoder, row, last = EagerDecoder(prior, 1, layout.num_positions), slice(0, 1), layout.num_positions - 1
    alone = range(min(6, layout.num_positions))
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


@torch.no_grad()
def sees_both_sides(prior: PreTrainedModel, layout: TokenLayout) -> bool:
    """Whether the logits at the first place depend on the last token, and those at the last place on the first token.

    A model that writes text, with a decoder for instance, is refused too: it is no plain masked language model.
    """
    if prior.device.type == "meta":
        return True
    prior.eval()
    tokens = torch.zeros(3, layout.sequence_length, dtype=torch.int64, device=prior.device)
    tokens[1, 0], tokens[2, -1] = 1, layout.mask_token
    try:
        logits = prior(input_ids=tokens).logits.float()
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    finally:
        prior.train()
    changes = (logits - logits[0]).abs().amax(-1) / logits[0].std()
    return not prior.can_generate() and min(changes[1, -1], changes[2, 0]) > 1e-5


def generation_config(layout: TokenLayout) -> GenerationConfig:
    """Limits `prior.generate(condition)`, without further arguments, to the codes of one image."""
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
    """Loads the prior in a folder or Hub repository. An adapter is merged into the prior that it was trained on.

    Args:
        name: folder or Hub id.
        key: field of the configuration that holds the name, for the message.

    Raises:
        ConfigError: the folder holds an adapter, and peft is not installed or the adapter's prior cannot be loaded.
        OSError, ValueError, SafetensorError: a file is missing or damaged, or the weights do not fit config.json.
    """
    folder = local_folder(name)
    base = base_of_adapter(folder, key)
    if base is None:
        return load_language_model(folder, layout_of(name).family)
    try:
        check_layout_of_adapter(folder, base, key)
        prior = adapt_prior(base, {}, layout_of(name))
    except ConfigError as error:
        message = f"received {name!r}, an adapter of the prior {base!r}: {error.problems[0].message}"
        raise ConfigError([Problem(key, message)]) from error
    return merge_adapter(prior, folder)


def adapt_prior(name: str, model: dict[str, Any], layout: TokenLayout) -> PreTrainedModel:
    """Loads a trained prior and fits it to a token layout. Codes and classes of the same names keep their embeddings.

    Args:
        name: output folder of stage 2, or Hub id of an uploaded prior.
        model: fields of the architecture; each must equal the field of the trained prior.
        layout: token layout of the codes to train on; their tokenizer must be the same.

    Raises:
        ConfigError: no prior can be loaded, it has another family or architecture, it was trained on another
            tokenizer's codes, or its learnt position embeddings are for another number of codes.
    """
    known, trained = _load_known(name)
    _check_known(name, known, trained, model, layout)
    if known.to_dict() == layout.to_dict():
        return trained

    config = copy.deepcopy(trained.config)
    for field, value in decided_by(layout).items():
        setattr(config, field, value)
    return with_vocabulary(trained, config, layout, shared_tokens(known, layout), repr(name))


def with_vocabulary(
    trained: PreTrainedModel, config: Any, layout: TokenLayout, tokens: Tensor, name: str
) -> PreTrainedModel:
    """A model with the vocabulary of a token layout and, but for the rows of tokens, the weights of a trained one.

    Args:
        trained: the trained model.
        config: its configuration, with the fields that the layout decides.
        layout: the token layout.
        tokens: int64 `(2, n)`: tokens of the trained model, and the tokens of the layout that keep their rows. Other
            rows are random.
        name: the trained model in words, for messages.

    Raises:
        ConfigError: its learnt position embeddings are for another number of tokens.
    """
    prior = _initialise(config, layout)
    old, new = tokens
    ends = (prior.get_input_embeddings(), prior.get_output_embeddings())
    by_token = {id(parameter) for end in ends for parameter in end.parameters()}
    before = dict(trained.named_parameters())
    with torch.no_grad():
        for parameter_name, parameter in prior.named_parameters():
            if id(parameter) in by_token:
                parameter[new] = before[parameter_name][old]
            elif parameter.shape == before[parameter_name].shape:
                parameter.copy_(before[parameter_name])
            else:  # a table of learnt position embeddings cannot be extended
                has, needs = trained.config.max_position_embeddings, layout.num_positions
                learnt = f"whose position embeddings are for {has} tokens; these sequences have {needs}"
                raise ConfigError([Problem(BASE_KEY, f"received {name}, {learnt}; train a new prior")])
    return prior


def _load_known(name: str) -> tuple[TokenLayout, PreTrainedModel]:
    """The layout and the weights of a trained prior."""
    finish_interrupted(name)
    if not (Path(name) / LAYOUT_NAME).is_file() and (Path(name).is_dir() or not is_repo_id(name)):
        message = f"received {name!r}; it holds no trained prior (train one with stage2_prior.train)"
        raise ConfigError([Problem(BASE_KEY, message)])
    try:
        return layout_of(name), load_prior(name)
    except ConfigError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        message = f"received {name!r}; its prior cannot be loaded (train one with stage2_prior.train): {reason}"
        raise ConfigError([Problem(BASE_KEY, message)]) from error


def _check_known(
    name: str, known: TokenLayout, trained: PreTrainedModel, model: dict[str, Any], layout: TokenLayout
) -> None:
    """Refuses a prior of another family, for the codes of another tokenizer, or with another architecture."""
    if known.family != layout.family:
        message = f"received {layout.family!r}, but {name} is a {known.family} prior; set it to {known.family!r}"
        raise ConfigError([Problem("prior", message)])
    try:
        known.require_fingerprint(
            layout.tokenizer_fingerprint, BASE_KEY, f"{name} was trained on those; choose another"
        )
    except ValueError as error:
        raise ConfigError([Problem.of_error(error)]) from error
    check_architecture(name, trained, model)


def check_architecture(name: str, trained: PreTrainedModel, model: dict[str, Any]) -> None:
    """Refuses fields of `model` that differ from those of the trained model `name`.

    Raises:
        ConfigError: names each such field.
    """
    has = {field: getattr(trained.config, field, None) for field in model}
    different = [
        Problem(
            f"model.{field}",
            f"received {model[field]!r}, but {name} has {has[field]!r}; remove it: the prior determines it",
        )
        for field in model
        if model[field] != has[field]
    ]
    if different:
        raise ConfigError(different)


def shared_tokens(old: TokenLayout, new: TokenLayout) -> Tensor:
    """Pairs of tokens with the same meaning in both layouts, int64 `(2, n)`: codes, classes by name, null and mask."""
    pairs = [(code, code) for code in range(new.num_codes)]
    for number, name in enumerate(new.class_names):
        if name in old.class_names:
            pairs.append((old.num_codes + old.class_names.index(name), new.num_codes + number))
    if old.has_null and new.has_null:
        pairs.append((old.null_token, new.null_token))
    if old.family == new.family == "masked":
        pairs.append((old.mask_token, new.mask_token))
    before = {segment.name: segment for segment in old.segments}
    for segment in new.segments:
        pairs += _shared_of_segment(before.get(segment.name), segment, old, new)
    return torch.tensor(pairs).T


def _shared_of_segment(
    before: Segment | None, segment: Segment, old: TokenLayout, new: TokenLayout
) -> Iterable[tuple[int, int]]:
    """Pairs of tokens of a condition in both layouts: classes by name, tokens of the same tokenizer, the null token."""
    if before is None or (before.kind, before.fingerprint) != (segment.kind, segment.fingerprint):
        return
    first_old, first_new = old.first_tokens[segment.name], new.first_tokens[segment.name]
    names = before.class_names or tuple(map(str, range(before.num_tokens)))
    wanted = segment.class_names or tuple(map(str, range(segment.num_tokens)))
    places = {name: number for number, name in enumerate(names)}
    yield from ((first_old + places[name], first_new + number) for number, name in enumerate(wanted) if name in places)
    if (before.has_null or old.has_null) and (segment.has_null or new.has_null):
        yield old.null_of(segment.name), new.null_of(segment.name)
