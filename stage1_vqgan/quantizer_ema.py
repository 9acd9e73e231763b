"""Vector quantization by moving averages ("ema"): each entry is the average of the latents that chose it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .quantizer_base import QuantizerOptions, unit_length
from .quantizer_vq import VectorQuantizer, VectorQuantizerOptions


@dataclass(frozen=True, kw_only=True)
class EMAQuantizerOptions(QuantizerOptions):
    """Options of [`EMAQuantizer`].

    Args:
        commitment_cost: β, weight of the commitment term, the only term of the loss.
        decay: γ, decay of the moving averages per optimizer step.
        epsilon: ε, constant of the Laplace smoothing of cluster sizes.
        l2_normalize: as in [`VectorQuantizerOptions`].
    """

    DECIDE_CODES: ClassVar[frozenset[str]] = frozenset({"l2_normalize"})

    commitment_cost: float | int = 0.25
    decay: float | int = 0.99
    epsilon: float | int = 1e-5
    l2_normalize: bool = False

    def problems(self, num_embeddings: int, embed_dim: int) -> Iterator[tuple[str, Any, str]]:
        if not 0 <= self.commitment_cost < float("inf"):
            yield "commitment_cost", self.commitment_cost, "must be a number from 0 up"
        if not 0 <= self.decay < 1:
            yield "decay", self.decay, "must be at least 0 and below 1"
        if not 0 < self.epsilon < float("inf"):
            yield "epsilon", self.epsilon, "must be a number above 0"


class EMAQuantizer(VectorQuantizer):
    """A codebook without gradients: every entry is the moving average of the latents that chose it.

    Let n be the number of latents of each code and s their sum, over all processes. After an optimizer step,
    N ← γN + (1-γ)n, m ← γm + (1-γ)s, e ← m / Ñ, with Ñ = (N + ε) / (ΣN + Kε) · ΣN.
    m is not stored: it equals e·Ñ. N starts at 1, so that an entry that no latent chooses does not move.

    Source: van den Oord et al. 2017, "Neural discrete representation learning", appendix A.1; smoothing as in
    Razavi et al. 2019, "Generating diverse high-fidelity images with VQ-VAE-2".
    """

    Options: Any = EMAQuantizerOptions
    cluster_size: Tensor

    def __init__(self, num_embeddings: int, embed_dim: int, options: EMAQuantizerOptions):
        gradients = VectorQuantizerOptions(commitment_cost=options.commitment_cost, l2_normalize=options.l2_normalize)
        super().__init__(num_embeddings, embed_dim, gradients)
        self.decay, self.epsilon = options.decay, options.epsilon
        self.codebook_cost = 0.0
        self.embedding.requires_grad_(False)
        self.register_buffer("cluster_size", torch.ones(num_embeddings))
        self._counts_and_sums: Tensor | None = None

    @property
    def smoothed_size(self) -> Tensor:
        """Ñ, float32 `(K, 1)`."""
        size = self.cluster_size.float()
        total = size.sum()
        return ((size + self.epsilon) / (total + self.num_embeddings * self.epsilon) * total)[:, None]

    @torch.no_grad()
    def observe(self, latents: Tensor, codes: Tensor) -> None:
        z = rearrange(latents.float(), "B D h w -> (B h w) D")
        if self.l2_normalize:
            z = unit_length(z)
        one_hot_sums = F.pad(z, (1, 0), value=1.0)  # the sums of a column of ones are the counts
        seen = z.new_zeros(self.num_embeddings, self.embed_dim + 1).index_add_(0, codes.flatten(), one_hot_sums)
        self._counts_and_sums = seen if self._counts_and_sums is None else self._counts_and_sums + seen

    @torch.no_grad()
    def update(self, reduce: Callable[[Tensor], Tensor]) -> None:
        if self._counts_and_sums is None:
            return
        counts, sums = reduce(self._counts_and_sums).split([1, self.embed_dim], dim=1)
        self._counts_and_sums = None
        moving = self.decay * self.embedding.weight * self.smoothed_size + (1 - self.decay) * sums
        self.cluster_size.lerp_(counts[:, 0].to(self.cluster_size.dtype), 1 - self.decay)
        self.embedding.weight.copy_(moving / self.smoothed_size)

    @torch.no_grad()
    def move_entries(self, codes: Tensor, rows: Tensor) -> None:
        super().move_entries(codes, rows)
        self.cluster_size[codes] = 1.0
