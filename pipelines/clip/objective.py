"""What guidance lowers: the distance in CLIP of an image's cut-outs from the prompts.

Shape letters: B images, C channels, H W image size, D code width, h w code grid, M cut-outs of an image, P prompts, E
width of an embedding.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from pipelines.clip.cutouts import cutouts
from pipelines.clip.encoder import CLIPEncoder
from pipelines.clip.latents import LatentSpace


@dataclass(frozen=True)
class Objective:
    """The loss of latents, its gradient, and the steps that lower it.

    Attributes:
        space: the tokenizer and its latents.
        clip: the CLIP.
        targets, weights: embeddings `(P, E)` of the prompts, and their weights `(P,)`.
        start: latents `(B, D, h, w)` to which `init_weight` pulls.
        seeds: the seed of each image.
        num_cutouts: M.
    """

    space: LatentSpace
    clip: CLIPEncoder
    targets: Tensor
    weights: Tensor
    start: Tensor
    init_weight: float
    seeds: list[int]
    num_cutouts: int

    @torch.no_grad()
    def descent(self, learning_rate: float, ema_decay: float) -> Iterator[tuple[Tensor, Tensor]]:
        """Steps of Adam from `start` on, without end.

        Yields:
            After each step the moving average of the latents, `(B, D, h, w)`, and the similarities `(B, P)` before it.
        """
        latents, average = self.start.clone(), self.start.clone()
        low, high = self.space.bounds()
        optimizer = torch.optim.Adam([latents], learning_rate)
        for step in count():
            latents.grad, similarities = self.gradient(latents, step)
            optimizer.step()
            latents.clamp_(low, high)
            average.lerp_(latents, (1 - ema_decay) / (1 - ema_decay ** (step + 1)))  # without a bias to the start
            yield average, similarities

    @torch.enable_grad()
    def gradient(self, latents: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The gradient of the loss with respect to latents `(B, D, h, w)`, and the similarities `(B, P)`.

        The loss is a sum over images, so no image depends on another.
        """
        latents = latents.detach().requires_grad_()
        quantized, _ = self.space.quantized(latents)
        images = Clamp.apply((self.space.vqgan.decode(quantized).float() + 1) / 2)
        parts = cutouts(images.expand(-1, 3, -1, -1), self.seeds, step, self.num_cutouts, self.clip.size)
        embeddings = self.clip.embed(parts).view(len(images), self.num_cutouts, -1)
        distances = spherical_distance(embeddings[:, :, None], self.targets).mean(1)
        pull = (latents - self.start).square().flatten(1).mean(1) / 2
        loss = (distances @ self.weights + self.init_weight * pull).sum()
        # only of the latents: the models keep no gradients
        return torch.autograd.grad(loss, latents)[0], (embeddings.detach() @ self.targets.T).mean(1)


def spherical_distance(x: Tensor, y: Tensor) -> Tensor:
    """Half the square of the angle between unit vectors `(…, E)`: 0 for equal ones, π²/2 for opposite ones."""
    half_chord = (x - y).norm(dim=-1) / 2
    return 2 * half_chord.clamp(max=1 - 1e-6).arcsin().square()  # at 1, the slope of arcsin is infinite


class Clamp(Function):
    """Clamps to [0, 1]. Outside, it passes on only gradients that lead back inside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (above,), (x,) = gradients, ctx.saved_tensors
        return above * (above * (x - x.clamp(0, 1)) >= 0)
