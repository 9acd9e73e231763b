"""The interface through which the sampling loop calls a prior, and its reference implementation.

Shape letters: R rows (sequences), n tokens read at once, V vocabulary.
"""

from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from stage2_prior.compat import cache_argument
from stage2_prior.sampling.cache import PreallocatedCache


class Decoder(Protocol):
    """Reads sequences of tokens and predicts the token that follows."""

    def read(self, rows: slice, tokens: Tensor, start: int) -> Tensor:
        """Reads the next tokens of some sequences. Earlier calls must have read all tokens before `start`.

        Args:
            rows: the sequences to read.
            tokens: int64 `(R, n)`. A call may start at an earlier place than the previous one; it overwrites all places
                from there on.
            start: place of the first of these tokens in its sequence, counted from 0.

        Returns:
            float32 logits `(R, V)` of the token that follows. The next call may overwrite them.
        """

    def resized(self, num_rows: int) -> "Decoder":
        """A decoder for another number of sequences. It reuses the recordings that support this number."""


class EagerDecoder:
    """The reference decoder: the model's own forward with a cache. Every faster decoder must give the same logits.

    Args:
        prior: causal language model.
        num_rows: largest number of sequences, R.
        length: tokens of the longest sequence.
    """

    def __init__(self, prior: PreTrainedModel, num_rows: int, length: int):
        self.prior, self.num_rows, self.length = prior, num_rows, length
        self.cache = PreallocatedCache(prior.config.num_hidden_layers, num_rows, length, prior.device)

    def read(self, rows: slice, tokens: Tensor, start: int) -> Tensor:
        return forward(self.prior, tokens, self.cache.open(rows, start, start + tokens.shape[1]))

    def resized(self, num_rows: int) -> "EagerDecoder":
        return self if num_rows == self.num_rows else EagerDecoder(self.prior, num_rows, self.length)


def forward(prior: PreTrainedModel, tokens: Tensor, cache: PreallocatedCache, **inputs: Tensor) -> Tensor:
    """float32 logits `(R, V)` of the token that follows int64 `tokens` `(R, n)`.

    The model writes the keys and values of these tokens to the places that `cache.open` or `cache.open_at` set.
    """
    out = prior(input_ids=tokens, use_cache=True, logits_to_keep=1, **{cache_argument(prior): cache}, **inputs)
    return out.logits[:, -1].float()
