"""Penalties that regularise the discriminator.

In the papers, the discriminator has one output D(x) per image. Here it has a logit per patch, and D(x) is their mean.

Shape letters: B batch, C channels, H W image size, h w logit grid.
"""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.randomness import seed_from
from stage1_vqgan.data.transfer import to_device

LECAM_DECAY = 0.999


def gradient_penalty(discriminator: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, shares: Tensor) -> Tensor:
    """mean (‖∇D(x̃)‖ - 1)² at x̃ = share · x + (1 - share) · x̂, a scalar.

    Args:
        discriminator: images → logits.
        real, fake: images x and their reconstructions x̂, `(B, C, H, W)`, without a graph.
        shares: float32 `(B,)` in [0, 1), see `interpolation_shares`.

    Source: Gulrajani et al. 2017, "Improved training of Wasserstein GANs", section 4.
    """
    shares = shares.view(-1, 1, 1, 1)
    mixed = (shares * real + (1 - shares) * fake).requires_grad_()
    norms = _image_gradients(discriminator(mixed), mixed).flatten(1).norm(dim=1)
    return (norms - 1).square().mean()


def interpolation_shares(image_seeds: Iterable[int], device: torch.device) -> Tensor:
    """A random number in [0, 1) for each image, float32 `(B,)`, from a seed for each image.

    The quantizer draws from the same seeds; these numbers are independent of its numbers.
    """
    generators = [torch.Generator().manual_seed(seed_from(seed, 1)) for seed in image_seeds]
    return to_device(torch.cat([torch.rand(1, generator=generator) for generator in generators]), device)


def r1_penalty(logits_real: Tensor, real: Tensor) -> Tensor:
    """½ mean ‖∇D(x)‖² at real images, a scalar; its weight is the γ of the paper.

    Args:
        logits_real: logits of x, `(B, 1, h, w)`, with their graph.
        real: images x, `(B, C, H, W)`, which require a gradient.

    Source: Mescheder et al. 2018, "Which training methods for GANs do actually converge?", section 4.1.
    """
    return 0.5 * _image_gradients(logits_real, real).square().flatten(1).sum(1).mean()


class LecamAnchors(nn.Module):
    """Moving averages α of the logits of images and of reconstructions, and LeCam's penalty on logits beyond them.

    The averages are exponential with `LECAM_DECAY`, without the bias of their start. They change once in an optimizer
    step, after all its micro-batches. Before the first change they are 0.

    Attributes:
        means: float32 `(2,)`, of images and of reconstructions. A buffer, so that a checkpoint holds it.
        updates: int64 scalar, number of updates.

    Source: Tseng et al. 2021, "Regularizing generative adversarial networks under limited data", section 3.2, with the
    ReLU of its code. That code updates the averages before the penalty of a step. Its decay is 0.99 for StyleGAN2;
    tokenizers (MaskBit, TiTok) take 0.999.
    """

    means: Tensor
    updates: Tensor

    def __init__(self, device: torch.device):
        super().__init__()
        self.register_buffer("means", torch.zeros(2, device=device))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=device))
        self._observed: list[Tensor] = []

    def observe(self, logits_real: Tensor, logits_fake: Tensor) -> None:
        """Keeps the mean logits of a micro-batch of this process for the next update."""
        self._observed.append(torch.stack([logits_real.detach().mean(), logits_fake.detach().mean()]))

    @torch.no_grad()
    def update(self, average: Callable[[Tensor], Tensor]) -> None:
        """Moves both averages towards the means observed since the last update; `average` is over processes."""
        if not self._observed:
            return
        means = average(torch.stack(self._observed).mean(0))
        self._observed.clear()
        self.updates += 1
        total_weight = -torch.expm1(self.updates * math.log(LECAM_DECAY))  # 1 - decay^n, of n updates
        self.means.lerp_(means, (1 - LECAM_DECAY) / total_weight)

    def penalty(self, logits_real: Tensor, logits_fake: Tensor) -> Tensor:
        """mean max(0, D(x) - α_fake)² + mean max(0, α_real - D(x̂))², a scalar."""
        anchor_real, anchor_fake = self.means
        return F.relu(logits_real - anchor_fake).square().mean() + F.relu(anchor_real - logits_fake).square().mean()


def _image_gradients(logits: Tensor, images: Tensor) -> Tensor:
    """∇D at each image, `(B, C, H, W)`, with a graph. The images are independent, so one pass computes them all."""
    (gradients,) = torch.autograd.grad(logits.mean((1, 2, 3)).sum(), images, create_graph=True)
    return gradients
