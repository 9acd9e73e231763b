"""A cache of transformers whose memory for the keys and values of a batch is allocated once.

Shape letters: R rows (sequences), H heads, T tokens of the longest sequence, W width of a head.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer, `(R, H, T, W)` each."""

    def __init__(self, cache: "PreallocatedCache"):
        super().__init__()
        self.sizes = cache.num_rows, cache.length
        self.opening = cache.opening

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        num_rows, length = self.sizes
        states = (key_states, value_states)
        self.buffers = [x.new_zeros(num_rows, x.shape[1], length, x.shape[3]) for x in states]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        opening = self.opening
        # a recorded step reads all rows of its memory, and a slice would be one more operation in every layer
        written = self.buffers if opening.rows == slice(None) else [buffer[opening.rows] for buffer in self.buffers]
        for buffer, states in zip(written, (key_states, value_states), strict=True):
            buffer.index_copy_(2, opening.places, states)
        self.keys, self.values = (buffer[:, :, : opening.seen] for buffer in written)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Number of tokens in the cache before those of the current forward."""
        return self.opening.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.opening.seen, 0  # type: ignore[return-value]


class Opening:
    """The part of a cache that the next forward writes and reads. All layers share this object.

    Attributes:
        rows: the sequences of the forward.
        places: int64 `(n,)`, the places to which the forward writes the keys and values of its n tokens.
        start: number of tokens before these n tokens.
        seen: number of places, from the first one, that attention reads; a tensor while a forward is recorded.
    """

    rows: slice
    places: Tensor
    start: int
    seen: int | Tensor


class PreallocatedCache(Cache):
    """A cache for R sequences of up to T tokens. Call `open` or `open_at` before every forward.

    Args:
        num_layers: layers of the model.
        num_rows: R.
        length: T.
        device: device of the model.
    """

    def __init__(self, num_layers: int, num_rows: int, length: int, device: torch.device):
        self.num_rows, self.length = num_rows, length
        self.opening = Opening()
        self._places = torch.arange(length, device=device)
        self.preallocated = [PreallocatedLayer(self) for _ in range(num_layers)]
        super().__init__(layers=self.preallocated)  # type: ignore[arg-type]

    @classmethod
    def around(cls, buffers: list[Tensor]) -> "PreallocatedCache":
        """A cache that uses the memory of another cache; `buffers` are the keys and values of each layer in turn."""
        num_rows, _, length, _ = buffers[0].shape
        cache = cls(len(buffers) // 2, num_rows, length, buffers[0].device)
        for layer, keys, values in zip(cache.preallocated, buffers[::2], buffers[1::2], strict=True):
            layer.buffers, layer.is_initialized = [keys, values], True
        return cache

    def open(self, rows: slice, start: int, stop: int) -> "PreallocatedCache":
        """The next forward writes places `start` to `stop` of `rows`, and attention reads all places before `stop`."""
        opening = self.opening
        opening.rows, opening.places = rows, self._places[start:stop]
        opening.start, opening.seen = start, stop
        return self

    def open_at(self, rows: slice, place: Tensor, seen: int | Tensor) -> "PreallocatedCache":
        """The next forward writes one place, int64 `(1,)`, and attention reads the first `seen` places.

        `place` stays on the device, so one recorded step serves every place. `mask` hides the places after `place`.
        """
        opening = self.opening
        opening.rows, opening.places = rows, place
        opening.start, opening.seen = 0, seen
        return self

    @property
    def mask(self) -> Tensor:
        """Which of the places that attention reads have been written, bool `(1, 1, 1, seen)`."""
        return (self._places[: self.opening.seen] <= self.opening.places)[None, None, None]

    @property
    def is_allocated(self) -> bool:
        """Whether the first forward has allocated the memory; only then are the shapes of keys and values known."""
        return all(layer.is_initialized for layer in self.preallocated)

    def buffers(self, rows: slice) -> list[Tensor]:
        """The keys and values of some rows, layer by layer."""
        return [buffer[rows] for layer in self.preallocated for buffer in layer.buffers]
