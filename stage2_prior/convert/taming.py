"""Reads the priors of CompVis/taming-transformers: a GPT whose tokens are the codes, and which has one condition token.

The original has no tokens for classes. Class c is the token c, like code c; the place in the sequence tells them apart.

Source: Esser et al. 2021, "Taming transformers for high-resolution image synthesis", section 3.2.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs import ConfigError, Problem
from stage1_vqgan import as_float32, count, is_stored, leave_out, prefixes, read_state, refuse, require_complete
from stage2_prior.convert.config import ConvertConfig
from stage2_prior.convert.settings import CONDITIONS, Settings, read_settings

# A tensor that every GPT of this code base has, and the prefix of its tensors in a Net2NetTransformer.
MARK, PREFIX = "tok_emb.weight", "transformer."
FIRST_STAGE, CONDITION_STAGE, ORDER = "first_stage_model.", "cond_stage_model.", "permuter.forward_shuffle_idx"
LEFT_OUT = {r"(io\d*|grad\w*)\.": "stored inputs, outputs and gradients"}
# Our options, and the keys of the configuration that state the same.
KEYS = {"num_heads": "n_head", "num_classes": "cond_stage_config", "start_code": "sos_token"}
DROPOUT = ("embd_pdrop", "resid_pdrop", "attn_pdrop")


@dataclass(frozen=True, kw_only=True)
class Original:
    """A prior of taming-transformers.

    Attributes:
        weights: float32 tensors of the GPT, by their names there.
        num_heads: attention heads.
        dropout: probabilities, by their names in the original, which are those of GPT2Config.
        num_classes: C; 0 for an unconditional prior.
        start_code: the code that starts the sequences of an unconditional prior.
        has_tokenizer: whether the checkpoint holds the tokenizer too.
        tokenizer_config: configuration of this tokenizer, None if there is none.
        notes: lines for the user: what was left out or decided.
    """

    weights: dict[str, Tensor]
    num_heads: int
    dropout: dict[str, float]
    num_classes: int
    start_code: int
    has_tokenizer: bool
    tokenizer_config: str | None
    notes: list[str]

    @property
    def sizes(self) -> dict[str, int]:
        """Size of the vocabulary, number of positions, width and number of layers."""
        return sizes(self.weights)


def read(config: ConvertConfig) -> Original:
    """Reads a prior from its checkpoint and, if given, its configuration.

    Raises:
        ConfigError: a file cannot be read, is not of such a prior, or contradicts the other; or a stock GPT-2 cannot
            compute this prior.
    """
    path = Path(config.checkpoint)
    settings = read_settings(Path(config.config)) if config.config else Settings()
    state, notes = read_state(path, MARK, "prior")
    if len(found := prefixes(state, MARK)) != 1:
        raise refuse(
            "checkpoint", path, f"it holds {len(found)} tensors {MARK}; the GPT of taming-transformers has one"
        )
    outer = found[0].removesuffix(PREFIX)
    _require_stock(state, outer, path)
    inside = {name.removeprefix(found[0]): value for name, value in state.items() if name.startswith(found[0])}
    stored, left_out = leave_out(inside, LEFT_OUT)
    for name in [name for name in stored if name.endswith(".attn.mask")]:
        _require_causal(name, stored.pop(name), path)
    weights = as_float32(stored, path)
    _require_names(weights, path)
    return Original(
        weights=weights,
        dropout={name: settings.network.get(name, 0.0) for name in DROPOUT},
        has_tokenizer=any(name.startswith(f"{outer}{FIRST_STAGE}") for name in state),
        tokenizer_config=config.config if settings.has_tokenizer else None,
        notes=notes + left_out,
        **_settled(config, settings, sizes(weights)),
    )


def sizes(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """The sizes of a GPT, by their names in its configuration; see `Original.sizes`."""
    vocab, width = weights["tok_emb.weight"].shape
    layers = count(weights, r"blocks\.(\d{1,4})\.")
    return {"vocab_size": vocab, "block_size": weights["pos_emb"].shape[1], "n_embd": width, "n_layer": layers}


def _require_stock(state: Mapping[str, Tensor], outer: str, path: Path) -> None:
    """Refuses conditions of several tokens, and codes in another order than row by row."""
    if any(name.startswith(f"{outer}{CONDITION_STAGE}") for name in state):
        raise refuse("checkpoint", path, f"its conditions are images ({CONDITION_STAGE}*); {CONDITIONS}")
    order = state.get(f"{outer}{ORDER}")
    if order is not None and not (is_stored(order) and order.flatten().tolist() == list(range(order.numel()))):
        raise refuse("checkpoint", path, f"its codes are in another order than row by row ({ORDER})")


def _require_causal(name: str, mask: Tensor, path: Path) -> None:
    """Refuses attention that sees later tokens. The first token always sees itself alone."""
    square = mask.ndim == 4 and mask.shape == (1, 1, *mask.shape[3:] * 2) and is_stored(mask)
    if not square or not torch.equal(mask[0, 0] != 0, torch.ones(mask.shape[2:]).tril() != 0):
        reason = "its first tokens see each other, but those of a GPT-2 see only the tokens before them"
        raise refuse("checkpoint", path, f"{name} {tuple(mask.shape)} is no causal mask: {reason}")


def _require_names(weights: Mapping[str, Tensor], path: Path) -> None:
    """Refuses weights that are not exactly those of a GPT."""
    shapes = {name: tuple(weights[name].shape) for name in ("tok_emb.weight", "pos_emb") if name in weights}
    if [len(shape) for shape in shapes.values()] != [2, 3]:
        needed = "tok_emb.weight (tokens, width) and pos_emb (1, places, width)"
        raise refuse("checkpoint", path, f"it has {shapes}; a GPT has {needed}")
    sized = sizes(weights)
    width, square = sized["n_embd"], (sized["n_embd"],) * 2
    linear = {f"attn.{name}": square for name in ("key", "query", "value", "proj")}
    linear |= {"mlp.0": (4 * width, width), "mlp.2": (width, 4 * width)}
    block: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in linear.items()}
    block |= {f"{name}.bias": shape[:1] for name, shape in linear.items()}
    block |= {f"{name}.{kind}": (width,) for name in ("ln1", "ln2") for kind in ("weight", "bias")}
    expected: dict[str, tuple[int, ...]] = {
        "tok_emb.weight": (sized["vocab_size"], width),
        "pos_emb": (1, sized["block_size"], width),
        "ln_f.weight": (width,),
        "ln_f.bias": (width,),
        "head.weight": (sized["vocab_size"], width),
    }
    layers = max(1, sized["n_layer"])
    expected |= {f"blocks.{layer}.{name}": shape for layer in range(layers) for name, shape in block.items()}
    require_complete(weights, expected, "GPT")


def _settled(config: ConvertConfig, settings: Settings, found: Mapping[str, int]) -> dict[str, Any]:
    """Heads, classes and start code, from the options and the configuration; `found` are the sizes of the weights."""
    stated = {
        "num_heads": settings.network.get("n_head"),
        "num_classes": settings.num_classes,
        "start_code": settings.start_code,
    }
    options = {name: getattr(config, name) for name in stated}
    settled = {name: options[name] if value is None else value for name, value in stated.items()}
    problems = [
        Problem(f"config: {settings.prefix}{name}", f"is {settings.network[name]}, but the weights have {value}")
        for name, value in found.items()
        if settings.network.get(name, value) != value
    ]
    problems += [
        Problem(name, f"received {option}, but the configuration has {stated[name]} ({KEYS[name]}); leave it out")
        for name, option in options.items()
        if option not in (None, settled[name])
    ]
    problems += [
        Problem(name, f"the weights do not state it; give it, or a --config with {KEYS[name]}")
        for name in ("num_heads", "num_classes")
        if settled[name] is None
    ]
    settled["start_code"] = settled["start_code"] or 0
    if problems := problems or _misfits(settled, found):
        raise ConfigError(problems)
    return settled


def _misfits(settled: Mapping[str, Any], found: Mapping[str, int]) -> list[Problem]:
    width, vocab = found["n_embd"], found["vocab_size"]
    checks = {
        "num_heads": (width % settled["num_heads"] == 0, f"must divide the width of the prior, {width}"),
        "num_classes": (settled["num_classes"] <= vocab, f"class c is token c, and the prior has {vocab} tokens"),
        "start_code": (settled["start_code"] < vocab, f"must be one of the {vocab} tokens of the prior"),
    }
    return [
        Problem(name, f"received {settled[name]}; {allowed}") for name, (fits, allowed) in checks.items() if not fits
    ]
