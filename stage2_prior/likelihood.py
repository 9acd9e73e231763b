"""The likelihood of codes by a causal prior: the nats of each code, given its prompt and the codes before it.

All codes of an image are predicted in one forward, as in training: their sum is the training loss times L.

Shape letters: N sequences, P prompt length, L codes of an image, C classes, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from configs.memory import USABLE, free_memory

# Larger batches are not faster: logits of one batch.
LARGEST_LOGITS = 2**26
# A forward holds about this many vectors of the hidden width for each token at once, those of the MLP included.
WIDTHS_AT_ONCE = 16


@torch.inference_mode()
def code_nats(
    prior: PreTrainedModel,
    prompts: Tensor,
    codes: Tensor,
    batch_size: int | None = None,
    on_batch: Callable[[int], object] | None = None,
) -> Tensor:
    """-ln p(code | prompt, codes before it) of every code, float32 `(N, L)` on the CPU.

    The probabilities are those of the training loss: of all V tokens, not only of codes.

    Args:
        prior: causal language model, in evaluation mode.
        prompts: int64 `(N, P)`.
        codes: int64 `(N, L)`.
        batch_size: sequences in one forward; by default as many as fit in memory.
        on_batch: called after each forward with its number of sequences.

    Raises:
        FloatingPointError: logits were NaN or infinite.
    """
    batch_size = batch_size or sequences_that_fit(prior, prompts.shape[1] + codes.shape[1] - 1)
    batch_size = min(batch_size, len(codes))  # torch splits by numbers of 64 bits
    parts = []
    with torch.autocast(prior.device.type, enabled=False):
        for some_prompts, some_codes in zip(prompts.split(batch_size), codes.split(batch_size), strict=True):
            parts.append(_nats_of_batch(prior, some_prompts.to(prior.device), some_codes.to(prior.device)).cpu())
            if on_batch is not None:
                on_batch(len(some_codes))
    nats = torch.cat(parts)
    if broken := int((~nats.isfinite()).any(1).sum()):
        raise FloatingPointError(
            f"the logits of {broken} of {len(nats)} images were NaN or infinite in {prior.dtype}; load the pipeline in "
            "float32, or check whether the prior's weights are damaged"
        )
    return nats


def _nats_of_batch(prior: PreTrainedModel, prompts: Tensor, codes: Tensor) -> Tensor:
    """float32 `(n, L)`; see `code_nats`."""
    tokens = torch.cat([prompts, codes[:, :-1]], 1)
    logits = prior(input_ids=tokens, use_cache=False, logits_to_keep=codes.shape[1]).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none").view(codes.shape)


def sequences_that_fit(prior: PreTrainedModel, length: int) -> int:
    """The number of sequences of `length` tokens in one forward, at least 1."""
    config, itemsize = prior.config, prior.dtype.itemsize
    per_token = config.vocab_size * (itemsize + 2 * 4) + WIDTHS_AT_ONCE * config.hidden_size * itemsize
    attention = config.num_attention_heads * length**2 * itemsize
    fitting = int(USABLE * free_memory(prior.device)) // (length * per_token + attention)
    return max(1, min(fitting, LARGEST_LOGITS // (length * config.vocab_size)))


def marginal_nats(nats: Tensor, log_prior: Tensor) -> Tensor:
    """-ln p(code | codes before it) where the class is unknown, float64 `(N, L)`.

    It is the difference of the logarithms of p(codes up to this one) = sum over classes of p(class) · p(codes | class).

    Args:
        nats: of every code given each class, `(N, C, L)`.
        log_prior: ln p(class), float64 `(C,)`; the probabilities sum to 1.
    """
    joint = log_prior[:, None] - nats.double().cumsum(-1)
    total = joint.logsumexp(1)
    return -total.diff(prepend=torch.zeros_like(total[:, :1]))
