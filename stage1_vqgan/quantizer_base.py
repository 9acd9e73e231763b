"""The base class of all quantizers: continuous latents → codes and quantized latents. quantizers.py lists the kinds.

Shape letters: B batch, D code width, h w code grid, K codebook size, N = B·h·w latents.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, distributed, nn

from .quantizer_grids import Grids

# Number of scores (latents × entries) that the search computes at once. On a CPU they fit in the cache of a core; other
# devices need more parallel work.
CPU_SCORES, DEVICE_SCORES = 2**20, 2**27


@dataclass
class QuantizerOutput:
    """Output of a quantizer.

    Attributes:
        quantized: float32 `(B, D, h, w)`; its gradient is passed on to the latents.
        codes: int64 in `[0, K)`: `(B, h, w)`, or another shape, see `codes_shape`.
        loss: float32 scalar, the weighted sum of the quantizer's loss terms.
    """

    quantized: Tensor
    codes: Tensor
    loss: Tensor


@dataclass(frozen=True, kw_only=True)
class QuantizerOptions:
    """Options of a kind of quantizer: the fields of a subclass, which `VQGANConfig.quantizer_options` sets."""

    # Options that determine which code a latent gets or what a code stands for. They are part of the fingerprint.
    DECIDE_CODES: ClassVar[frozenset[str]] = frozenset()

    def problems(self, num_embeddings: int, embed_dim: int) -> Iterator[tuple[str, Any, str]]:
        """Every invalid value, as `(name, value received, what is allowed)`.

        The name is an option, "num_embeddings" or "embed_dim".
        """
        yield from ()

    def grids(self, height: int, width: int) -> Grids:
        """The grids of the codes of latents `(B, D, h, w)`, in the order of the flattened codes."""
        return ((height, width, 1),)


class QuantizerBase(nn.Module, ABC):
    """Maps latents to codes, and codes to quantized latents.

    A subclass implements `forward` and `lookup`, and declares its `Options`. One that learns outside of gradients also
    overrides `prepare`, `observe` or `update`; one with several codebooks overrides `codebooks`, `inputs` and
    `entry_numbers`. All methods compute in float32, even under autocast.

    Args:
        num_embeddings: K.
        embed_dim: D.
        options: an instance of `Options`.
    """

    Options: type[QuantizerOptions] = QuantizerOptions

    def __init__(self, num_embeddings: int, embed_dim: int, options: Any):
        super().__init__()
        self.num_embeddings, self.embed_dim, self.options = num_embeddings, embed_dim, options

    @abstractmethod
    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Quantizes latents `(B, D, h, w)`; see [`QuantizerOutput`]."""

    @abstractmethod
    def lookup(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """The quantized latents that int64 codes stand for, float32 `(B, D, h, w)`.

        Args:
            codes: `(B, *codes_shape(self.grids(h, w)))` in `[0, K)`.
            grid: h and w; needed for codes of several grids, which do not show them.
        """

    def grids(self, height: int, width: int) -> Grids:
        """See [`QuantizerOptions`]."""
        return self.options.grids(height, width)

    @property
    def codebooks(self) -> list["CodebookQuantizer"]:
        """The quantizers whose entries k-means may place and a restart may move, in the order of their use."""
        return []

    @property
    def num_entries(self) -> int:
        """Number of entries of all codebooks."""
        return self.num_embeddings * max(1, len(self.codebooks))

    @torch.no_grad()
    def inputs(self, latents: Tensor) -> list[Tensor]:
        """What each of the `codebooks` quantizes of latents `(B, D, h, w)`: float32 rows `(N, D)`."""
        return [latent_rows(latents)]

    def entry_numbers(self, codes: Tensor, grid: tuple[int, int]) -> Tensor:
        """Codes, numbered through all codebooks: the entries of the second codebook follow on those of the first.

        Args:
            codes, grid: see `lookup`.

        Returns:
            int64 of the shape of `codes`, in `[0, num_entries)`.
        """
        return codes

    def freeze(self) -> None:
        """Sets `requires_grad` to False where gradients must not train a weight.

        `__init__` and `VQGANModel.from_pretrained` call it, because transformers makes all loaded weights trainable.
        """

    def prepare(self, progress: float, image_seeds: Sequence[int]) -> None:
        """Called before every forward in training.

        Args:
            progress: fraction of the training that is done, in [0, 1).
            image_seeds: a seed for each image of the batch; it does not depend on the number of processes.
        """

    def observe(self, latents: Tensor, codes: Tensor) -> None:
        """Called after every forward in training, with latents `(B, D, h, w)` and their codes."""

    def update(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Called after every optimizer step; `reduce` sums a tensor over processes."""


class Quantizer(QuantizerBase):
    """Quantizes each latent by itself: to one code, or to several.

    A subclass implements `quantize` (latents → codes) and `entries` (codes → latents).
    """

    @abstractmethod
    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantizes float32 latents `(N, D)`.

        Returns:
            Quantized `(N, D)`; int64 codes `(N,)`, or `(N, G)` with several codes for each latent; the loss, a scalar.
        """

    @abstractmethod
    def entries(self, codes: Tensor) -> Tensor:
        """The quantized latents that int64 codes `(…)` or `(…, G)` stand for, float32 `(…, D)`."""

    def forward(self, latents: Tensor) -> QuantizerOutput:
        batch, _, height, width = latents.shape
        with torch.autocast(latents.device.type, enabled=False):
            quantized, codes, loss = self.quantize(latent_rows(latents))
        quantized = rearrange(quantized, "(B h w) D -> B D h w", h=height, w=width)
        if latents.is_contiguous():  # otherwise they are channels-last, like `quantized`
            quantized = quantized.contiguous()
        return QuantizerOutput(quantized, codes.view(batch, height, width, *codes.shape[1:]), loss)

    def lookup(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        return rearrange(self.entries(codes), "B h w D -> B D h w")


class CodebookQuantizer(Quantizer):
    """A quantizer whose codes stand for K points in latent space: k-means may place them, and a restart may move them.

    A subclass implements `quantize`, `codebook`, `entry_weights` and `move_entries`.
    """

    # Whether only the direction of an entry matters: k-means and restarts then stay on the unit sphere.
    l2_normalize = False

    @property
    def codebooks(self) -> list["CodebookQuantizer"]:
        return [self]

    @property
    @abstractmethod
    def codebook(self) -> Tensor:
        """The entries as `quantize` and the decoder use them, float32 `(K, D)`."""

    @abstractmethod
    def entry_weights(self) -> list[Tensor]:
        """The weights with one row for each entry. A restart sets what the optimizer recalls of moved rows to 0."""

    @abstractmethod
    def move_entries(self, codes: Tensor, rows: Tensor) -> None:
        """Moves the entries of different int64 codes `(M,)` to `rows` `(M, D)`, and forgets statistics about them."""

    def place_entries(self, centres: Tensor) -> None:
        """Moves all entries to `centres` `(K, D)`, before the first step."""
        self.move_entries(torch.arange(self.num_embeddings, device=centres.device), centres)

    def entries(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.codebook)


@torch.no_grad()
def nearest_code(latents: Tensor, codebook: Tensor) -> Tensor:
    """Index of the codebook entry nearest to each latent in squared distance.

    ‖z - e‖² is smallest where z·e - ½‖e‖² = [z, 1]·[e, -½‖e‖²] is largest. So the search is one matrix product for each
    chunk of latents, written to the same memory, without an N × K distance matrix. It is computed in float32, because
    a lower precision changes codes whose distances are nearly equal.

    Args:
        latents: `(N, D)`.
        codebook: `(K, D)`.

    Returns:
        int64 `(N,)`; if several entries are equally near, the first of them.
    """
    latents, codebook = latents.float(), codebook.float()
    queries = F.pad(latents, (0, 1), value=1.0)
    return most_similar_code(queries, torch.cat([codebook, -0.5 * codebook.square().sum(1, keepdim=True)], dim=1))


@torch.no_grad()
def most_similar_code(latents: Tensor, codebook: Tensor) -> Tensor:
    """Index of the codebook entry with the largest inner product with each latent; otherwise like `nearest_code`."""
    latents, codebook = latents.float(), codebook.float()
    num_scores = CPU_SCORES if latents.device.type == "cpu" else DEVICE_SCORES
    chunks = latents.split(max(1, num_scores // len(codebook)))
    scores = latents.new_empty(len(chunks[0]), len(codebook))
    # on a CPU, max is twice as fast as argmax
    return torch.cat([torch.mm(chunk, codebook.T, out=scores[: len(chunk)]).max(1).indices for chunk in chunks])


def straight_through(z: Tensor, quantized: Tensor) -> Tensor:
    """Returns `quantized`, whose gradient is passed on to `z` unchanged.

    Source: Bengio et al. 2013, "Estimating or propagating gradients through stochastic neurons".
    """
    return z + (quantized - z).detach()


def entropy(probabilities: Tensor) -> Tensor:
    """-Σ p ln p over the last axis, in nats."""
    return -(probabilities * probabilities.clamp(min=1e-10).log()).sum(-1)


def mean_over_processes(value: Tensor) -> Tensor:
    """Mean of a tensor over all processes, for use in a loss.

    Its gradient is that of this process's value alone. Data-parallel training averages gradients over processes, which
    results in the gradient of the mean.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        return value
    total = value.detach().clone()
    distributed.all_reduce(total)
    return value + (total / distributed.get_world_size() - value.detach())


def latent_rows(latents: Tensor) -> Tensor:
    """Latents `(B, D, h, w)` as float32 rows `(B·h·w, D)`."""
    return rearrange(latents.float(), "B D h w -> (B h w) D")


def unit_length(rows: Tensor) -> Tensor:
    """Divides rows `(…, D)` by their Euclidean norm."""
    return F.normalize(rows, dim=-1)
