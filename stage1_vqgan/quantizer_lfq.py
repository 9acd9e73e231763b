"""Lookup-free quantization ("lfq"): a code is the signs of a latent's channels."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .quantizer_base import Quantizer, QuantizerOptions, entropy, mean_over_processes, straight_through


@dataclass(frozen=True, kw_only=True)
class LFQuantizerOptions(QuantizerOptions):
    """Options of [`LFQuantizer`].

    Args:
        commitment_cost: β, weight of the squared distance of a latent from its code.
        entropy_weight: weight of the entropy term of the loss in training; without it, few codes are used.
        diversity_weight: weight, within the entropy term, of the entropy of the mean distribution over codes. The term
            raises it, so that all codes are used, and lowers the mean entropy of each latent's distribution.
        entropy_temperature: temperature of the softmax over negative squared distances in the entropy term.
    """

    commitment_cost: float | int = 0.25
    entropy_weight: float | int = 0.1
    diversity_weight: float | int = 1.0
    entropy_temperature: float | int = 0.1

    def problems(self, num_embeddings: int, embed_dim: int) -> Iterator[tuple[str, Any, str]]:
        if embed_dim > 62 or num_embeddings != 2**embed_dim:
            bits = max(1, math.ceil(math.log2(max(2, num_embeddings))))
            allowed = f"there are 2 ** embed_dim codes: set num_embeddings to {2**bits} and embed_dim to {bits}"
            yield "embed_dim", embed_dim, allowed
        for name in ("commitment_cost", "entropy_weight", "diversity_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                yield name, getattr(self, name), "must be a number from 0 up"
        if not 0 < self.entropy_temperature < float("inf"):
            yield "entropy_temperature", self.entropy_temperature, "must be a number above 0"


class LFQuantizer(Quantizer):
    """Maps every channel to -1 or 1; these bits form the code. The first channel is the most significant bit.

    Source: Yu et al. 2024, "Language model beats diffusion: tokenizer is key to visual generation", section 3.
    """

    Options = LFQuantizerOptions

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes = self.codes_of(z)
        signs = self.entries(codes)
        loss = self.options.commitment_cost * F.mse_loss(z, signs)
        if self.options.entropy_weight and self.training:
            loss = loss + self.options.entropy_weight * self.entropy_loss(z)
        return straight_through(z, signs), codes, loss

    def codes_of(self, z: Tensor) -> Tensor:
        """The codes int64 `(N,)` that the signs of latents `(N, D)` form."""
        return ((z > 0) * self._place_values(z.device)).sum(1)

    def entries(self, codes: Tensor) -> Tensor:
        return 2.0 * (codes[..., None] // self._place_values(codes.device) % 2) - 1

    def entropy_loss(self, z: Tensor) -> Tensor:
        """Mean over latents of the entropy of their softmax over all 2^D codes, minus the weighted entropy of the mean
        softmax of the batch of all processes; a scalar.

        The softmax over negative squared distances factorizes over bits. So its entropy is the sum of the entropies of
        the bits, and the mean over N latents is the product of two matrices, one for each half of the bits. This needs
        no tensor of size N × K.
        """
        on = torch.sigmoid(4 * z / self.options.entropy_temperature)  # ‖z + 1‖² - ‖z - 1‖² = 4z
        bits = torch.stack([1 - on, on], -1)
        mean_entropy = entropy(bits).sum(1).mean()
        half = self.embed_dim // 2
        probabilities = (_joint(bits[:, :half]).T @ _joint(bits[:, half:])).flatten() / len(z)
        return mean_entropy - self.options.diversity_weight * entropy(mean_over_processes(probabilities))

    def _place_values(self, device: torch.device) -> Tensor:
        return 2 ** torch.arange(self.embed_dim - 1, -1, -1, device=device)


def _joint(bits: Tensor) -> Tensor:
    """Probabilities of independent bits, `(N, d, 2)` → probabilities of all their combinations, `(N, 2^d)`.

    The first bit is the most significant one.
    """
    joint = bits.new_ones(len(bits), 1)
    for bit in bits.unbind(1):
        joint = (joint[:, :, None] * bit[:, None]).flatten(1)
    return joint
