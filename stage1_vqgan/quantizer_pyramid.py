"""Two grids of codes ("pyramid"), as in VQ-VAE-2: a coarse one for the whole, and a fine one for what it leaves open.

Shape letters: B batch, D code width, h w fine grid, ⌈h/2⌉ ⌈w/2⌉ coarse grid, L number of codes of both grids.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .quantizer_base import CodebookQuantizer, QuantizerBase, QuantizerOutput, latent_rows
from .quantizer_grids import Grids
from .quantizer_vq import VectorQuantizer, VectorQuantizerOptions

WIDEST, MOST_BLOCKS = 4096, 64


@dataclass(frozen=True, kw_only=True)
class PyramidQuantizerOptions(VectorQuantizerOptions):
    """Options of [`PyramidQuantizer`], besides those of [`VectorQuantizerOptions`], which act on both grids.

    Args:
        hidden_channels: width of the networks between the grids.
        num_res_blocks: residual blocks of each of these two networks.
    """

    DECIDE_CODES: ClassVar[frozenset[str]] = frozenset({"hidden_channels", "num_res_blocks", "l2_normalize"})

    hidden_channels: int = 128
    num_res_blocks: int = 2

    def problems(self, num_embeddings: int, embed_dim: int) -> Iterator[tuple[str, Any, str]]:
        yield from super().problems(num_embeddings, embed_dim)
        if not 1 <= self.hidden_channels <= WIDEST:
            yield "hidden_channels", self.hidden_channels, f"must be from 1 to {WIDEST}"
        if not 0 <= self.num_res_blocks <= MOST_BLOCKS:
            yield "num_res_blocks", self.num_res_blocks, f"must be from 0 to {MOST_BLOCKS}"

    def grids(self, height: int, width: int) -> Grids:
        return ((-(-height // 2), -(-width // 2), 1), (height, width, 1))


class ResidualBlock(nn.Sequential):
    """ReLU → 3×3 convolution → ReLU → 1×1 convolution, plus the input `(B, C, h, w)`."""

    def __init__(self, channels: int):
        inner = nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 1)
        super().__init__(nn.ReLU(), *inner)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Blend(nn.Module):
    """A 1×1 convolution of two maps `(B, D, h, w)`, which starts as their sum or difference.

    Args:
        channels: D.
        sign: 1 starts as the sum, -1 as the difference.
    """

    def __init__(self, channels: int, sign: int):
        super().__init__()
        same = torch.eye(channels)
        self.weight = nn.Parameter(torch.cat([same, sign * same], dim=1)[:, :, None, None])
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return F.conv2d(torch.cat([first, second.to(first.dtype)], dim=1), self.weight, self.bias)


class PyramidQuantizer(QuantizerBase):
    """Quantizes a coarse grid, then a fine grid of which the coarse one is known.

    A network halves the resolution of the latents, and the codebook `top` quantizes what results. A second network
    brings the chosen entries back to the resolution of the latents. A 1×1 convolution joins them with the latents, and
    the codebook `bottom` quantizes what results. A last 1×1 convolution makes the output of both. The first of these
    two convolutions starts as a difference, the last as a sum, so `bottom` starts with what the coarse grid leaves. The
    loss is the sum of the losses of both codebooks. Codes are flat, `(B, L)`: the coarse grid, then the fine one.

    Source: Razavi et al. 2019, "Generating diverse high-fidelity images with VQ-VAE-2", section 3.1 and algorithm 1.
    Its codebooks are moving averages; here gradients train them.
    """

    Options = PyramidQuantizerOptions

    def __init__(self, num_embeddings: int, embed_dim: int, options: PyramidQuantizerOptions):
        super().__init__(num_embeddings, embed_dim, options)
        width, count = options.hidden_channels, options.num_res_blocks
        self.shrink = nn.Sequential(
            nn.Conv2d(embed_dim, width, 3, stride=2, padding=1),
            *(ResidualBlock(width) for _ in range(count)),
            nn.ReLU(),
            nn.Conv2d(width, embed_dim, 1),
        )
        self.grow = nn.Sequential(
            nn.Conv2d(embed_dim, width, 3, padding=1),
            *(ResidualBlock(width) for _ in range(count)),
            nn.ReLU(),
            nn.Upsample(scale_factor=2, mode="nearest"),
            nn.Conv2d(width, embed_dim, 3, padding=1),
        )
        self.top = VectorQuantizer(num_embeddings, embed_dim, options)
        self.bottom = VectorQuantizer(num_embeddings, embed_dim, options)
        self.join = Blend(embed_dim, -1)
        self.fuse = Blend(embed_dim, 1)

    @property
    def codebooks(self) -> list[CodebookQuantizer]:
        return [self.top, self.bottom]

    def forward(self, latents: Tensor) -> QuantizerOutput:
        with torch.autocast(latents.device.type, enabled=False):
            _, top, grown, fine = self._up_to_bottom(latents)
            bottom = self.bottom(fine)
            quantized = self._fused(grown, bottom.quantized)
        codes = torch.cat([top.codes.flatten(1), bottom.codes.flatten(1)], dim=1)
        return QuantizerOutput(quantized, codes, top.loss + bottom.loss)

    def lookup(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        if grid is None:
            raise ValueError("grid: received None; flat codes of two grids need h and w of the fine one")
        (height, width, _), _ = self.grids(*grid)
        top, bottom = codes.split([height * width, grid[0] * grid[1]], dim=1)
        entries = self.top.lookup(top.unflatten(1, (height, width)), (height, width))
        return self._fused(self._grown(entries, grid), self.bottom.lookup(bottom.unflatten(1, grid), grid))

    @torch.no_grad()
    def inputs(self, latents: Tensor) -> list[Tensor]:
        coarse, _, _, fine = self._up_to_bottom(latents)
        return [latent_rows(coarse), latent_rows(fine)]

    def entry_numbers(self, codes: Tensor, grid: tuple[int, int]) -> Tensor:
        (height, width, _), _ = self.grids(*grid)
        return codes + self.num_embeddings * (torch.arange(codes.shape[1], device=codes.device) >= height * width)

    def _up_to_bottom(self, latents: Tensor) -> tuple[Tensor, QuantizerOutput, Tensor, Tensor]:
        """What `top` quantizes; its output; this at the resolution of the latents; and what `bottom` quantizes."""
        latents = latents.to(self.fuse.weight.dtype)
        coarse = self.shrink(latents)
        top = self.top(coarse)
        grown = self._grown(top.quantized, latents.shape[2:])
        return coarse, top, grown, self.join(latents, grown)

    def _grown(self, top: Tensor, grid: Any) -> Tensor:
        """Coarse entries at the resolution of the fine grid, `(B, D, h, w)`."""
        return self.grow(top.to(self.fuse.weight.dtype))[..., : grid[0], : grid[1]]

    def _fused(self, grown: Tensor, bottom: Tensor) -> Tensor:
        return self.fuse(grown, bottom).float()
