"""Gumbel-softmax quantization ("gumbel"): codes are drawn in training, and are the most likely ones in evaluation."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .quantizer_base import CodebookQuantizer, QuantizerOptions


@dataclass(frozen=True, kw_only=True)
class GumbelQuantizerOptions(QuantizerOptions):
    """Options of [`GumbelQuantizer`].

    Args:
        kl_weight: weight of the KL divergence of the code distribution from the uniform distribution.
        temperature_start, temperature_end: τ at the start and the end of the training; it follows half a cosine.
        straight_through: in training, decode the drawn entry, with the gradient of the soft mixture of entries; false
            decodes the mixture.
        sharpness: how sharply the choices fall on near entries when k-means places the entries: the mean of the
            logits' differences between the nearest point and a random entry. The noise has a spread of 1.28.
    """

    kl_weight: float | int = 5e-4
    temperature_start: float | int = 1.0
    temperature_end: float | int = 0.0625
    straight_through: bool = True
    sharpness: float | int = 30.0

    def problems(self, num_embeddings: int, embed_dim: int) -> Iterator[tuple[str, Any, str]]:
        if not 0 <= self.kl_weight < float("inf"):
            yield "kl_weight", self.kl_weight, "must be a number from 0 up"
        for name in ("temperature_start", "temperature_end", "sharpness"):
            if not 0 < getattr(self, name) < float("inf"):
                yield name, getattr(self, name), "must be a number above 0"


class GumbelQuantizer(CodebookQuantizer):
    """A categorical distribution over codes for each latent, relaxed by Gumbel-softmax.

    Codes are drawn in training. In evaluation they are the most likely ones, so an image always has the same codes. The
    noise of an image depends on its seed alone (see `prepare`).

    Source: Jang et al. 2017, "Categorical reparameterization with Gumbel-softmax"; Ramesh et al. 2021, "Zero-shot
    text-to-image generation", section 2.1; the divergence term Σ q ln(K·q) as in Esser et al. 2021's code.
    """

    Options = GumbelQuantizerOptions

    def __init__(self, num_embeddings: int, embed_dim: int, options: GumbelQuantizerOptions):
        super().__init__(num_embeddings, embed_dim, options)
        self.proj = nn.Conv2d(embed_dim, num_embeddings, 1)
        self.embed = nn.Embedding(num_embeddings, embed_dim)
        self.temperature = float(options.temperature_start)
        self._image_seeds: Sequence[int] = ()

    def prepare(self, progress: float, image_seeds: Sequence[int]) -> None:
        start, end = self.options.temperature_start, self.options.temperature_end
        self.temperature = end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress))
        self._image_seeds = image_seeds

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(z, self.proj.weight.float().flatten(1), cast(Tensor, self.proj.bias).float())
        q = logits.softmax(1)
        divergence = (q * torch.log(q * self.num_embeddings + 1e-10)).sum(1).mean()
        loss = self.options.kl_weight * divergence
        codebook = self.codebook
        if not self.training:
            codes = logits.argmax(1)
            return F.embedding(codes, codebook), codes, loss
        soft = ((logits + self._gumbel_noise(logits)) / self.temperature).softmax(1)
        codes = soft.argmax(1)
        if self.options.straight_through:
            soft = soft + (F.one_hot(codes, self.num_embeddings) - soft).detach()
        return soft @ codebook, codes, loss

    @property
    def codebook(self) -> Tensor:
        return self.embed.weight.float()

    def entry_weights(self) -> list[Tensor]:
        return [self.embed.weight, self.proj.weight, cast(Tensor, self.proj.bias)]

    @torch.no_grad()
    def place_entries(self, centres: Tensor) -> None:
        """Makes the logits -½ s ‖z - e‖², up to a constant of z: a soft choice of near entries.

        Two random entries differ by 2 Σ var(e) in the mean of the squared distance, which `sharpness` divides by.
        """
        self._set(torch.arange(len(centres), device=centres.device), centres, self._initial_scale(centres))

    @torch.no_grad()
    def move_entries(self, codes: Tensor, rows: Tensor) -> None:
        """The moved entries get the scale that the others have learnt, or the initial one if that attracts nothing."""
        entries, weights = self.codebook, self.proj.weight.float().flatten(1)
        learnt = (weights * entries).sum() / entries.square().sum().clamp(min=1e-12)
        self._set(codes, rows, learnt.where(learnt > 0, self._initial_scale(entries)))

    def _initial_scale(self, entries: Tensor) -> Tensor:
        variance = entries.float().var(0, correction=0).sum().clamp(min=1e-12)
        return self.options.sharpness / variance

    def _set(self, codes: Tensor, rows: Tensor, scale: Tensor) -> None:
        """Sets the entries of codes to `rows`, and their logits to scale · (z·e - ½‖e‖²)."""
        self.embed.weight[codes] = rows.to(self.embed.weight.dtype)
        self.proj.weight[codes] = (scale * rows)[:, :, None, None].to(self.proj.weight.dtype)
        cast(Tensor, self.proj.bias)[codes] = (-0.5 * scale * rows.square().sum(1)).to(self.proj.weight.dtype)

    def _gumbel_noise(self, logits: Tensor) -> Tensor:
        """Standard Gumbel noise, -ln of exponential noise, from a generator for each image."""
        noise = torch.empty_like(logits)
        if self._image_seeds:
            generator = torch.Generator(logits.device)
            for rows, seed in zip(noise.chunk(len(self._image_seeds)), self._image_seeds, strict=True):
                rows.exponential_(generator=generator.manual_seed(seed))
        else:  # `prepare` was not called: this is not a training run
            noise.exponential_()
        return -noise.log()
