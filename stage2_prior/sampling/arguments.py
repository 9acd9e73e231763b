"""Checks the arguments of the sampling loop: of dtypes, shapes and devices, without waiting for a GPU."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from configs.arguments import described, instance, whole
from stage2_prior.sampling.decoder import Decoder, EagerDecoder
from stage2_prior.sampling.options import SamplingOptions

# Called after each step with the position and the codes int64 `(B,)` that were picked there.
OnStep = Callable[[int, Tensor], None]


def check_sampling(
    decoder: Decoder,
    prompts: Tensor,
    null_prompts: Tensor,
    seeds: Tensor,
    length: int,
    num_codes: int,
    options: SamplingOptions,
    on_step: OnStep | None,
    known: Tensor | None = None,
) -> None:
    """Checks the arguments of `sample`, without waiting for a GPU: it does not read the tokens themselves."""
    check_request(prompts, null_prompts, seeds, length, options, on_step, known)
    if isinstance(decoder, EagerDecoder):
        whole("length", length, most=decoder.length + 1 - prompts.shape[1])
        whole("num_codes", num_codes, most=decoder.prior.config.vocab_size)
        rows = len(prompts) * (options.rows_per_image if options.guided_positions(length) else 1)
        if rows > decoder.num_rows:
            needed = f"needs {rows} rows, but the decoder has {decoder.num_rows}"
            raise ValueError(f"prompts: received {len(prompts)}; this {needed}")


def check_request(
    prompts: Tensor,
    null_prompts: Tensor,
    seeds: Tensor,
    length: int,
    options: SamplingOptions,
    on_step: OnStep | None,
    known: Tensor | None,
) -> None:
    """Checks what a causal and a masked prior are asked for in the same words."""
    require_int64("prompts", prompts, (None, None))
    instance("options", options, SamplingOptions, "SamplingOptions")
    require_int64("null_prompts", null_prompts, (len(options.group_scales) * len(prompts), prompts.shape[1]))
    if (scales := options.table.shape[1]) not in (1, len(prompts)):
        raise ValueError(f"options: received guidance scales for {scales} images; prompts has {len(prompts)}")
    require_int64("seeds", seeds, (len(prompts),))
    others = {"null_prompts": null_prompts, "seeds": seeds}
    if known is not None:
        require_int64("known", known, (len(prompts), length))
        others["known"] = known
    for name, tensor in others.items():
        if tensor.device != prompts.device:
            raise ValueError(f"{name}: received a tensor on {tensor.device}; prompts are on {prompts.device}")
    require_callback("on_step", on_step)


def require_int64(name: str, value: Any, shape: tuple[int | None, ...]) -> None:
    """Refuses all but a dense int64 tensor of a shape; None stands for any size from 1 up."""
    if (
        isinstance(value, Tensor)
        and (value.dtype, value.layout) == (torch.int64, torch.strided)
        and value.ndim == len(shape)
        and all(size >= 1 and wanted in (None, size) for size, wanted in zip(value.shape, shape, strict=True))
    ):
        return
    allowed = ", ".join("at least 1" if size is None else str(size) for size in shape)
    raise ValueError(f"{name}: received {described(value)}; needs an int64 tensor of shape ({allowed})")


def require_callback(name: str, callback: Any, takes: str = "a position and codes") -> None:
    """Refuses what cannot be called with two arguments; `takes` states them in words."""
    if callback is None:
        return
    try:
        if not callable(callback):
            raise TypeError("it cannot be called")
        inspect.signature(callback).bind(0, None)
    except TypeError as error:
        raise ValueError(f"{name}: received {described(callback)}; must be a function of {takes}: {error}") from error
    except ValueError as error:  # some functions written in C have no signature
        if isinstance(callback, type):
            raise ValueError(f"{name}: received {described(callback)}; must be a function") from error
