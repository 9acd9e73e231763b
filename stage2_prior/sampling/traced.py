"""A faster decoder for CPUs: one forward of one token, recorded as a TorchScript function.

A forward of one token is some four hundred small operations, and Python spends half of the time between them. The
recording repeats the operations without Python. Where a key is written and how far attention looks are tensors in it,
and the memory of the cache is an argument, so one recording serves every place, batch size and request.

It serves the models of `recording.why_not_recordable`, on a CPU.
"""

import copy
import threading
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stage2_prior.compat import trace
from stage2_prior.sampling.cache import PreallocatedCache
from stage2_prior.sampling.decoder import EagerDecoder, forward

# (int64 tokens (R, 1), int64 place (1,), keys and values of each layer …) → logits (R, V)
Recording = Callable[..., Tensor]

# `warnings.catch_warnings` changes the filters of the whole process, so recordings are made one at a time.
_one_at_a_time = threading.Lock()


class TracedDecoder(EagerDecoder):
    """Reads single tokens through a recording, and several at once as `EagerDecoder` does.

    Args:
        prior, num_rows, length: see `EagerDecoder`.
        recording: of this prior; None makes one.
    """

    def __init__(self, prior: PreTrainedModel, num_rows: int, length: int, recording: Recording | None = None):
        super().__init__(prior, num_rows, length)
        self.recording = recording
        self.places = torch.arange(length)
        self.buffers: dict[tuple[int, int], list[Tensor]] = {}

    def read(self, rows: slice, tokens: Tensor, start: int) -> Tensor:
        if tokens.shape[1] > 1 or not self.cache.is_allocated:
            return super().read(rows, tokens, start)
        if self.recording is None:
            self.recording = record(self.prior, self.cache)
        key = rows.start, rows.stop
        if key not in self.buffers:
            self.buffers[key] = self.cache.buffers(rows)
        return self.recording(tokens, self.places[start : start + 1], *self.buffers[key])

    def resized(self, num_rows: int) -> "TracedDecoder":
        if num_rows == self.num_rows:
            return self
        return TracedDecoder(self.prior, num_rows, self.length, self.recording)


def record(prior: PreTrainedModel, cache: PreallocatedCache) -> Recording:
    """Records a forward of one token of two rows, at the last place of a cache like the given one."""
    model = without_gradients(prior)

    def step(tokens: Tensor, place: Tensor, *buffers: Tensor) -> Tensor:
        memory = PreallocatedCache.around(list(buffers)).open_at(slice(0, None), place, place + 1)  # type: ignore[arg-type]
        return forward(model, tokens, memory, position_ids=place[None], attention_mask=memory.mask)

    tokens, last = torch.zeros(2, 1, dtype=torch.int64), torch.tensor([cache.length - 1])
    memory = [buffer.new_zeros(2, *buffer.shape[1:]) for buffer in cache.buffers(slice(0, 1))]
    with _one_at_a_time, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns of numbers it takes as constants; the comparison judges them
        return trace(step, (tokens, last, *memory))


def without_gradients(prior: PreTrainedModel) -> PreTrainedModel:
    """The model again, with the same weights in the same memory, none of which requires a gradient."""
    weights = {id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in prior.parameters()}
    buffers = {id(buffer): buffer for buffer in prior.buffers()}
    return copy.deepcopy(prior, {**weights, **buffers})
