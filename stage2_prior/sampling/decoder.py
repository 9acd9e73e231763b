"""What the sampling loop asks of a prior, and the plain way to answer.

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
        """Reads tokens of some sequences, which have read everything before `start`.

        Args:
            rows: which sequences.
            tokens: int64 `(R, n)`; a later call may read from an earlier place again, which forgets what followed.
            start: place of the first of these tokens in its sequence, counted from 0.

        Returns:
            float32 logits `(R, V)` of the token that follows. The next call may overwrite them.
        """

    def resized(self, num_rows: int) -> "Decoder":
        """The same decoder for another number of sequences; it keeps what it has recorded, if that serves them."""


class EagerDecoder:
    """The reference: the stock forward of the model, with a cache. Every faster decoder must agree with it.

    Args:
        prior: causal language model.
        num_rows: R of the largest call.
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

    The model writes their keys and values where the cache is open.
    """
    out = prior(input_ids=tokens, use_cache=True, logits_to_keep=1, **{cache_argument(prior): cache}, **inputs)
    return out.logits[:, -1].float()
