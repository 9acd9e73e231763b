"""Vector quantizers: continuous latents in, codes and quantized latents out.

Shape letters: B batch, D code width, h w code grid, K codebook size, N = B·h·w latents.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .configuration_vqgan import VQGANConfig

SEARCH_CHUNK = 8192


@dataclass
class QuantizerOutput:
    """What a quantizer returns.

    Attributes:
        quantized: float32 `(B, D, h, w)`; its gradient goes straight through to the latents.
        codes: int64 `(B, h, w)` in `[0, K)`.
        loss: float32 scalar, codebook and commitment terms.
    """

    quantized: Tensor
    codes: Tensor
    loss: Tensor


@torch.no_grad()
def nearest_code(latents: Tensor, codebook: Tensor) -> Tensor:
    """Index of the codebook entry nearest to each latent in squared distance.

    ‖z - e‖² is smallest where z·e - ½‖e‖² is largest, so one matrix product per chunk of rows is enough and no
    N × K distance matrix is kept. Computed in float32: lower precision flips near ties.

    Args:
        latents: `(N, D)`.
        codebook: `(K, D)`.

    Returns:
        int64 `(N,)`.
    """
    latents, codebook = latents.float(), codebook.float()
    offset = -0.5 * codebook.square().sum(1)
    chunks = [torch.addmm(offset, rows, codebook.T).argmax(1) for rows in latents.split(SEARCH_CHUNK)]
    return torch.cat(chunks)


class VectorQuantizer(nn.Module):
    """Nearest codebook entry with a straight-through gradient.

    With `l2_normalize` latents and entries are put on the unit sphere first, for the search and in the output.

    Source: van den Oord et al. 2017, "Neural discrete representation learning", section 3.2. The entries start uniform
    in (-1/K, 1/K).
    """

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.num_embeddings, config.embed_dim)
        self.l2_normalize = config.l2_normalize
        self.codebook_cost = config.commitment_cost if config.legacy_codebook_loss else 1.0
        self.commitment_cost = 1.0 if config.legacy_codebook_loss else config.commitment_cost

    @property
    def codebook(self) -> Tensor:
        """The entries as they are used: float32 `(K, D)`, of unit length with `l2_normalize`."""
        weight = self.embedding.weight.float()
        return F.normalize(weight, dim=-1) if self.l2_normalize else weight

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Quantizes latents `(B, D, h, w)`; see [`QuantizerOutput`]."""
        with torch.autocast(latents.device.type, enabled=False):
            z = rearrange(latents.float(), "B D h w -> B h w D")
            if self.l2_normalize:
                z = F.normalize(z, dim=-1)
            codebook = self.codebook
            codes = nearest_code(z.flatten(0, 2), codebook).view(z.shape[:3])
            zq = F.embedding(codes, codebook)
            # mean over all elements of ‖sg[z] - e‖² and of β·‖z - sg[e]‖²
            loss = self.codebook_cost * F.mse_loss(zq, z.detach()) + self.commitment_cost * F.mse_loss(z, zq.detach())
            quantized = z + (zq - z).detach()
        return QuantizerOutput(rearrange(quantized, "B h w D -> B D h w"), codes, loss)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codebook entries of int64 codes `(B, h, w)` as float32 `(B, D, h, w)`."""
        return rearrange(F.embedding(codes, self.codebook), "B h w D -> B D h w")
