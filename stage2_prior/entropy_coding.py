"""Entropy coding of codes with a causal prior: a range coder spends -log2 p bits on a code of probability p.

The decoder repeats the forwards of the encoder to get the same probabilities, so both call the model in the same way:
token by token, with `EagerDecoder`, in batches of one size. A number that differs in its last bit can make every
later code wrong, so only the same machine and software are sure to decode.

Shape letters: N images, B images of a batch, P prompt length, L codes of an image, K codebook size.

Source: range coding, Martin 1979, "Range encoding"; implementation: `constriction` (Bamler 2022).
"""

from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from stage2_prior.sampling.decoder import EagerDecoder

NO_CONSTRICTION = "constriction is not installed: pip install 'tessella[compression]'"


class SymbolWriter:
    """Writes symbols with a range coder.

    Raises:
        ImportError: constriction is not installed.
    """

    def __init__(self) -> None:
        self._stream = _constriction()
        self._coder = self._stream.queue.RangeEncoder()
        self._family = self._stream.model.Categorical(perfect=False)

    def write(self, symbols: np.ndarray, probabilities: np.ndarray) -> None:
        """Writes whole numbers `(n,)` with probabilities float64 `(n, K)`, which the coder turns into integers."""
        if probabilities.shape[1] > 1:  # a symbol without an alternative takes no bits
            self._coder.encode(symbols.astype(np.int32), self._family, probabilities)

    def write_uniform(self, symbols: np.ndarray, size: int) -> None:
        """Writes whole numbers `(n,)` from 0 to size - 1 that are all equally probable."""
        if size > 1:
            self._coder.encode(symbols.astype(np.int32), self._stream.model.Uniform(size))

    def content(self) -> bytes:
        """All that was written, a multiple of 4 bytes."""
        return self._coder.get_compressed().astype("<u4").tobytes()


class SymbolReader:
    """Reads what a `SymbolWriter` wrote.

    Args:
        content: a multiple of 4 bytes.

    Raises:
        ImportError: constriction is not installed.
    """

    def __init__(self, content: bytes) -> None:
        self._stream = _constriction()
        self._coder = self._stream.queue.RangeDecoder(np.frombuffer(content, "<u4").astype(np.uint32))
        self._family = self._stream.model.Categorical(perfect=False)

    def read(self, probabilities: np.ndarray) -> np.ndarray:
        """The next symbols int64 `(n,)`, from the probabilities `(n, K)` with which they were written.

        Raises:
            ValueError: the content cannot have been written with such probabilities.
        """
        if probabilities.shape[1] == 1:
            return np.zeros(len(probabilities), dtype=np.int64)
        try:
            return self._coder.decode(self._family, probabilities).astype(np.int64)
        except AssertionError as error:
            raise ValueError("the bits were not written with these probabilities") from error

    def read_uniform(self, number: int, size: int) -> np.ndarray:
        """`number` symbols int64 that `write_uniform` wrote.

        Raises:
            ValueError: the content cannot have been written with such probabilities.
        """
        if size == 1:
            return np.zeros(number, dtype=np.int64)
        try:
            return self._coder.decode(self._stream.model.Uniform(size), number).astype(np.int64)
        except AssertionError as error:
            raise ValueError("the bits were not written with these probabilities") from error


def write_codes(
    writer: SymbolWriter,
    prior: PreTrainedModel,
    prompts: Tensor,
    codes: Tensor,
    num_codes: int,
    batch_size: int,
    on_step: Callable[[], object],
) -> None:
    """Writes codes int64 `(N, L)` on the CPU; the other arguments are those of `read_codes`."""

    def choose(start: int, position: int, probabilities: np.ndarray) -> np.ndarray:
        chosen = codes[start : start + len(probabilities), position].numpy()
        writer.write(chosen, probabilities)
        return chosen

    _step_through(prior, prompts, codes.shape[1], num_codes, batch_size, choose, on_step)


def read_codes(
    reader: SymbolReader,
    prior: PreTrainedModel,
    prompts: Tensor,
    length: int,
    num_codes: int,
    batch_size: int,
    on_step: Callable[[], object],
) -> Tensor:
    """Reads codes int64 `(N, L)` that `write_codes` wrote with the same arguments.

    Args:
        reader: what was written.
        prior: causal language model, in evaluation mode.
        prompts: int64 `(N, P)`.
        length: L.
        num_codes: K; probabilities are those of the tokens below K.
        batch_size: images in one forward. The last batch is filled up, so that all forwards have one shape.
        on_step: called after each forward.

    Raises:
        FloatingPointError: logits were NaN or infinite.
        ValueError: the content cannot have been written with these arguments.
    """

    def choose(start: int, position: int, probabilities: np.ndarray) -> np.ndarray:
        return reader.read(probabilities)

    return _step_through(prior, prompts, length, num_codes, batch_size, choose, on_step)


@torch.inference_mode()
def _step_through(
    prior: PreTrainedModel,
    prompts: Tensor,
    length: int,
    num_codes: int,
    batch_size: int,
    choose: Callable[[int, int, np.ndarray], np.ndarray],
    on_step: Callable[[], object],
) -> Tensor:
    """All codes int64 `(N, L)` on the CPU.

    `choose(start, position, probabilities (n, K))` chooses the codes of n images from image `start` on.
    """
    decoder = EagerDecoder(prior, batch_size, prompts.shape[1] + length - 1)
    parts = []
    with torch.autocast(prior.device.type, enabled=False):
        for start, batch in zip(count(0, batch_size), prompts.to(prior.device).split(batch_size), strict=False):
            fill = torch.arange(batch_size).clamp(max=len(batch) - 1)
            tokens, codes = batch[fill.to(batch.device)], torch.empty(len(batch), length, dtype=torch.int64)
            if tokens.shape[1] > 1:
                decoder.read(slice(0, batch_size), tokens[:, :-1], 0)
            for position in range(length):
                logits = decoder.read(slice(0, batch_size), tokens[:, -1:], batch.shape[1] - 1 + position)
                probabilities = _probabilities(logits, num_codes)[: len(batch)]
                codes[:, position] = torch.from_numpy(choose(start, position, probabilities))
                tokens = codes[fill, position : position + 1].to(batch.device)
                on_step()
            parts.append(codes)
    return torch.cat(parts)


def _probabilities(logits: Tensor, num_codes: int) -> np.ndarray:
    """float64 `(B, K)`; the softmax on the CPU, because not every device has float64."""
    probabilities = logits[:, :num_codes].cpu().double().softmax(-1)
    if not probabilities.isfinite().all():
        raise FloatingPointError("logits were NaN or infinite; check the prior's weights, or load it in float32")
    return probabilities.numpy()


def _constriction() -> Any:
    try:
        from constriction import stream
    except ImportError as error:
        raise ImportError(NO_CONSTRICTION) from error
    return stream
