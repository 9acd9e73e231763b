"""Sampling codes from a prior: prefill, then guide, filter, pick and decode one code at a time.

Shape letters: B images, P prompt length, L codes of an image, K codebook size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from stage2_prior.randomness import exponential


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How codes are chosen.

    Args:
        guidance_scale: s in u + s·(c - u) on the logits; 1.0 is no guidance.
        temperature: divides the logits; 0.0 is greedy.
        top_k: only the k most likely codes; 0 is all.
        top_p: only the most likely codes whose probabilities sum to p.
        min_p: only codes at least min_p times as likely as the most likely one.

    Raises:
        ValueError: a value is out of range.

    Source: guidance, Ho and Salimans 2022, "Classifier-free diffusion guidance", on the logits as in Chang et al. 2023,
    "Muse", section 2.7; top-p, Holtzman et al. 2020; min-p, Nguyen et al. 2024. The order is that of transformers.
    """

    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        ranges = {
            "guidance_scale": (lambda value: value >= 0, "a number from 0 up (1.0 is no guidance)"),
            "temperature": (lambda value: value >= 0, "a number from 0 up (0.0 is greedy)"),
            "top_k": (lambda value: value >= 0 and value % 1 == 0, "a whole number from 0 up (0 is all)"),
            "top_p": (lambda value: 0 < value <= 1, "a number above 0 and at most 1"),
            "min_p": (lambda value: 0 <= value <= 1, "a number from 0 to 1"),
        }
        for name, (holds, allowed) in ranges.items():
            value = getattr(self, name)
            if not isinstance(value, Real) or not math.isfinite(value) or not holds(value):
                raise ValueError(f"{name}: received {value!r}; allowed is {allowed}")
        object.__setattr__(self, "top_k", int(self.top_k))

    @property
    def guided(self) -> bool:
        """Whether unconditional rows are needed."""
        return self.guidance_scale != 1.0


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer in buffers of the final length; attention sees exactly what has been written."""

    def __init__(self, length: int):
        super().__init__()
        self.length = length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.buffers = [x.new_empty(*x.shape[:2], self.length, x.shape[3]) for x in (key_states, value_states)]
        self.keys, self.values = (buffer[:, :, :0] for buffer in self.buffers)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:stop] = states
        self.keys, self.values = (buffer[:, :, :stop] for buffer in self.buffers)
        return self.keys, self.values


def make_cache(prior: PreTrainedModel, length: int) -> Cache:
    """An empty cache for sequences of up to `length` tokens."""
    return Cache(layers=[PreallocatedLayer(length) for _ in range(prior.config.num_hidden_layers)])


@torch.inference_mode()
def sample_codes(
    prior: PreTrainedModel,
    prompts: Tensor,
    null_prompts: Tensor,
    seeds: Tensor,
    length: int,
    num_codes: int,
    options: SamplingOptions,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Samples the codes of a batch of images.

    The random number of an image at a position depends only on (its seed, position, code), so an image does not
    depend on the batch it is sampled in.

    Args:
        prior: causal language model.
        prompts: int64 `(B, P)`, the conditions.
        null_prompts: int64 `(B, P)`, the same without a condition; used with guidance only.
        seeds: int64 `(B,)`.
        length: L.
        num_codes: K; only tokens below it are ever chosen.
        options: how codes are chosen.
        on_step: called after each position with its index and the codes `(B,)` chosen there.

    Returns:
        int64 `(B, L)`.
    """
    rows = torch.cat([prompts, null_prompts]) if options.guided else prompts
    codes = torch.empty(len(prompts), length, dtype=torch.int64, device=prompts.device)
    cache = make_cache(prior, prompts.shape[1] + length)
    logits = forward(prior, rows, cache)
    for position in range(length):
        code = pick(guide(logits[:, :num_codes], options), seeds, position, options)
        codes[:, position] = code
        if on_step is not None:
            on_step(position, code)
        if position + 1 < length:
            logits = forward(prior, (code.repeat(2) if options.guided else code)[:, None], cache)
    return codes


def forward(prior: PreTrainedModel, tokens: Tensor, cache: Cache) -> Tensor:
    """float32 logits `(rows, V)` of the token that follows int64 `tokens` `(rows, n)`; their keys and values are added
    to the cache."""
    return prior(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()


def guide(logits: Tensor, options: SamplingOptions) -> Tensor:
    """u + s·(c - u), from logits `(2B, K)` whose second half is unconditional; unguided, the logits themselves."""
    if not options.guided:
        return logits
    conditional, unconditional = logits.chunk(2)
    return unconditional + options.guidance_scale * (conditional - unconditional)


def filter_logits(logits: Tensor, options: SamplingOptions) -> Tensor:
    """Temperature, top-k, top-p, min-p in this order; codes that are left out get -inf. Logits are `(B, K)`."""
    # the largest logit is moved to 0 first, so that the smallest temperature cannot overflow
    logits = (logits - logits.amax(-1, keepdim=True)) / options.temperature
    if 0 < options.top_k < logits.shape[1]:
        threshold = logits.topk(options.top_k).values[:, -1:]
        logits = logits.where(logits >= threshold, -torch.inf)
    if options.top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        # a code stays if those before it sum to less than p: the most likely one always does
        keep = probabilities.cumsum(-1) - probabilities < options.top_p
        logits = logits.where(torch.zeros_like(keep).scatter(1, order, keep), -torch.inf)
    if options.min_p > 0:
        logits = logits.where(
            logits.softmax(-1) >= options.min_p * logits.softmax(-1).amax(-1, keepdim=True), -torch.inf
        )
    return logits


def pick(logits: Tensor, seeds: Tensor, position: int, options: SamplingOptions) -> Tensor:
    """Draws one code `(B,)` from logits `(B, K)` by an exponential race: argmax of p / e, e ~ Exp(1), draws from p."""
    if options.temperature == 0:
        return logits.argmax(-1)
    probabilities = filter_logits(logits, options).softmax(-1)
    codes = torch.arange(logits.shape[1], device=logits.device)
    race = exponential(seeds[:, None], torch.full_like(codes, position), codes)
    return (probabilities / race).argmax(-1)
