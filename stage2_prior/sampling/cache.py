"""Keys and values of all positions of a batch in memory that is allocated once, behind the cache of transformers.

Attention sees a window of it: exactly what has been written, without a copy; or, where a step must always have the
same shapes, a fixed number of positions, of which a mask leaves out the later ones.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer


@dataclass
class Opening:
    """The part of a cache that a forward writes and reads; all of its layers look here.

    Attributes:
        rows: sequences.
        positions: int64 `(n,)`, of the tokens that are written.
        start: tokens before those.
        window: positions that attention gets.
    """

    rows: slice
    positions: Tensor
    start: int
    window: int


class PreallocatedLayer(DynamicLayer):
    """One layer's keys and values, `(num_rows, heads, length, width)` each."""

    def __init__(self, num_rows: int, length: int, opening: Opening):
        super().__init__()
        self.num_rows, self.length, self.opening = num_rows, length, opening

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        states = (key_states, value_states)
        self.buffers = [x.new_zeros(self.num_rows, x.shape[1], self.length, x.shape[3]) for x in states]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, positions, window = self.opening.rows, self.opening.positions, self.opening.window
        written = [buffer[rows] for buffer in self.buffers]
        for buffer, states in zip(written, (key_states, value_states), strict=True):
            buffer.index_copy_(2, positions, states)
        self.keys, self.values = (buffer[:, :, :window] for buffer in written)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens before those of the forward that is going on."""
        return self.opening.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.opening.window, 0


class PreallocatedCache(Cache):
    """A cache for `num_rows` sequences of up to `length` tokens, of which a forward uses the part that was opened.

    Args:
        prior: whose cache it is.
        num_rows: sequences.
        length: tokens of the longest.
    """

    def __init__(self, prior: PreTrainedModel, num_rows: int, length: int):
        self.num_rows, self.length = num_rows, length
        self._all_positions = torch.arange(length, device=prior.device)
        self.opening = Opening(slice(0, num_rows), self._all_positions[:0], 0, 0)
        layers = prior.config.num_hidden_layers
        super().__init__(layers=[PreallocatedLayer(num_rows, length, self.opening) for _ in range(layers)])

    def open(self, rows: slice, start: int, stop: int) -> "PreallocatedCache":
        """The next forward writes tokens `start` to `stop` of `rows`, and sees all up to `stop`."""
        opening = self.opening
        opening.rows, opening.start, opening.window = rows, start, stop
        opening.positions = self._all_positions[start:stop]
        return self

    def open_window(self, rows: slice, position: Tensor, window: int) -> "PreallocatedCache":
        """The next forward writes the token at `position`, int64 `(1,)`, and gets the first `window` positions, of
        which `mask` leaves out what is not written yet."""
        opening = self.opening
        opening.rows, opening.start, opening.window = rows, 0, window
        opening.positions = position
        return self

    @property
    def is_allocated(self) -> bool:
        """Whether a forward has been, which tells what shapes keys and values have."""
        return all(isinstance(layer, PreallocatedLayer) and layer.is_initialized for layer in self.layers)

    @property
    def mask(self) -> Tensor:
        """bool `(1, 1, 1, window)`: the positions of an open window that have been written."""
        return (self._all_positions[: self.opening.window] <= self.opening.positions)[None, None, None]
