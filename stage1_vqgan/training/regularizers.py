"""Terms that hold a discriminator back, and what they need to know.

The discriminator gives a logit for every patch; the adversarial losses take their mean. So wherever a paper has D(x) of
an image, here it is the mean of the image's logits.

Shape letters: B batch, C channels, H W image size, h w logit grid.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

LECAM_DECAY = 0.99


def gradient_penalty(discriminator: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, share: Tensor) -> Tensor:
    """mean (‖∇D(x̃)‖ - 1)² at x̃ = share · x + (1 - share) · x̂, a scalar.

    Args:
        discriminator: images → logits.
        real, fake: images x and their reconstructions x̂, `(B, C, H, W)`, without a graph.
        share: float32 `(B,)` in [0, 1), one draw for each image.

    Source: Gulrajani et al. 2017, "Improved training of Wasserstein GANs", section 4.
    """
    share = share.view(-1, 1, 1, 1)
    mixed = (share * real + (1 - share) * fake).requires_grad_()
    norms = _image_gradients(discriminator(mixed), mixed).flatten(1).norm(dim=1)
    return (norms - 1).square().mean()


def r1_penalty(logits_real: Tensor, real: Tensor) -> Tensor:
    """½ mean ‖∇D(x)‖² at real images, a scalar; its weight is the γ of the paper.

    Args:
        logits_real: `(B, 1, h, w)`, D(x) with its graph.
        real: x, `(B, C, H, W)`, which requires a gradient.

    Source: Mescheder et al. 2018, "Which training methods for GANs do actually converge?", section 4.1.
    """
    return 0.5 * _image_gradients(logits_real, real).square().flatten(1).sum(1).mean()


class LecamAnchors(nn.Module):
    """Moving averages of the logits, of real images and of reconstructions, and the penalty on straying from them.

    They are buffers, so that a checkpoint holds them. The first updates are a running mean, until one counts as much as
    `LECAM_DECAY` lets it.

    Source: Tseng et al. 2021, "Regularizing generative adversarial networks under limited data", section 3.2.
    """

    means: Tensor
    updates: Tensor

    def __init__(self, device: torch.device):
        super().__init__()
        self.register_buffer("means", torch.zeros(2, device=device))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=device))

    @torch.no_grad()
    def update(self, logits_real: Tensor, logits_fake: Tensor, average: Callable[[Tensor], Tensor]) -> None:
        """Moves both averages towards the logits of a batch; `average` is the mean over processes."""
        means = average(torch.stack([logits_real.mean(), logits_fake.mean()]))
        self.updates += 1
        self.means.lerp_(means, (1 / self.updates).clamp(min=1 - LECAM_DECAY))

    def penalty(self, logits_real: Tensor, logits_fake: Tensor) -> Tensor:
        """mean (D(x) - α_fake)² + mean (D(x̂) - α_real)², a scalar."""
        anchor_real, anchor_fake = self.means
        return (logits_real - anchor_fake).square().mean() + (logits_fake - anchor_real).square().mean()


def _image_gradients(logits: Tensor, images: Tensor) -> Tensor:
    """∇D at each image, `(B, C, H, W)`, with a graph: images do not see each other, so one pass has all of them."""
    (gradients,) = torch.autograd.grad(logits.mean((1, 2, 3)).sum(), images, create_graph=True)
    return gradients
