"""Sampling of codes from a masked prior: predict all hidden codes at once, keep the surest ones, and repeat.

Shape letters: B images, P prompt length, L codes of an image, K codebook size, T steps, G guidance groups, n hidden
codes of the batch.

Source: Chang et al. 2022, "MaskGIT: masked generative image transformer", section 3.2, with the order of its code:
confidence and annealed Gumbel noise. Our noise is a hash of the image's seed, so an image does not depend on its batch.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from configs.arguments import choice, described, instance, number, whole
from configs.randomness import exponential
from stage1_vqgan import Grids
from stage2_prior.sampling.arguments import OnStep, check_request
from stage2_prior.sampling.guidance import Guidance
from stage2_prior.sampling.halton import halton_ranks
from stage2_prior.sampling.loop import NUMBERS_AT_ONCE, pick
from stage2_prior.sampling.options import SamplingOptions

UnmaskingOrder = Literal["confidence", "halton"]
DEFAULT_STEPS, DEFAULT_ORDER_TEMPERATURE = 12, 4.5


@dataclass(frozen=True, kw_only=True)
class UnmaskingOptions:
    """The order in which a masked prior chooses the codes of an image.

    Args:
        num_steps: T, forwards of the prior. After step t, cos(π/2 · t/T) of the codes are still hidden. None is 12, or
            one for each code if there are fewer codes.
        order: "confidence" first keeps the codes of which the prior is surest; "halton" takes positions that lie far
            from each other, the same for all images.
        order_temperature: weight of the Gumbel noise that is added to the confidence, the logarithm of a code's
            probability. It falls linearly to 0 at the last step. More noise makes images more varied and less typical.
            None is 4.5; the order "halton" has none.

    Raises:
        ValueError: a value is out of range.
    """

    num_steps: int | None = None
    order: UnmaskingOrder = "confidence"
    order_temperature: float | None = None

    def __post_init__(self) -> None:
        if self.num_steps is not None:
            object.__setattr__(self, "num_steps", whole("num_steps", self.num_steps))
        choice("order", self.order, get_args(UnmaskingOrder))
        if self.order_temperature is None:
            return
        if self.order == "halton":
            received = described(self.order_temperature)
            raise ValueError(f"order_temperature: received {received}; the order 'halton' has no noise; leave it out")
        allowed = "a number from 0 up to 1e30 (0.0 is no noise)"
        value = number("order_temperature", self.order_temperature, lambda value: 0 <= value <= 1e30, allowed)
        object.__setattr__(self, "order_temperature", value)

    def steps(self, length: int) -> int:
        """T for images of this many codes.

        Raises:
            ValueError: there are more steps than codes.
        """
        return min(DEFAULT_STEPS, length) if self.num_steps is None else whole("num_steps", self.num_steps, most=length)

    def weights(self, steps: int) -> list[float]:
        """The weight of the order's noise in each of T steps."""
        first = DEFAULT_ORDER_TEMPERATURE if self.order_temperature is None else self.order_temperature
        return [first * (1 - (step + 1) / steps) for step in range(steps)]


@torch.inference_mode()
def unmask(
    prior: PreTrainedModel,
    prompts: Tensor,
    null_prompts: Tensor,
    seeds: Tensor,
    length: int,
    num_codes: int,
    options: SamplingOptions,
    unmasking: UnmaskingOptions = UnmaskingOptions(),
    on_step: OnStep | None = None,
    known: Tensor | None = None,
    *,
    mask_token: int,
    grids: Grids | None = None,
) -> Tensor:
    """Samples the codes of one batch of images with a masked prior.

    A step is one forward of all B sequences, or of (1 + G)·B with guidance. There are T steps, or as many as the image
    with most hidden codes has of them, if these are fewer. Guidance grows over the steps as it does over the codes of a
    causal prior: t in `SamplingOptions` is the fraction of the steps before the present one.

    Args:
        prior: masked language model, in evaluation mode.
        prompts: int64 `(B, P)`, the conditions.
        null_prompts: int64 `(G·B, P)`, prompts without a condition; they are only read with guidance.
        seeds: int64 `(B,)`. The noise of an image depends only on (its seed, step, position, code).
        length: L.
        num_codes: K; only tokens below K are chosen.
        options: guidance, temperature and filters. At temperature 0 the order has no noise either.
        unmasking: number of steps and order.
        on_step: called after each step with its index and the codes int64 `(B, L)`, -1 where one is still hidden.
        known: int64 `(B, L)`, codes that stay as they are, and -1 where one is to be found. None hides all.
        mask_token: the token in place of a hidden code.
        grids: the code grids, for the order "halton"; None is one square grid.

    Returns:
        int64 `(B, L)`.

    Raises:
        FloatingPointError: logits were NaN or infinite.
        ValueError: an argument has another type, shape, dtype or range, or is on another device.
    """
    length, num_codes = whole("length", length), whole("num_codes", num_codes, most=prior.config.vocab_size)
    check_request(prompts, null_prompts, seeds, length, options, on_step, known)
    instance("unmasking", unmasking, UnmaskingOptions, "UnmaskingOptions")
    if known is not None:
        check_known(known, num_codes)
    steps, count = unmasking.steps(length), len(prompts)
    guide = Guidance(options, steps, prompts.device)
    codes = seeds.new_full((count, length), -1) if known is None else known.clone()
    hidden_after = torch.tensor(
        [schedule(steps, number) for number in (codes < 0).sum(1).tolist()], device=codes.device
    )
    weights = [0.0] * steps if options.temperature == 0 else unmasking.weights(steps)
    ranks = None
    if unmasking.order == "halton":
        ranks = torch.tensor(halton_ranks(grids or square(length)), device=codes.device)
    # Sum of the largest logits of all hidden codes: a NaN or an infinity stays in the sum.
    total = torch.zeros(count, device=codes.device)
    for step in range(steps):
        hidden = codes < 0
        rows, places = hidden.nonzero(as_tuple=True)
        if not len(rows):
            break
        conditions = torch.cat([prompts, null_prompts]) if step in guide.steps else prompts
        logits = predict(prior, conditions, codes.where(~hidden, mask_token), rows, places, num_codes)
        if step in guide.steps:
            logits = guide(logits, step, rows)
        total.index_add_(0, rows, logits.amax(-1))
        found, confidence = choose(logits, seeds[rows], step * length + places, options)
        if ranks is not None:
            urgency = -ranks[places].float()
        else:
            urgency = confidence + order_noise(seeds[rows], step * length + places, num_codes, weights[step])
        keep = most_urgent(urgency, rows, places, hidden, hidden.sum(1) - hidden_after[:, step])
        codes[rows, places] = found.where(keep, -1)
        if on_step is not None:
            on_step(step, codes.clone())
    if broken := int((~total.isfinite()).sum()):
        raise FloatingPointError(
            f"the logits of {broken} of {count} images were NaN or infinite; check the prior's weights, and use a "
            f"smaller guidance_scale (received {described(options.guidance_scale)}) or another dtype"
        )
    return codes


def schedule(num_steps: int, count: int) -> list[int]:
    """How many of `count` hidden codes are still hidden after each of T steps: floor(count · cos(π/2 · t/T)).

    A step finds at least one code while any is hidden; the last one finds all.
    """
    left, hidden = [], count
    for step in range(1, num_steps + 1):
        wanted = math.floor(count * math.cos(math.pi / 2 * step / num_steps)) if step < num_steps else 0
        hidden = max(0, min(wanted, hidden - 1))
        left.append(hidden)
    return left


def predict(
    prior: PreTrainedModel, prompts: Tensor, tokens: Tensor, rows: Tensor, places: Tensor, num_codes: int
) -> Tensor:
    """float32 logits `(g·n, K)` of the hidden codes under each of the g groups of prompts, in one forward.

    Args:
        prompts: int64 `(g·B, P)`.
        tokens: int64 `(B, L)`, codes and mask tokens.
        rows, places: int64 `(n,)`, where codes are hidden.
    """
    groups = len(prompts) // len(tokens)
    with torch.autocast(prompts.device.type, enabled=False):
        logits = prior(input_ids=torch.cat([prompts, tokens.repeat(groups, 1)], 1)).logits[:, prompts.shape[1] :]
    return logits.unflatten(0, (groups, -1))[:, rows, places, :num_codes].float().flatten(0, 1)


def choose(logits: Tensor, seeds: Tensor, counters: Tensor, options: SamplingOptions) -> tuple[Tensor, Tensor]:
    """A code for each hidden place, int64 `(n,)`, and the logarithm of its probability without temperature and filters.

    Args:
        logits: float32 `(n, K)`.
        seeds: int64 `(n,)`, of the images.
        counters: int64 `(n,)`, a number for each step and position.
    """
    codes = torch.arange(logits.shape[1], device=logits.device)
    found = []
    for part in torch.arange(len(logits), device=logits.device).split(max(1, NUMBERS_AT_ONCE // len(codes))):
        noise = exponential(seeds[part, None], counters[part, None], codes)
        found.append(pick(logits[part], noise, options))
    chosen = torch.cat(found)
    return chosen, logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]


def order_noise(seeds: Tensor, counters: Tensor, num_codes: int, weight: float) -> Tensor | float:
    """Gumbel noise of the order at its weight in a step, float32 `(n,)`."""
    if weight == 0:
        return 0.0
    # the codes have the counters below K
    return -weight * exponential(seeds, counters, torch.full_like(seeds, num_codes)).log()


def most_urgent(urgency: Tensor, rows: Tensor, places: Tensor, hidden: Tensor, counts: Tensor) -> Tensor:
    """Whether each hidden code is among the most urgent ones of its image, bool `(n,)`.

    Args:
        urgency: float32 `(n,)`.
        rows, places: int64 `(n,)`, where codes are hidden.
        hidden: bool `(B, L)`, the same.
        counts: int64 `(B,)`, how many codes of each image are the most urgent ones.
    """
    table = torch.full(hidden.shape, -torch.inf, device=hidden.device)
    table[rows, places] = urgency
    ranks = table.argsort(dim=1, descending=True, stable=True).argsort(1)
    return ranks[rows, places] < counts[rows]


def square(length: int) -> Grids:
    """One square grid of this many codes.

    Raises:
        ValueError: there is none.
    """
    side = math.isqrt(length)
    if side * side != length:
        raise ValueError(f"length: received {length}, which is no square; the order 'halton' needs grids")
    return ((side, side, 1),)


def check_known(known: Tensor, num_codes: int) -> None:
    """Refuses tokens that are no codes.

    Raises:
        ValueError: a number is below -1, or not below K.
    """
    for code in (int(known.min()), int(known.max())):
        if not -1 <= code < num_codes:
            raise ValueError(f"known: received {code}; must be codes below {num_codes}, or -1 where one is to be found")
