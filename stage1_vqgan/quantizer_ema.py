"""Vector quantization by moving averages ("ema"): each entry is the average of the latents that chose it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .quantizer_base import unit_length
from .quantizer_vq import NearestEntryOptions, VectorQuantizer


@dataclass(frozen=True, kw_only=True)
class EMAQuantizerOptions(NearestEntryOptions):
    """Options of [`EMAQuantizer`]: those of [`NearestEntryOptions`], and two more. The loss has no codebook term, and
    the entropy term acts on the latents alone.

    Args:
        decay: γ, decay of the moving averages per optimizer step.
        epsilon: ε, constant of the Laplace smoothing of cluster sizes.
    """

    decay: float | int = 0.99
    epsilon: float | int = 1e-5

    @property
    def costs(self) -> tuple[float, float]:
        return 0.0, self.commitment_cost

    def problems(self, num_embeddings: int, embed_dim: int) -> Iterator[tuple[str, Any, str]]:
        yield from super().problems(num_embeddings, embed_dim)
        if not 0 <= self.decay < 1:
            yield "decay", self.decay, "must be at least 0 and below 1"
        if not 0 < self.epsilon < float("inf"):
            yield "epsilon", self.epsilon, "must be a number above 0"


class EMAQuantizer(VectorQuantizer):
    """A codebook without gradients: every entry is the moving average of the latents that chose it.

    Let n be the number of latents of each code and s their sum, over all processes. After an optimizer step,
    N ← γN + (1-γ)n, m ← γm + (1-γ)s, e ← m / Ñ, with Ñ = (N + ε) / (ΣN + Kε) · ΣN.
    m is not stored: it equals e·Ñ. N starts at 1. An entry that no latent chooses stays where it is, as without the
    smoothing: m / N does not change then, but m / Ñ would shrink to 0 once N has fallen below ε.

    Source: van den Oord et al. 2017, "Neural discrete representation learning", appendix A.1; smoothing as in
    Razavi et al. 2019, "Generating diverse high-fidelity images with VQ-VAE-2", whose unchosen entries shrink.
    """

    Options = EMAQuantizerOptions
    cluster_size: Tensor

    def __init__(self, num_embeddings: int, embed_dim: int, options: EMAQuantizerOptions):
        super().__init__(num_embeddings, embed_dim, options)
        self.decay, self.epsilon = options.decay, options.epsilon
        self.freeze()
        self.register_buffer("cluster_size", torch.ones(num_embeddings))
        self._counts_and_sums: Tensor | None = None

    def freeze(self) -> None:
        self.embedding.requires_grad_(False)

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
        entries = self.embedding.weight
        moving = self.decay * entries * self.smoothed_size + (1 - self.decay) * sums
        self.cluster_size.lerp_(counts[:, 0].to(self.cluster_size.dtype), 1 - self.decay)
        entries.copy_(torch.where(counts > 0, moving / self.smoothed_size, entries))

    @torch.no_grad()
    def move_entries(self, codes: Tensor, rows: Tensor) -> None:
        super().move_entries(codes, rows)
        self.cluster_size[codes] = 1.0
