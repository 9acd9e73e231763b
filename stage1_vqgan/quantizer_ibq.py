"""Index backpropagation quantization ("ibq"): the most similar entry, with a gradient to all entries."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .quantizer_base import Quantizer, QuantizerOptions, most_similar_code
from .quantizer_softmax import entropy_loss, one_hot_entries


@dataclass(frozen=True, kw_only=True)
class IBQuantizerOptions(QuantizerOptions):
    """Options of [`IBQuantizer`].

    Args:
        codebook_cost: β, weight of the codebook term of the loss; the other two terms have weight 1.
        entropy_weight: weight of the entropy term of the loss in training. The term lowers the entropy of the code
            distribution of each latent, and raises the entropy of their mean, so that all codes are used.
        entropy_temperature: temperature of the softmax over similarities in the entropy term.
    """

    codebook_cost: float | int = 0.25
    entropy_weight: float | int = 0.05
    entropy_temperature: float | int = 0.01

    def problems(self, num_embeddings: int, embed_dim: int) -> Iterator[tuple[str, Any, str]]:
        for name in ("codebook_cost", "entropy_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                yield name, getattr(self, name), "must be a number from 0 up"
        if not 0 < self.entropy_temperature < float("inf"):
            yield "entropy_temperature", self.entropy_temperature, "must be a number above 0"


class IBQuantizer(Quantizer):
    """The entry with the largest inner product with the latent; the gradient is that of a softmax over all entries.

    The one-hot vector of the code is straight-through: its gradient is passed on to the softmax of the similarities,
    and so to the latent and to all entries at once.

    Source: Shi et al. 2025, "Scalable image tokenization with index backpropagation quantization", section 3.2; the
    weights of the loss's terms are those of their code.
    """

    Options = IBQuantizerOptions

    def __init__(self, num_embeddings: int, embed_dim: int, options: IBQuantizerOptions):
        super().__init__(num_embeddings, embed_dim, options)
        self.embedding = nn.Embedding(num_embeddings, embed_dim)

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codebook = self.embedding.weight.float()
        codes = most_similar_code(z, codebook)
        hard, zq = F.embedding(codes, codebook), one_hot_entries(z, codebook, codes)
        # the double quantization loss: ‖z - zq‖² with the gradient of the code, then ‖z - sg[e]‖² and β·‖sg[z] - e‖²
        loss = F.mse_loss(zq, z) + F.mse_loss(z, hard.detach())
        loss = loss + self.options.codebook_cost * F.mse_loss(hard, z.detach())
        if self.options.entropy_weight and self.training:
            loss = loss + self.options.entropy_weight * entropy_loss(z, codebook / self.options.entropy_temperature)
        return zq, codes, loss

    def entries(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.embedding.weight.float())
