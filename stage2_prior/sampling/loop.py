"""Sampling codes from a prior: read the prompt, then decode one, guide, filter and pick for each position in turn.

Shape letters: B images, P prompt length, L codes of an image, K codebook size.
"""

import inspect
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from configs.randomness import exponential
from stage2_prior.sampling.attention import attends_plainly, decoding
from stage2_prior.sampling.cache import PreallocatedCache
from stage2_prior.sampling.captured_steps import CapturedSteps
from stage2_prior.sampling.options import SamplingOptions
from stage2_prior.sampling.prior_state import state_of
from stage2_prior.sampling.traced_decoding import Decode, trace_decoding

# Positions of a window: attention that cannot stop where a sequence does reads at most this many too many.
BUCKET = 64

# Random numbers made at once, where there is no step to capture: a call for a few would cost more than they do.
NUMBERS_AT_ONCE = 2**16

OnStep = Callable[[int, Tensor], None]


def sample_codes(
    prior: PreTrainedModel,
    prompts: Tensor,
    null_prompts: Tensor,
    seeds: Tensor,
    length: int,
    num_codes: int,
    options: SamplingOptions,
    on_step: OnStep | None = None,
) -> Tensor:
    """Samples the codes of a batch of images; see [`CodeSampler`].

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
    batch_size, prompt_length = prompts.shape
    sampler = CodeSampler(prior, batch_size, prompt_length, length, num_codes, options)
    return sampler.sample(prompts, null_prompts, seeds, on_step)


class CodeSampler:
    """Samples batch after batch, in the same memory and with the same recorded steps; smaller ones are filled up.

    On CUDA forward, guidance, filter and pick of a position are one CUDA graph, which serves all positions if Triton
    knows the prior's attention, and else as many as fill a window; on a CPU the forward is traced. All are recorded at
    first use; `serves` tells whether they still hold.

    The random number of an image at a position depends only on (its seed, position, code), so an image does not
    depend on the batch it is sampled in. Nothing waits for the device: what is chosen stays there.

    With guidance the unconditional rows follow the conditional ones in one doubled batch, at the positions that are
    guided; where guidance sets in later, they first read all codes so far at once. Numbers are those of the prior's own
    dtype, also where autocast is on.

    Args:
        prior: causal language model.
        batch_size: of the largest batch.
        prompt_length: P.
        length: L.
        num_codes: K; only tokens below it are ever chosen.
        options: how codes are chosen.
        compiled: whether torch.compile makes the step; it then has the same shapes for many positions.

    Raises:
        ValueError: the step of such a model cannot be compiled.
    """

    def __init__(
        self,
        prior: PreTrainedModel,
        batch_size: int,
        prompt_length: int,
        length: int,
        num_codes: int,
        options: SamplingOptions,
        compiled: bool = False,
    ):
        if compiled and not can_be_recorded(prior):
            raise ValueError(f"compiled: a {prior.config.model_type} like this one has no step that can be compiled")
        self.prior, self.options, self.compiled = prior, options, compiled
        self.prior_state = state_of(prior)
        self.prompt_length, self.length, self.num_codes = prompt_length, length, num_codes
        scales = options.scales(length)
        guided = [position for position, scale in enumerate(scales) if scale != 1.0]
        self.guided = range(guided[0], guided[-1] + 1) if guided else range(0)
        device = prior.device
        self.largest_batch = batch_size
        if device.type == "cpu" and not guided:
            batch_size = max(2, batch_size)  # products of one row take longer: they are spread over threads
        self.batch_size = batch_size
        self.scales = torch.tensor(scales, device=device)
        # the last code is chosen, but not read any more
        self.cache = PreallocatedCache(prior, batch_size * (2 if guided else 1), prompt_length + length - 1)
        self.seeds = torch.zeros(batch_size, dtype=torch.int64, device=device)
        # with guidance, those with the unconditional prompts follow
        rows = self.cache.num_rows
        self.tokens = torch.zeros(rows, prompt_length + length, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # of the code to be chosen
        self.code_numbers = torch.arange(num_codes, device=device)
        self.races: tuple[range, Tensor] | None = None  # positions, and their random numbers
        self.captured: CapturedSteps | None = None
        if compiled or (device.type == "cuda" and can_be_recorded(prior)):
            self.captured = CapturedSteps(self.position, compiled, captures=device.type == "cuda")
        self.exact = self.captured is not None and device.type == "cuda" and attends_plainly(prior, forward)
        self.traces = device.type == "cpu" and can_be_recorded(prior)
        self.traced: dict[int, Decode | None] = {}

    def serves(self, prior: PreTrainedModel, batch_size: int, options: SamplingOptions, compiled: bool) -> bool:
        """Whether it samples such batches, and the prior is still what it was when its steps were recorded."""
        asked = (self.largest_batch, self.options, self.compiled) == (batch_size, options, compiled)
        return asked and self.prior is prior and self.prior_state == state_of(prior)

    @torch.inference_mode()
    def sample(self, prompts: Tensor, null_prompts: Tensor, seeds: Tensor, on_step: OnStep | None = None) -> Tensor:
        """Codes int64 `(B, L)` of up to `batch_size` images; see [`sample_codes`]."""
        count = len(prompts)
        fill = torch.arange(self.batch_size, device=prompts.device).clamp(max=count - 1)
        both = [prompts[fill], null_prompts[fill]] if self.guided else [prompts[fill]]
        self.tokens[:, : self.prompt_length] = torch.cat(both)
        self.seeds.copy_(seeds[fill])
        self.races = None
        self.position.zero_()
        codes = self.tokens[:, self.prompt_length :]
        with torch.autocast(prompts.device.type, enabled=False):
            self.read(slice(0, self.batch_size), self.prompt_length - 1)
            for position in range(self.length):
                if position == self.guided.start:
                    self.read(slice(self.batch_size, len(self.tokens)), self.prompt_length + position - 1)
                self.step(2 if position in self.guided else 1, position)
                if on_step is not None:
                    on_step(position, codes[:count, position])
        return codes[:count].clone()

    def read(self, rows: slice, stop: int) -> None:
        """Lets rows read their tokens up to `stop`, the first that they read."""
        if stop > 0 and rows.stop > rows.start:
            forward(self.prior, self.tokens[rows, :stop], self.cache.open(rows, 0, stop))

    def step(self, copies: int, position: int) -> None:
        """Reads the last token of `copies` rows for each image, 2 where it is guided, and chooses the next."""
        if self.captured is None:
            return self.choose(self.decode_one(copies, position), self.race(position))
        if not self.cache.is_allocated:
            forward(self.prior, self.tokens[:1, :1], self.cache.open(slice(0, 1), 0, 1))
        window = self.cache.length
        if not self.exact:
            window = min(-(-(self.prompt_length + position) // BUCKET) * BUCKET, window)
        with decoding(self.prior) if self.exact else nullcontext():
            self.captured.run(self.captured_step, copies, window)

    def decode_one(self, copies: int, position: int) -> Tensor:
        """Logits `(copies · B, V)` of the code at a position, from the token before it."""
        last = self.prompt_length + position - 1
        rows = slice(0, copies * self.batch_size)
        if self.traces and copies not in self.traced:
            self.traced[copies] = trace_decoding(self.prior, forward, self.cache, rows, last)
        traced = self.traced.get(copies)
        if traced is not None:
            return traced(self.last_tokens(copies), self.position + (self.prompt_length - 1))
        return forward(self.prior, self.last_tokens(copies), self.cache.open(rows, last, last + 1))

    def captured_step(self, copies: int, window: int) -> None:
        """The same and all that follows from it, without a number of the host in it: every position until the window
        is full takes the same operations."""
        last = self.position + (self.prompt_length - 1)
        cache = self.cache.open_window(slice(0, copies * self.batch_size), last, window)
        seen = last[None, None, None] if self.exact else cache.mask
        logits = forward(self.prior, self.last_tokens(copies), cache, position_ids=last[None], attention_mask=seen)
        self.choose(logits, exponential(self.seeds[:, None], self.position, self.code_numbers))

    def choose(self, logits: Tensor, race: Tensor) -> None:
        """Writes down the code of a position, and goes on to the next."""
        logits = logits[:, : self.num_codes]
        if len(logits) > self.batch_size:
            logits = guide(logits, self.scales[self.position])
        chosen = pick(logits, race, self.options).repeat(len(self.tokens) // self.batch_size)
        self.tokens.index_copy_(1, self.position + self.prompt_length, chosen[:, None])
        self.position += 1

    def last_tokens(self, copies: int) -> Tensor:
        """int64 `(copies · B, 1)`."""
        return self.tokens[: copies * self.batch_size].index_select(1, self.position + (self.prompt_length - 1))

    def race(self, position: int) -> Tensor:
        """Exponential random numbers `(B, K)` of a position; for small batches those of many positions are made at
        once."""
        if self.races is None or position not in self.races[0]:
            block = max(1, NUMBERS_AT_ONCE // (self.batch_size * self.num_codes))
            positions = range(position, min(position + block, self.length))
            numbers = torch.tensor(positions, device=self.seeds.device)[:, None, None]
            self.races = positions, exponential(self.seeds[:, None], numbers, self.code_numbers)
        positions, races = self.races
        return races[position - positions.start]


def forward(prior: PreTrainedModel, tokens: Tensor, cache: PreallocatedCache, **inputs: Tensor) -> Tensor:
    """float32 logits `(rows, V)` of the token that follows int64 `tokens` `(rows, n)`; their keys and values are
    written where the cache is open."""
    out = prior(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1, **inputs)
    return out.logits[:, -1].float()


def can_be_recorded(prior: PreTrainedModel) -> bool:
    """Whether a model can be told what it sees and where it is, and need not derive it from its cache; and has all of
    its weights here."""
    told = {"attention_mask", "position_ids"} <= inspect.signature(prior.forward).parameters.keys()
    return told and not any(isinstance(weight, DTensor) for weight in prior.parameters())


def guide(logits: Tensor, scale: Tensor | float) -> Tensor:
    """u + s·(c - u), from logits `(2B, K)` whose second half is unconditional."""
    conditional, unconditional = logits.chunk(2)
    return unconditional + scale * (conditional - unconditional)


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
        probabilities = logits.softmax(-1)
        logits = logits.where(probabilities >= options.min_p * probabilities.amax(-1, keepdim=True), -torch.inf)
    return logits


def pick(logits: Tensor, race: Tensor, options: SamplingOptions) -> Tensor:
    """Draws one code `(B,)` from logits `(B, K)` by an exponential race: argmax of p / e, e ~ Exp(1), draws from p."""
    if options.temperature == 0:
        return logits.argmax(-1)
    return (filter_logits(logits, options).softmax(-1) / race).argmax(-1)
