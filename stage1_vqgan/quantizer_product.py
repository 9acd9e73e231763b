"""Product quantization ("product"): the channels of a latent are split into groups, and each group gets a code."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from .quantizer_base import CodebookQuantizer, Quantizer, latent_rows
from .quantizer_grids import Grids
from .quantizer_vq import VectorQuantizer, VectorQuantizerOptions

MOST_GROUPS = 64


@dataclass(frozen=True, kw_only=True)
class ProductQuantizerOptions(VectorQuantizerOptions):
    """Options of [`ProductQuantizer`], besides those of [`VectorQuantizerOptions`], which act in each group.

    Args:
        groups: G, number of groups of channels; it must divide `embed_dim`.
    """

    DECIDE_CODES: ClassVar[frozenset[str]] = frozenset({"groups", "l2_normalize"})

    groups: int = 2

    def problems(self, num_embeddings: int, embed_dim: int) -> Iterator[tuple[str, Any, str]]:
        yield from super().problems(num_embeddings, embed_dim)
        if not 2 <= self.groups <= MOST_GROUPS:
            yield "groups", self.groups, f"must be from 2 to {MOST_GROUPS}; for one group use quantizer vq"
        elif embed_dim % self.groups:
            yield "groups", self.groups, f"must divide embed_dim, {embed_dim}"

    def grids(self, height: int, width: int) -> Grids:
        return ((height, width, self.groups),)


class ProductQuantizer(Quantizer):
    """Quantizes each group of D/G adjacent channels by a codebook of its own.

    The loss is the mean over the groups of the loss of [`VectorQuantizer`].

    Source: Jégou et al. 2011, "Product quantization for nearest neighbor search"; Baevski et al. 2020, "wav2vec 2.0",
    section 2, whose groups choose their entries by a Gumbel softmax.
    """

    Options = ProductQuantizerOptions

    def __init__(self, num_embeddings: int, embed_dim: int, options: ProductQuantizerOptions):
        super().__init__(num_embeddings, embed_dim, options)
        width, count = embed_dim // options.groups, options.groups
        self.parts = nn.ModuleList(VectorQuantizer(num_embeddings, width, options) for _ in range(count))

    @property
    def codebooks(self) -> list[CodebookQuantizer]:
        return cast(list[CodebookQuantizer], list(self.parts))

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        groups = z.chunk(self.options.groups, dim=-1)
        parts = [part.quantize(group) for part, group in zip(self.codebooks, groups, strict=True)]
        quantized, codes, losses = zip(*parts, strict=True)
        return torch.cat(quantized, dim=-1), torch.stack(codes, dim=-1), torch.stack(losses).mean()

    def entries(self, codes: Tensor) -> Tensor:
        parts = zip(self.codebooks, codes.unbind(-1), strict=True)
        return torch.cat([part.entries(code) for part, code in parts], dim=-1)

    @torch.no_grad()
    def inputs(self, latents: Tensor) -> list[Tensor]:
        return list(latent_rows(latents).chunk(self.options.groups, dim=-1))

    def entry_numbers(self, codes: Tensor, grid: tuple[int, int]) -> Tensor:
        return codes + self.num_embeddings * torch.arange(self.options.groups, device=codes.device)
