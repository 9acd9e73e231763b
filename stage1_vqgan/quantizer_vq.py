"""Vector quantization ("vq"): the nearest entry of a codebook that is trained by gradients."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .quantizer_base import (
    CodebookQuantizer,
    Quantizer,
    QuantizerOptions,
    nearest_code,
    straight_through,
    unit_length,
)
from .quantizer_softmax import entropy_loss


@dataclass(frozen=True, kw_only=True)
class NearestEntryOptions(QuantizerOptions):
    """Options of [`NearestEntryQuantizer`].

    Args:
        commitment_cost: β, weight of the commitment term.
        l2_normalize: normalize latents and entries to unit length, for the search and in the output (Yu et al. 2022,
            "Vector-quantized image modeling with improved VQGAN", section 3.2); works best with a small `embed_dim`.
        entropy_weight: weight of the entropy term of the loss in training. The term lowers the entropy of the code
            distribution of each latent, and raises the entropy of their mean, so that all codes are used.
        entropy_temperature: temperature of the softmax over negative squared distances in the entropy term.
        rotation_trick: pass the gradient to the latent through the rotation and scaling that map the latent onto its
            entry, instead of straight through (Fifty et al. 2024, "Restructuring vector quantization with the rotation
            trick").
    """

    DECIDE_CODES: ClassVar[frozenset[str]] = frozenset({"l2_normalize"})

    commitment_cost: float | int = 0.25
    l2_normalize: bool = False
    entropy_weight: float | int = 0.0
    entropy_temperature: float | int = 0.01
    rotation_trick: bool = False

    @property
    def costs(self) -> tuple[float, float]:
        """Weights of the codebook term and of the commitment term."""
        return 1.0, self.commitment_cost

    def problems(self, num_embeddings: int, embed_dim: int) -> Iterator[tuple[str, Any, str]]:
        for name in ("commitment_cost", "entropy_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                yield name, getattr(self, name), "must be a number from 0 up"
        if not 0 < self.entropy_temperature < float("inf"):
            yield "entropy_temperature", self.entropy_temperature, "must be a number above 0"


class NearestEntryQuantizer(Quantizer):
    """Takes the nearest entry of a codebook, with a straight-through gradient. A subclass provides the codebook.

    Source: van den Oord et al. 2017, "Neural discrete representation learning", section 3.2.
    """

    def __init__(self, num_embeddings: int, embed_dim: int, options: NearestEntryOptions):
        super().__init__(num_embeddings, embed_dim, options)
        self.l2_normalize = options.l2_normalize

    @property
    @abstractmethod
    def codebook(self) -> Tensor:
        """The entries, float32 `(K, D)`, of unit length with `l2_normalize`."""

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codebook, options = self.codebook, self.options
        if self.l2_normalize:
            z = unit_length(z)
        codes = nearest_code(z, codebook)
        zq = F.embedding(codes, codebook)
        # mean over all elements of ‖sg[z] - e‖² and of β·‖z - sg[e]‖²
        codebook_cost, commitment_cost = options.costs
        loss = codebook_cost * F.mse_loss(zq, z.detach()) + commitment_cost * F.mse_loss(z, zq.detach())
        if options.entropy_weight and self.training:
            loss = loss + options.entropy_weight * self.entropy_loss(z, codebook)
        return rotate(z, zq) if options.rotation_trick else straight_through(z, zq), codes, loss

    def entropy_loss(self, z: Tensor, codebook: Tensor) -> Tensor:
        """See `entropy_loss`, for the softmax of -‖z - e‖² / temperature. ‖z‖² cancels, and 2 z·e - ‖e‖² remains."""
        keys = torch.cat([2 * codebook, -codebook.square().sum(1, keepdim=True)], 1) / self.options.entropy_temperature
        return entropy_loss(F.pad(z, (0, 1), value=1.0), keys)


@dataclass(frozen=True, kw_only=True)
class VectorQuantizerOptions(NearestEntryOptions):
    """Options of [`VectorQuantizer`]: those of [`NearestEntryOptions`], and one more.

    Args:
        legacy_codebook_loss: apply β to the codebook term instead, as the released models of the original do.
    """

    legacy_codebook_loss: bool = False

    @property
    def costs(self) -> tuple[float, float]:
        return (self.commitment_cost, 1.0) if self.legacy_codebook_loss else (1.0, self.commitment_cost)


class Codebook(nn.Embedding):
    """Entries `(K, D)`, initialized uniformly in (-1/K, 1/K)."""

    def reset_parameters(self) -> None:
        init.uniform_(self.weight, -1 / self.num_embeddings, 1 / self.num_embeddings)


class VectorQuantizer(NearestEntryQuantizer, CodebookQuantizer):
    """A codebook of free weights, trained by gradients."""

    Options: Any = VectorQuantizerOptions

    def __init__(self, num_embeddings: int, embed_dim: int, options: NearestEntryOptions):
        super().__init__(num_embeddings, embed_dim, options)
        self.embedding = Codebook(num_embeddings, embed_dim)

    @property
    def codebook(self) -> Tensor:
        weight = self.embedding.weight.float()
        return unit_length(weight) if self.l2_normalize else weight

    def entry_weights(self) -> list[Tensor]:
        return [self.embedding.weight]

    @torch.no_grad()
    def move_entries(self, codes: Tensor, rows: Tensor) -> None:
        self.embedding.weight[codes] = rows.to(self.embedding.weight.dtype)


def rotate(z: Tensor, zq: Tensor) -> Tensor:
    """Returns zq, written as a rotation and scaling of z, through which the gradient is passed back to z.

    With the unit vectors u of z and v of zq, and r = (u + v) / ‖u + v‖,
    zq = ‖zq‖/‖z‖ · (z - 2 r rᵀz + 2 v uᵀz), where everything but z is a constant.

    Source: Fifty et al. 2024, "Restructuring vector quantization with the rotation trick", section 4.2.
    """
    with torch.no_grad():
        u, v = unit_length(z), unit_length(zq)
        r = unit_length(u + v)
        scale = zq.norm(dim=-1, keepdim=True) / z.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    along = 2 * (z * r).sum(-1, keepdim=True) * r
    rotated = scale * (z - along + 2 * (z * u).sum(-1, keepdim=True) * v)
    return rotated + (zq - rotated).detach()  # the value is exactly the entry, without the rounding of the rotation
