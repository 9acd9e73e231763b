"""Sampling of codes from a prior: read the prompt; then predict, guide, filter and pick one code after another.

A *position* is the index of a code among the codes of an image. A *place* is the index of a token in the sequence that
the prior reads: the prompt of length P comes first, so the code at position i has place P + i.

Shape letters: B images, P prompt length, L codes of an image, K codebook size.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from configs.arguments import described, whole
from configs.randomness import exponential
from stage2_prior.sampling.arguments import OnStep, check_sampling
from stage2_prior.sampling.decoder import Decoder
from stage2_prior.sampling.decoders import make_decoder
from stage2_prior.sampling.guidance import Guidance
from stage2_prior.sampling.options import SamplingOptions

# Up to this many numbers, one table holds the noise of all positions. Larger batches compute it position by position.
LARGEST_TABLE = 2**22
# Numbers of the table that are computed at once, few enough for the processor's cache.
NUMBERS_AT_ONCE = 2**16


def sample_codes(
    prior: PreTrainedModel,
    prompts: Tensor,
    null_prompts: Tensor,
    seeds: Tensor,
    length: int,
    num_codes: int,
    options: SamplingOptions,
    on_step: OnStep | None = None,
    known: Tensor | None = None,
) -> Tensor:
    """Samples the codes of one batch of images with the fastest decoder that supports the prior; see `sample`.

    Args:
        prior: causal language model, in evaluation mode.
    """
    rows = len(prompts) * options.rows_per_image
    decoder = make_decoder(prior, rows, prompts.shape[1] + length - 1, num_codes)
    return sample(decoder, prompts, null_prompts, seeds, length, num_codes, options, on_step, known)


@torch.inference_mode()
def sample(
    decoder: Decoder,
    prompts: Tensor,
    null_prompts: Tensor,
    seeds: Tensor,
    length: int,
    num_codes: int,
    options: SamplingOptions,
    on_step: OnStep | None = None,
    known: Tensor | None = None,
) -> Tensor:
    """Samples the codes of one batch of images.

    With guidance by G groups of conditions, the batch has (1 + G)·B rows: B prompts, then the B null prompts of each
    group, which one forward reads together. Positions without guidance read only the prompts. If guidance starts later,
    the other rows first read all codes picked so far. The host never waits for the device inside the loop.

    Args:
        decoder: a decoder for B rows ((1 + G)·B with guidance) of P + L - 1 tokens.
        prompts: int64 `(B, P)`, the conditions.
        null_prompts: int64 `(G·B, P)`, group by group: prompts with null tokens in place of the group's conditions.
            They are only read with guidance. Usually G is 1, and all tokens are null tokens.
        seeds: int64 `(B,)`. The noise of an image at a position depends only on (its seed, position, code), so an
            image does not depend on the batch it is sampled in.
        length: L.
        num_codes: K; only tokens below K are picked.
        options: guidance, temperature and filters.
        on_step: see `OnStep`.
        known: int64 `(B, L)`, codes that are given; -1 where a code is sampled.

    Returns:
        int64 `(B, L)`.

    Raises:
        FloatingPointError: logits were NaN or infinite.
        ValueError: an argument has another type, shape or dtype, or is on another device.
    """
    length, num_codes = whole("length", length), whole("num_codes", num_codes)
    check_sampling(decoder, prompts, null_prompts, seeds, length, num_codes, options, on_step, known)
    batch_size, prompt_length = prompts.shape
    guide = Guidance(options, length, prompts.device)
    guided = guide.steps
    conditional, unconditional = slice(0, batch_size), slice(batch_size, batch_size * options.rows_per_image)
    tokens = torch.cat([prompts, null_prompts] if guided else [prompts])
    tokens = torch.cat([tokens, tokens.new_zeros(len(tokens), length)], 1)
    noise_at = noise(seeds, length, num_codes)
    # Sum of the largest logits of all positions: a NaN or an infinity stays in the sum.
    total = torch.zeros(batch_size, device=prompts.device)

    with torch.autocast(prompts.device.type, enabled=False):
        if prompt_length > 1:
            decoder.read(conditional, tokens[conditional, : prompt_length - 1], 0)
        for position in range(length):
            place = prompt_length + position
            if position == guided.start and place > 1 and guided:
                decoder.read(unconditional, tokens[unconditional, : place - 1], 0)
            rows = slice(0, len(tokens)) if position in guided else conditional
            logits = decoder.read(rows, tokens[rows, place - 1 : place], place - 1)[:, :num_codes]
            if position in guided:
                logits = guide(logits, position)
            total += logits.amax(-1)
            codes = pick(logits, noise_at(position), options)
            if known is not None:
                codes = codes.where(known[:, position] < 0, known[:, position])
            tokens[:, place] = codes.repeat(len(tokens) // batch_size)
            if on_step is not None:
                on_step(position, codes)

    if broken := int((~total.isfinite()).sum()):
        raise FloatingPointError(
            f"the logits of {broken} of {batch_size} images were NaN or infinite; check the prior's weights, and use a "
            f"smaller guidance_scale (received {described(options.guidance_scale)}) or another dtype"
        )
    return tokens[conditional, prompt_length:].clone()


def filter_logits(logits: Tensor, options: SamplingOptions) -> Tensor:
    """Applies temperature, top-k, top-p and min-p, in this order, to logits `(B, K)`. Excluded codes get -inf."""
    # subtract the largest logit first, so that a division by a tiny temperature cannot overflow
    logits = (logits - logits.amax(-1, keepdim=True)) / options.temperature
    if 0 < options.top_k < logits.shape[1]:
        threshold = logits.topk(options.top_k).values[:, -1:]
        logits = logits.where(logits >= threshold, -torch.inf)
    if options.top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        # a code stays if the more likely codes sum to less than p, so the most likely code always stays
        keep = probabilities.cumsum(-1) - probabilities < options.top_p
        logits = logits.where(torch.zeros_like(keep).scatter(1, order, keep), -torch.inf)
    if options.min_p > 0:
        probabilities = logits.softmax(-1)
        logits = logits.where(probabilities >= options.min_p * probabilities.amax(-1, keepdim=True), -torch.inf)
    return logits


def pick(logits: Tensor, noise: Tensor, options: SamplingOptions) -> Tensor:
    """Draws one code int64 `(B,)` from the softmax p of logits `(B, K)`; temperature 0 takes the most likely code.

    With independent noise e ~ Exp(1), `(B, K)`, the argmax of p / e has the distribution p.
    """
    if options.temperature == 0:
        return logits.argmax(-1)
    return (filter_logits(logits, options).softmax(-1) / noise).argmax(-1)


def noise(seeds: Tensor, length: int, num_codes: int) -> Callable[[int], Tensor]:
    """Exponential noise for a batch, as a function that maps a position to float32 `(B, K)`.

    Small batches compute one table for all positions, because one call is faster than one call per position.
    """
    codes = torch.arange(num_codes, device=seeds.device)
    positions = torch.arange(length, device=seeds.device)[:, None, None]
    each = len(seeds) * num_codes
    if each * length > LARGEST_TABLE:
        return lambda position: exponential(seeds[:, None], positions[position], codes)
    blocks = positions.split(max(1, NUMBERS_AT_ONCE // each))
    table = torch.cat([exponential(seeds[:, None], block, codes) for block in blocks])
    return lambda position: table[position]
