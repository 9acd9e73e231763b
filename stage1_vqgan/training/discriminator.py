"""The PatchGAN discriminator: one logit for each patch of an image.

Shape letters: B batch, C channels, H W image size, h w logit grid.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stage1_vqgan.training.discriminator_config import NormType


class PatchDiscriminator(nn.Module):
    """Convolutional classifier of overlapping patches: high logits for images, low logits for reconstructions.

    Images `(B, C, H, W)` in [-1, 1] → logits `(B, 1, h, w)`.

    Args:
        in_channels: image channels.
        base_channels: width after the first convolution. Each further one doubles it, up to eight times this width.
        num_layers: number of convolutions with stride 2. More layers see larger patches.
        norm_type: "batch" as in the source, "group" (at most 32 groups), or "actnorm" (see [`ActNorm`]). With the last
            two the logits of an image depend neither on the other images of the batch nor on the number of processes.

    Source: Isola et al. 2017, "Image-to-image translation with conditional adversarial networks", section 3.2.2;
    layers and initialisation of Esser et al. 2021.
    """

    def __init__(
        self, in_channels: int = 3, base_channels: int = 64, num_layers: int = 3, norm_type: NormType = "batch"
    ):
        super().__init__()
        norms: dict[NormType, Callable[[int], nn.Module]]
        norms = {"batch": nn.BatchNorm2d, "group": _group_norm, "actnorm": ActNorm}
        bias = norm_type == "actnorm"  # as in the original, so that its weights can be loaded
        layers: list[nn.Module] = [nn.Conv2d(in_channels, base_channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        width = base_channels
        for n in range(1, num_layers + 1):
            previous, width = width, base_channels * min(2**n, 8)
            stride = 2 if n < num_layers else 1
            layers += [nn.Conv2d(previous, width, 4, stride, 1, bias=bias), norms[norm_type](width), nn.LeakyReLU(0.2)]
        layers.append(nn.Conv2d(width, 1, 4, 1, 1))
        self.main = nn.Sequential(*layers)
        self.apply(_init_weights)

    def forward(self, images: Tensor) -> Tensor:
        return self.main(images)

    def compile(self, **options: Any) -> None:
        """Compiles `forward`, so that later wrappers of it, such as accelerate's autocast, stay outside the graph."""
        self.forward = MethodType(torch.compile(PatchDiscriminator.forward, **options), self)  # type: ignore[method-assign]


class ActNorm(nn.Module):
    """scale · (x + loc) for each channel. The first training batch sets both, so that its output is normalised.

    The statistics include the batches of all processes, so that all processes start with the same values. Evaluation
    never initialises.

    Args:
        num_channels: C.

    Source: Kingma and Dhariwal 2018, "Glow", section 3.1.
    """

    initialized: Tensor

    def __init__(self, num_channels: int):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, num_channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, num_channels, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))
        # Copy of `initialized` on the host: reading the buffer would wait for the device in every forward.
        self._is_initialized = False
        self.register_load_state_dict_post_hook(_forget_initialization)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self._is_initialized:
            if not self.initialized:
                self._initialise(x.detach().float())
            self._is_initialized = True
        return self.scale * (x + self.loc)

    @torch.no_grad()
    def _initialise(self, x: Tensor) -> None:
        n = _sum_over_processes(torch.tensor(x.numel() / x.shape[1], device=x.device))
        mean = _sum_over_processes(x.sum((0, 2, 3), keepdim=True)) / n
        variance = _sum_over_processes((x - mean).square().sum((0, 2, 3), keepdim=True)) / (n - 1)
        self.loc.copy_(-mean)
        self.scale.copy_(1 / (variance.sqrt() + 1e-6))
        self.initialized.fill_(1)


def _forget_initialization(module: ActNorm, keys: object) -> None:
    module._is_initialized = False


def _sum_over_processes(value: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value)
    return value


def _group_norm(width: int) -> nn.Module:
    most = max(1, min(32, width // 4))
    return nn.GroupNorm(max(groups for groups in range(1, most + 1) if width % groups == 0), width)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
