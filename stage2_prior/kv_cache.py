"""Keys and values of all positions of a batch in memory that is allocated once, behind the cache of transformers.

Attention sees a window of it: exactly what has been written, without a copy; or, where a step must always have the
same shapes, a fixed number of positions, of which a mask leaves out the later ones.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer


class PreallocatedLayer(DynamicLayer):
    """One layer's keys and values, `(rows, heads, length, width)` each."""

    def __init__(self, cache: "PreallocatedCache"):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        rows, length = self.cache.num_rows, self.cache.length
        self.buffers = [x.new_zeros(rows, x.shape[1], length, x.shape[3]) for x in (key_states, value_states)]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache = self.cache
        written = [buffer[cache.rows] for buffer in self.buffers]
        for buffer, states in zip(written, (key_states, value_states), strict=True):
            buffer.index_copy_(2, cache.positions, states)
        self.keys, self.values = (buffer[:, :, : cache.window] for buffer in written)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Positions before those of the forward that is going on."""
        return self.cache.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.window, 0


class PreallocatedCache(Cache):
    """A cache for `num_rows` sequences of up to `length` tokens, of which a forward uses the part that was `opened`.

    Args:
        prior: whose cache it is.
        num_rows: sequences.
        length: tokens of the longest.
    """

    def __init__(self, prior: PreTrainedModel, num_rows: int, length: int):
        self.num_rows, self.length = num_rows, length
        self._all_positions = torch.arange(length, device=prior.device)
        self.open(slice(0, num_rows), 0, 0)
        super().__init__(layers=[PreallocatedLayer(self) for _ in range(prior.config.num_hidden_layers)])

    def open(self, rows: slice, start: int, stop: int) -> "PreallocatedCache":
        """The next forward writes tokens `start` to `stop` of `rows`, and sees all up to `stop`."""
        self.rows, self.start, self.window = rows, start, stop
        self.positions = self._all_positions[start:stop]
        return self

    def open_window(self, rows: slice, position: Tensor, window: int) -> "PreallocatedCache":
        """The next forward writes the token at `position`, int64 `(1,)`, and gets the first `window` positions, of
        which `mask` leaves out what is not written yet."""
        self.rows, self.start, self.window = rows, 0, window
        self.positions = position
        return self

    @property
    def mask(self) -> Tensor:
        """bool `(1, 1, 1, window)`: the positions of an open window that have been written."""
        return (self._all_positions[: self.window] <= self.positions)[None, None, None]
