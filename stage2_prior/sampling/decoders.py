"""Chooses the fastest decoder that supports a prior, and reuses it for later requests."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from transformers import PreTrainedModel

from configs.problems import one_line
from stage2_prior.sampling.decoder import Decoder, EagerDecoder
from stage2_prior.sampling.graphs import GraphDecoder
from stage2_prior.sampling.recording import ROWS, disagreement, state_of, why_not_recordable
from stage2_prior.sampling.traced import TracedDecoder

logger = logging.getLogger(__name__)

# The faster decoder for each type of device.
FASTER: dict[str, type[GraphDecoder] | type[TracedDecoder]] = {"cuda": GraphDecoder, "cpu": TracedDecoder}


def make_decoder(
    prior: PreTrainedModel, num_rows: int, length: int, num_codes: int, compiled: bool = False
) -> EagerDecoder:
    """Makes the fastest decoder that agrees with `EagerDecoder`. If none does, warns and makes an `EagerDecoder`.

    Args:
        prior: causal language model, in evaluation mode.
        num_rows: sequences of the largest call.
        length: tokens of the longest sequence.
        num_codes: K; the comparison with `EagerDecoder` reads tokens below K.
        compiled: whether torch.compile compiles the step.

    Raises:
        ValueError: `compiled` is true, but the step of this prior cannot be recorded.
    """
    kind = GraphDecoder if compiled else FASTER.get(prior.device.type)
    if kind is None:
        return EagerDecoder(prior, num_rows, length)
    reason = why_not_recordable(prior, length)
    if reason is None:
        try:
            candidate = GraphDecoder(prior, ROWS, length, compiled=True) if compiled else kind(prior, ROWS, length)
            reason = disagreement(prior, candidate, length, num_codes)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            reason = one_line(f"{type(error).__name__}: {error}", 200)
    if reason is None:
        return candidate.resized(num_rows)
    if compiled:
        message = f"compiled: received True, but the step of this {prior.config.model_type} cannot be recorded"
        raise ValueError(f"{message}: {reason}")
    warn_once(f"sampling from this {prior.config.model_type} uses the plain forward, which is slower: {reason}")
    return EagerDecoder(prior, num_rows, length)


@lru_cache
def warn_once(message: str) -> None:
    """Logs a warning. A process logs the same message only once."""
    logger.warning("%s", message)


class DecoderPool:
    """Reuses a decoder for later requests. Only one request has it at a time, so threads never share a cache.

    Args:
        length: tokens of the longest sequence.
        num_codes: K.
    """

    def __init__(self, length: int, num_codes: int):
        self.length, self.num_codes = length, num_codes
        self.compiled = False
        self._free: list[tuple[object, EagerDecoder]] = []

    @contextmanager
    def borrow(self, prior: PreTrainedModel, num_rows: int) -> Iterator[Decoder]:
        """Lends a decoder to one request.

        It is the stored decoder if no other request has it and the prior is unchanged, else a new one. Afterwards the
        pool stores it for the next request, unless this request fails.
        """
        state = (self.compiled, torch.is_inference_mode_enabled(), state_of(prior))
        decoder = self._take(state)
        if decoder is None:
            decoder = make_decoder(prior, num_rows, self.length, self.num_codes, self.compiled)
        decoder = decoder.resized(num_rows)
        yield decoder
        self._free[:] = [(state, decoder)]

    def _take(self, state: object) -> EagerDecoder | None:
        try:
            kept, decoder = self._free.pop()
        except IndexError:
            return None
        return decoder if kept == state else None

    def __getstate__(self) -> dict[str, object]:
        """Excludes the decoder, so copies and pickles of a pipeline are small and make a new one."""
        return {**self.__dict__, "_free": []}
