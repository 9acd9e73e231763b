"""Checks of recorded steps: which priors can be recorded, whether a recording is correct, when it is out of date.

A recorded step repeats the operations of one forward of one token, with the place of the token as a tensor. It is
correct only if the model performs the same operations at every place.
"""

import inspect
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from stage2_prior.sampling.decoder import Decoder, EagerDecoder

# Number of rows in the comparison: recorded steps must work for several rows.
ROWS = 3

# Largest difference of logits, as a multiple of their standard deviation, that rounding explains.
TOLERANCE = {torch.float32: 1e-3}
LOW_PRECISION_TOLERANCE = 5e-2


def why_not_recordable(prior: PreTrainedModel, length: int) -> str | None:
    """The reason why a recorded step of this model would be wrong at some place of a sequence; None if it is right.

    A model can be recorded if its forward takes a mask and position ids, if all layers attend to every earlier token,
    and if its rotary frequencies do not depend on the length of the sequence.
    """
    if not {"attention_mask", "position_ids"} <= inspect.signature(type(prior).forward).parameters.keys():
        return "its forward takes no attention_mask or no position_ids"
    if any(isinstance(weight, DTensor) for weight in prior.parameters()):
        return "its weights are sharded"
    config = prior.config
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    kinds = set(getattr(config, "layer_types", None) or (["sliding_attention"] if window else ["full_attention"]))
    if "sliding_attention" in kinds and window is not None and window >= length:
        kinds.remove("sliding_attention")  # the window covers the whole sequence
    if kinds - {"full_attention"}:
        return f"it has layers without full attention: {', '.join(sorted(kinds - {'full_attention'}))}"
    if rope_types(getattr(config, "rope_parameters", None)) & {"dynamic", "longrope"}:
        return "its rotary frequencies change with the length of the sequence"
    return None


def rope_types(parameters: Any) -> set[str]:
    """Every `rope_type` in a model's `rope_parameters`, which some models nest by layer type."""
    if not isinstance(parameters, dict):
        return set()
    nested = set().union(*(rope_types(value) for value in parameters.values()))
    return nested | {str(parameters["rope_type"])} if "rope_type" in parameters else nested


@torch.inference_mode()
def disagreement(prior: PreTrainedModel, recorded: Decoder, length: int, num_codes: int) -> str | None:
    """Compares a recorded decoder of `ROWS` rows with the eager one; returns the first difference, or None.

    Both read the same random codes. The logits are compared at the first places, in the middle, around multiples of 64,
    where the graph decoder changes to the next graph, and at the last place, where every attention window hides tokens
    and every cached key is read.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(num_codes, (ROWS, length), generator=generator).to(prior.device)
    eager = EagerDecoder(prior, ROWS, length)
    everyone = slice(0, ROWS)
    for decoder in (eager, recorded):
        decoder.read(everyone, tokens, 0)
    candidates = {1, 2, 3, length // 4, length // 2, 63, 64, 65, length - 2, length - 1}
    for place in sorted(place for place in candidates if 0 < place < length):
        for rows in (slice(0, 1), everyone):
            last = tokens[rows, place : place + 1]
            expected, found = (decoder.read(rows, last, place).clone() for decoder in (eager, recorded))
            largest = float((found - expected).abs().max() / expected.std())
            if not largest <= TOLERANCE.get(prior.dtype, LOW_PRECISION_TOLERANCE):
                return f"at place {place} its logits differ from the model's by {largest:.1g} standard deviations"
    return None


def state_of(prior: PreTrainedModel) -> tuple[Any, ...]:
    """The state of a prior on which a recording depends. The recording is valid while this state is unchanged.

    The state contains the memory addresses of all tensors, and the settings, class, hooks and replaced forward of every
    module. It does not contain the values of weights and buffers. A recording reads them from the model's memory, or
    copies them again when a batch begins.
    """
    tensors = tuple(
        (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        for tensor in (*prior.parameters(), *prior.buffers())
    )
    modules = tuple(
        (type(module), type(module).forward, *((name, _comparable(value)) for name, value in vars(module).items()))
        for module in prior.modules()
    )
    return tensors, modules, _comparable(vars(prior.config))


def _comparable(value: Any) -> Any:
    """Makes settings comparable: plain values by value, functions and modules by identity, other objects by type."""
    if isinstance(value, dict):
        return tuple((key, _comparable(item)) for key, item in value.items())
    if isinstance(value, list | tuple | set):
        return tuple(map(_comparable, value))
    if value is None or isinstance(value, bool | int | float | str | torch.dtype) or callable(value):
        return value
    return type(value)
