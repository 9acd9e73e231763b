"""Finite scalar quantization ("fsq"): every channel of a latent is rounded to one of a few levels."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .quantizer_base import Quantizer, QuantizerOptions, straight_through

# The range of the tanh is larger than that of the levels by this fraction, so that latents reach the outermost levels.
MARGIN = 1e-3


@dataclass(frozen=True, kw_only=True)
class FSQuantizerOptions(QuantizerOptions):
    """Options of [`FSQuantizer`].

    Args:
        levels: number of levels of each channel, for instance [8, 5, 5, 5]; `embed_dim` must be the number of
            channels, `num_embeddings` the product of the levels.
    """

    DECIDE_CODES: ClassVar[frozenset[str]] = frozenset({"levels"})

    levels: list[int] | tuple[int, ...] = ()

    def problems(self, num_embeddings: int, embed_dim: int) -> Iterator[tuple[str, Any, str]]:
        if not self.levels or min(self.levels) < 3:
            yield "levels", list(self.levels), "needs a list of whole numbers from 3 up, such as [8, 5, 5, 5]"
            return
        if embed_dim != len(self.levels):
            yield "embed_dim", embed_dim, f"quantizer_options.levels has {len(self.levels)} channels: set it to that"
        if num_embeddings != math.prod(self.levels):
            allowed = f"the product of quantizer_options.levels is {math.prod(self.levels)}: set it to that"
            yield "num_embeddings", num_embeddings, allowed


class FSQuantizer(Quantizer):
    """Bounds channel i by a tanh and rounds it to one of L_i levels in [-1, 1].

    A code is the number that the levels form in mixed radix; the first channel is the least significant digit. FSQ has
    no codebook, so no codebook can collapse.

    Source: Mentzer et al. 2023, "Finite scalar quantization: VQ-VAE made simple", section 3 and appendix A.1.
    """

    Options = FSQuantizerOptions

    def __init__(self, num_embeddings: int, embed_dim: int, options: FSQuantizerOptions):
        super().__init__(num_embeddings, embed_dim, options)
        self.levels = list(options.levels)

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        levels = _vector(self.levels, z.device)
        half_range = (levels - 1) * (1 + MARGIN) / 2
        offset = 0.5 * (levels % 2 == 0)  # the centre of an even number of levels is -½
        bounded = torch.tanh(z + torch.atanh(offset / half_range)) * half_range - offset
        rounded = straight_through(bounded, bounded.round())
        middle = levels // 2
        codes = ((rounded.detach().round().long() + middle) * self._place_values(z.device)).sum(1)
        return rounded / middle, codes, z.new_zeros(())

    def entries(self, codes: Tensor) -> Tensor:
        levels = _vector(self.levels, codes.device)
        digits = codes[..., None] // self._place_values(codes.device) % levels
        middle = levels // 2
        return (digits - middle).float() / middle

    def _place_values(self, device: torch.device) -> Tensor:
        return _vector([math.prod(self.levels[:i]) for i in range(len(self.levels))], device)


def _vector(values: list[int], device: torch.device) -> Tensor:
    """int64 `(D,)`, filled on the device: a copy from the CPU would synchronize with a GPU."""
    return torch.stack([torch.full((), value, device=device) for value in values])
