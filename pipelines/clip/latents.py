"""The latents that guidance optimises: where they start, the range they stay in, and the codes they stand for.

Shape letters: B images, C channels, H W image size, D code width, h w code grid, K codebook size, G codes of a latent.
"""

import math
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor

from configs.randomness import uniform
from stage1_vqgan import VQGANModel, codes_shape
from stage1_vqgan.quantizer_base import latent_rows, nearest_code, straight_through
from stage1_vqgan.quantizer_fsq import MARGIN, FSQuantizer
from stage1_vqgan.quantizer_gumbel import GumbelQuantizer
from stage1_vqgan.quantizer_lfq import LFQuantizer
from stage1_vqgan.quantizer_pyramid import PyramidQuantizer
from stage1_vqgan.quantizer_residual import ResidualQuantizer


class LatentSpace:
    """The latents of a tokenizer, in front of its quantizer.

    The quantizer itself turns them into codes, and passes the gradient on to them. Only "gumbel" passes no gradient in
    evaluation. With it the latents are those behind the quantizer, and each takes the nearest entry, straight through.

    Args:
        vqgan: the tokenizer.

    Raises:
        ValueError: the quantizer is "pyramid".
    """

    def __init__(self, vqgan: VQGANModel):
        if isinstance(vqgan.quantize, PyramidQuantizer):
            reason = "networks lie between its latents and its codebooks, so the latents have no range to stay in"
            raise ValueError(f"model: received a tokenizer with quantizer 'pyramid'; {reason}; use another kind")
        self.vqgan = vqgan
        self.is_behind = isinstance(vqgan.quantize, GumbelQuantizer)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest value of each channel, float32 `(D, 1, 1)`; see `latent_range`."""
        low, high = latent_range(self.vqgan.quantize, self.vqgan.device)
        return low[:, None, None], high[:, None, None]

    @torch.no_grad()
    def of_image(self, pixel_values: Tensor) -> Tensor:
        """The latents `(B, D, h, w)` of images `(B, C, H, W)` in [-1, 1]."""
        encoded = self.vqgan.encode(pixel_values.to(self.vqgan.device, self.vqgan.dtype))
        return cast(Tensor, encoded.quantized if self.is_behind else encoded.latents).float()

    @torch.no_grad()
    def random(self, seeds: list[int], grid: tuple[int, int]) -> Tensor:
        """The entries `(B, D, h, w)` of random codes, which depend on the seed of their image alone."""
        shape = codes_shape(self.vqgan.quantize.grids(*grid))
        draws = uniform(torch.tensor(seeds)[:, None], torch.arange(math.prod(shape)))
        codes = (draws * self.vqgan.config.num_embeddings).long().view(-1, *shape)
        return self.vqgan.lookup(codes.to(self.vqgan.device), grid)

    def quantized(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Quantized latents `(B, D, h, w)`, whose gradient is passed on to the latents, and their codes."""
        quantizer: Any = self.vqgan.quantize
        if not self.is_behind:
            out = quantizer(latents)
            return out.quantized, out.codes
        height, width = latents.shape[2:]
        codes = rearrange(nearest_code(latent_rows(latents), quantizer.codebook), "(B h w) -> B h w", h=height, w=width)
        return straight_through(latents, quantizer.lookup(codes)), codes


@torch.no_grad()
def latent_range(quantizer: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of each channel of the entries of all codes, float32 `(D,)`.

    For "fsq", whose tanh bounds the latents, these are the latents that reach the outermost levels.
    """
    if isinstance(quantizer, FSQuantizer):
        high = torch.full((quantizer.embed_dim,), math.atanh(1 / (1 + MARGIN)), device=device)
        return -high, high
    if isinstance(quantizer, ResidualQuantizer):  # an entry is a sum
        lows, highs = zip(*(part.codebook.aminmax(dim=0) for part in quantizer.depths), strict=True)
        return torch.stack(lows).sum(0), torch.stack(highs).sum(0)
    last = quantizer.num_embeddings - 1
    bits = isinstance(quantizer, LFQuantizer)  # K may be 2⁶², and the first and the last code are opposite corners
    codes = torch.tensor([0, last], device=device) if bits else torch.arange(last + 1, device=device)
    several = codes_shape(quantizer.grids(1, 1))[2:]  # (G,), or nothing
    low, high = quantizer.entries(codes.view(-1, *(1 for _ in several)).expand(-1, *several)).aminmax(dim=0)
    return low, high
