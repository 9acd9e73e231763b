"""A faster decoder for CPUs: the forward of one token, recorded as a TorchScript function.

A forward of one token has about four hundred small operations, and half of its time is Python overhead. The recording
repeats the operations without Python. The place to write and the number of places to read are tensors, and the memory
of the cache is an argument. So one recording serves every place, batch size and request.

`recording.why_not_recordable` states which models are supported.
"""

import copy
import threading
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stage2_prior.compat import trace
from stage2_prior.sampling.cache import PreallocatedCache
from stage2_prior.sampling.decoder import EagerDecoder, forward

# Matrices from this size on are copied into a column-major layout, with which products of few rows are faster. Smaller
# ones stay in the processor's cache, where the layout makes no difference.
LARGE_MATRIX = 2**16

# Only one thread records at a time, because `warnings.catch_warnings` changes the filters of the whole process.
_one_at_a_time = threading.Lock()


class TracedDecoder(EagerDecoder):
    """Reads single tokens through a recording, and several at once as `EagerDecoder` does.

    Args:
        prior, num_rows, length: see `EagerDecoder`.
        recording: a recording of this prior; by default it is recorded now.
    """

    def __init__(self, prior: PreTrainedModel, num_rows: int, length: int, recording: "Recording | None" = None):
        super().__init__(prior, num_rows, length)
        self.recording = recording
        self.places = torch.arange(length)
        self.buffers: dict[tuple[int, int], list[Tensor]] = {}

    def read(self, rows: slice, tokens: Tensor, start: int) -> Tensor:
        if start == 0 and self.recording is not None:  # a new batch begins, and the weights may have been written since
            self.recording.refresh()
        if tokens.shape[1] > 1 or not self.cache.is_allocated:
            return super().read(rows, tokens, start)
        if self.recording is None:
            self.recording = record(self.prior, self.cache)
        key = rows.start, rows.stop
        if key not in self.buffers:
            self.buffers[key] = self.cache.buffers(rows)
        return self.recording.step(tokens, self.places[start : start + 1], *self.buffers[key])

    def resized(self, num_rows: int) -> "TracedDecoder":
        if num_rows == self.num_rows:
            return self
        return TracedDecoder(self.prior, num_rows, self.length, self.recording)


class Recording(NamedTuple):
    """A recorded step, and the large matrices in it.

    Attributes:
        step: int64 tokens `(R, 1)`, int64 place `(1,)`, keys and values of each layer in turn → logits `(R, V)`.
        copies: each column-major copy in the step, with the weight of the prior that it repeats.
    """

    step: Callable[..., Tensor]
    copies: list[tuple[Tensor, Tensor]]

    def refresh(self) -> None:
        """Copies the weights again, so that the step never computes with old ones."""
        for copied, weight in self.copies:
            copied.copy_(weight)


def record(prior: PreTrainedModel, cache: PreallocatedCache) -> Recording:
    """Records a forward of one token of two rows at the last place, in a new cache with the shape of `cache`."""
    table = prior.get_input_embeddings().weight  # read by rows, also where an output layer shares it
    matrices = {
        id(module.weight): module.weight.detach() for module in prior.modules() if isinstance(module, nn.Linear)
    }
    large = {key: weight for key, weight in matrices.items() if weight.numel() >= LARGE_MATRIX and key != id(table)}
    copies = {key: weight.T.contiguous().T for key, weight in large.items()}
    weights = {id(weight): weight.detach() for weight in prior.parameters()} | copies
    tensors = {key: nn.Parameter(weight, requires_grad=False) for key, weight in weights.items()}
    model = copy.deepcopy(prior, {**tensors, **{id(buffer): buffer for buffer in prior.buffers()}})

    def step(tokens: Tensor, place: Tensor, *buffers: Tensor) -> Tensor:
        memory = PreallocatedCache.around(list(buffers)).open_at(slice(None), place, place + 1)  # type: ignore[arg-type]
        return forward(model, tokens, memory, position_ids=place[None], attention_mask=memory.mask)

    tokens, last = torch.zeros(2, 1, dtype=torch.int64), torch.tensor([cache.length - 1])
    memory = [buffer.new_zeros(2, *buffer.shape[1:]) for buffer in cache.buffers(slice(0, 1))]
    with _one_at_a_time, warnings.catch_warnings():
        # The tracer warns about numbers that become constants. `disagreement` finds the wrong ones.
        warnings.simplefilter("ignore")
        recorded = trace(step, (tokens, last, *memory))
    return Recording(recorded, [(copied, large[key]) for key, copied in copies.items()])
