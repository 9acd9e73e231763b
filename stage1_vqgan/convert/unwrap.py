"""Finds the tokenizer in a checkpoint: inside entries, lists, wrappers of modules, and beside other models."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from configs.problems import listed
from stage1_vqgan.convert.files import read_content, refuse, require_tensors

# Entries of a checkpoint that may hold the weights, the preferred ones first. A moving average is what its authors use.
ENTRIES = (
    *("ema", "ema_state_dict", "model_ema", "state_dict", "model", "model_state_dict"),
    *("generator", "vqgan", "vqvae", "vqmodel", "tokenizer", "module", "params"),
)
DEEPEST, MOST = 4, 8  # entries inside entries, and places of a list that may hold the weights
# Modules that libraries put around a module: DistributedDataParallel, torch.compile, FSDP.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
COUNTER = "n_averaged"  # beside the weights of an AveragedModel of torch
# A tensor that every tokenizer of these code bases has. What stands before its name is the prefix of the tokenizer.
MARK = "encoder.conv_in.weight"
# Prefix of the tokenizer in the checkpoint of a transformer or diffusion model, which may hold a second one.
FIRST_STAGE = "first_stage_model."

# Names of tensors, and what has them: nothing that this code base or a VQGANModel can be.
FOREIGN = {
    r".*\.(conv_y|conv_b|norm_layer)\.": (
        "this is a MoVQ: the norms of its decoder depend on the code at each position, and those of a VQGANModel cannot"
    ),
    r"encoder\.down_blocks[._]": "these are names of diffusers: give its folder to --from diffusers",
}


def read_tokenizer(path: Path, foreign: Mapping[str, str] | None = None) -> tuple[dict[str, Tensor], list[str]]:
    """Reads the tensors of the tokenizer in a checkpoint, in their stored dtypes.

    Args:
        path: the file, see `read_content`.
        foreign: {regular expression for the start of a name: why a checkpoint with such a name is refused}, in addition
            to `FOREIGN`.

    Returns:
        The tensors by their names in the tokenizer, and lines for the user: what was chosen or left out.

    Raises:
        ConfigError: the file cannot be read, holds no state dict or several tokenizers, or those of other kinds.
    """
    state, notes = read_state(path, MARK, "tokenizer")
    tensors, outside = _inside(state, path)
    notes += [outside] if outside else []
    for pattern, words in (FOREIGN | dict(foreign or {})).items():
        if found := next((name for name in tensors if re.match(pattern, name)), None):
            raise refuse("checkpoint", path, f"it has {found}: {words}")
    if _is_continuous(tensors):
        raise refuse("checkpoint", path, "this is an AutoencoderKL: its latents are continuous, it has no codes")
    return tensors, notes


def read_state(path: Path, mark: str, kind: str) -> tuple[dict[str, Tensor], list[str]]:
    """Reads all tensors of a state dict in a checkpoint, in their stored dtypes.

    Args:
        path: the file, see `read_content`.
        mark: name of a tensor of the wanted model; the first state dict with such a tensor is chosen.
        kind: the kind of this model, for the lines.

    Returns:
        The tensors by their names without wrappers, those of other models too, and lines for the user: what was chosen.

    Raises:
        ConfigError: the file cannot be read, or holds no state dict.
    """
    content = read_content(path)
    states = list(_states(content))
    if not states:
        raise refuse("checkpoint", path, f"it holds {type(content).__name__}; it must hold a state dict")
    held = [where for where, state in states if prefixes(map(_unwrapped, map(str, state)), mark)]
    where, state = next((entry for entry in states if entry[0] in held), states[0])
    notes = [f"read from {where}; these hold a {kind} too: {listed(held[1:])}"] if held[1:] else []
    stored = require_tensors(state, path)
    names = {_unwrapped(name): name for name in stored if name != COUNTER}
    if len(names) < len(stored.keys() - {COUNTER}):
        raise refuse("checkpoint", path, f"it holds every weight twice, with and without {listed(sorted(WRAPPERS))}")
    return {short: stored[name] for short, name in names.items()}, notes


def _states(content: Any, where: str = "", seen: tuple[int, ...] = ()) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Every mapping that may be the state dict, with the path of its entry; the preferred ones first."""
    if len(seen) > DEEPEST or id(content) in seen:  # a container may hold itself
        return
    inner: list[tuple[Any, Any]] = []
    if isinstance(content, Mapping):
        inner = [(name, content[name]) for name in ENTRIES if name in content]
    elif isinstance(content, list | tuple):
        inner = list(enumerate(content[:MOST]))
    for name, value in inner:
        yield from _states(value, f"{where}.{name}".lstrip("."), (*seen, id(content)))
    if isinstance(content, Mapping):
        yield where or "the file itself", content


def _inside(state: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of the tokenizer without its prefix, and a line about those of other models."""
    found = prefixes(state, MARK)
    chosen = "" if "" in found else next((prefix for prefix in found if prefix.endswith(FIRST_STAGE)), None)
    if chosen is None and len(found) > 1:
        raise refuse("checkpoint", path, f"it holds {len(found)} tokenizers, {listed(found)}; save one of them")
    chosen = chosen if chosen is not None else (found or [""])[0]
    inside = {name.removeprefix(chosen): value for name, value in state.items() if name.startswith(chosen)}
    others = len(state) - len(inside)
    return inside, f"the tokenizer is {chosen}*; {others} tensors are of other models" if others else ""


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def prefixes(names: Iterable[str], mark: str) -> list[str]:
    """What stands before the name of a tensor, in all names that end with it."""
    return [name.removesuffix(mark) for name in names if f".{name}".endswith(f".{mark}")]


def _is_continuous(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the encoder computes means and variances, which are twice as many channels as the decoder takes."""
    pair = [tensors.get(name) for name in ("quant_conv.weight", "post_quant_conv.weight")]
    if any(weight is None or weight.ndim < 2 for weight in pair) or any(
        name.startswith("quantize.") for name in tensors
    ):
        return False
    return len(pair[0]) == 2 * pair[1].shape[1]  # type: ignore[arg-type, union-attr]
