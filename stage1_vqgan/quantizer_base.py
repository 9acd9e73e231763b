"""What all vector quantizers share: continuous latents in, codes and quantized latents out.

Shape letters: B batch, D code width, h w code grid, K codebook size, N = B·h·w latents.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, distributed, nn

# Scores of latents against entries that the search holds at a time: few enough for the cache of a CPU core, enough to
# fill another device.
CPU_SCORES, DEVICE_SCORES = 2**20, 2**27


@dataclass
class QuantizerOutput:
    """What a quantizer returns.

    Attributes:
        quantized: float32 `(B, D, h, w)`; its gradient reaches the latents.
        codes: int64 `(B, h, w)` in `[0, K)`.
        loss: float32 scalar, everything the quantizer asks of latents and codebook.
    """

    quantized: Tensor
    codes: Tensor
    loss: Tensor


@dataclass(frozen=True, kw_only=True)
class QuantizerOptions:
    """The options of one kind of quantizer."""

    # Options that decide which code a latent gets, or what a code means: part of a tokenizer's fingerprint.
    DECIDE_CODES: ClassVar[frozenset[str]] = frozenset()

    def problems(self, num_embeddings: int, embed_dim: int) -> Iterator[tuple[str, Any, str]]:
        """What cannot be built, as `(option, "num_embeddings" or "embed_dim", value received, what is allowed)`."""
        yield from ()


class Quantizer(nn.Module):
    """Maps each latent to one of K codes. A kind of quantizer is a subclass, its options, and a name in `QUANTIZERS`.

    Subclasses say how rows of latents are quantized (`quantize`) and what a code stands for (`entries`). All of it is
    computed in float32, also under autocast.

    Args:
        num_embeddings: K.
        embed_dim: D.
        options: of this kind.
    """

    Options: type[QuantizerOptions] = QuantizerOptions
    # Whether codes stand for points among the latents, which k-means may place and a restart may move.
    has_codebook = False

    def __init__(self, num_embeddings: int, embed_dim: int, options: Any):
        super().__init__()
        self.num_embeddings, self.embed_dim, self.options = num_embeddings, embed_dim, options

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """float32 latents `(N, D)` → quantized `(N, D)`, int64 codes `(N,)`, loss."""
        raise NotImplementedError

    def entries(self, codes: Tensor) -> Tensor:
        """What int64 codes of any shape stand for, float32 with D as one more axis at the end."""
        raise NotImplementedError

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Quantizes latents `(B, D, h, w)`; see [`QuantizerOutput`]."""
        batch, _, height, width = latents.shape
        with torch.autocast(latents.device.type, enabled=False):
            quantized, codes, loss = self.quantize(rearrange(latents.float(), "B D h w -> (B h w) D"))
        quantized = rearrange(quantized, "(B h w) D -> B D h w", h=height, w=width)
        if latents.is_contiguous():  # else they are channels-last, as this is
            quantized = quantized.contiguous()
        return QuantizerOutput(quantized, codes.view(batch, height, width), loss)

    def lookup(self, codes: Tensor) -> Tensor:
        """What int64 codes `(B, h, w)` stand for, float32 `(B, D, h, w)`."""
        return rearrange(self.entries(codes), "B h w D -> B D h w")

    def prepare(self, progress: float, image_seeds: Sequence[int]) -> None:
        """Told before every forward in training.

        Args:
            progress: share of the training done, in [0, 1).
            image_seeds: one for each image of the batch, the same however the batch is spread over processes.
        """

    def observe(self, latents: Tensor, codes: Tensor) -> None:
        """Told the outcome of every forward in training: latents `(B, D, h, w)`, codes `(B, h, w)`."""

    def update(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Called after every optimizer step; `reduce` sums over processes."""


@torch.no_grad()
def nearest_code(latents: Tensor, codebook: Tensor) -> Tensor:
    """Index of the codebook entry nearest to each latent in squared distance.

    ‖z - e‖² is smallest where z·e - ½‖e‖² = [z, 1]·[e, -½‖e‖²] is largest: one matrix product per chunk of latents,
    into the same memory every time, and no N × K distance matrix. Computed in float32: lower precision flips near ties.

    Args:
        latents: `(N, D)`.
        codebook: `(K, D)`.

    Returns:
        int64 `(N,)`; of entries that are equally near, the first.
    """
    latents, codebook = latents.float(), codebook.float()
    queries = F.pad(latents, (0, 1), value=1.0)
    entries = torch.cat([codebook, -0.5 * codebook.square().sum(1, keepdim=True)], dim=1)
    num_scores = CPU_SCORES if latents.device.type == "cpu" else DEVICE_SCORES
    chunks = queries.split(max(1, num_scores // len(codebook)))
    scores = queries.new_empty(len(chunks[0]), len(codebook))
    # on a CPU max finds the index in half the time of argmax
    return torch.cat([torch.mm(chunk, entries.T, out=scores[: len(chunk)]).max(1).indices for chunk in chunks])


def straight_through(z: Tensor, quantized: Tensor) -> Tensor:
    """The value of `quantized` with the gradient of `z` (Bengio et al. 2013)."""
    return z + (quantized - z).detach()


def entropy(probabilities: Tensor) -> Tensor:
    """-Σ p ln p over the last axis, in nats."""
    return -(probabilities * probabilities.clamp(min=1e-10).log()).sum(-1)


def mean_over_processes(value: Tensor) -> Tensor:
    """Mean of a tensor over the processes of a job, for use in a loss.

    Its gradient is that of this process's own value: averaged over processes, as data-parallel training does with
    gradients, it is the gradient of the mean.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        return value
    total = value.detach().clone()
    distributed.all_reduce(total)
    return value + (total / distributed.get_world_size() - value.detach())


def unit_length(rows: Tensor) -> Tensor:
    """Rows `(…, D)` put on the unit sphere."""
    return F.normalize(rows, dim=-1)
