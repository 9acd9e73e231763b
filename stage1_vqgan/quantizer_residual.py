"""Residual quantization ("residual"): each latent gets several codes, and each code refines those before it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from .quantizer_base import CodebookQuantizer, Quantizer, latent_rows, nearest_code, straight_through
from .quantizer_grids import Grids
from .quantizer_vq import VectorQuantizer, VectorQuantizerOptions, rotate

# Largest number of codes of a latent, for residual and product quantization.
DEEPEST = 64


@dataclass(frozen=True, kw_only=True)
class ResidualQuantizerOptions(VectorQuantizerOptions):
    """Options of [`ResidualQuantizer`], besides those of [`VectorQuantizerOptions`].

    Args:
        depth: G, number of codes of each latent.
        shared_codebook: one codebook for all depths, instead of one for each.
    """

    DECIDE_CODES: ClassVar[frozenset[str]] = frozenset({"depth", "shared_codebook", "l2_normalize"})

    depth: int = 4
    shared_codebook: bool = False

    def problems(self, num_embeddings: int, embed_dim: int) -> Iterator[tuple[str, Any, str]]:
        yield from super().problems(num_embeddings, embed_dim)
        if not 2 <= self.depth <= DEEPEST:
            yield "depth", self.depth, f"must be from 2 to {DEEPEST}; for one code at each position use quantizer vq"
        if self.l2_normalize:
            yield "l2_normalize", True, "must be false: what an entry leaves of a latent can have any length"

    def grids(self, height: int, width: int) -> Grids:
        return ((height, width, self.depth),)


class ResidualQuantizer(Quantizer):
    """The first code is the entry nearest to the latent, each further code the entry nearest to what is left of it.

    The sum of its entries stands for a latent. With r₁ = z and r₂ = r₁ - e₁ and so on, the loss is the sum over g of
    the loss of [`VectorQuantizer`] for r_g and e_g.

    Source: Zeghidour et al. 2021, "SoundStream", section III.C; Lee et al. 2022, "Autoregressive image generation using
    residual quantization", section 3.1. Their codebooks are moving averages; here gradients train them.
    """

    Options = ResidualQuantizerOptions

    def __init__(self, num_embeddings: int, embed_dim: int, options: ResidualQuantizerOptions):
        super().__init__(num_embeddings, embed_dim, options)
        count = 1 if options.shared_codebook else options.depth
        self.parts = nn.ModuleList(VectorQuantizer(num_embeddings, embed_dim, options) for _ in range(count))

    @property
    def codebooks(self) -> list[CodebookQuantizer]:
        return cast(list[CodebookQuantizer], list(self.parts))

    @property
    def depths(self) -> list[CodebookQuantizer]:
        """The quantizer of each depth."""
        return self.codebooks * (self.options.depth // len(self.parts))

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, losses, rest = [], [], z
        for part in self.depths:
            _, chosen, loss = part.quantize(rest)
            rest = rest - part.entries(chosen).detach()
            codes.append(chosen)
            losses.append(loss)
        all_codes = torch.stack(codes, dim=-1)
        pass_on = rotate if self.options.rotation_trick else straight_through
        return pass_on(z, self.entries(all_codes).detach()), all_codes, torch.stack(losses).sum()

    def entries(self, codes: Tensor) -> Tensor:
        parts = zip(self.depths, codes.unbind(-1), strict=True)
        return torch.stack([part.entries(code) for part, code in parts]).sum(0)

    @torch.no_grad()
    def inputs(self, latents: Tensor) -> list[Tensor]:
        rests = [latent_rows(latents)]
        for part in self.depths[:-1]:
            rests.append(rests[-1] - part.entries(nearest_code(rests[-1], part.codebook)))
        return [torch.stack(rests, dim=1).flatten(0, 1)] if self.options.shared_codebook else rests

    def entry_numbers(self, codes: Tensor, grid: tuple[int, int]) -> Tensor:
        return codes + self.num_embeddings * torch.arange(len(self.parts), device=codes.device)
