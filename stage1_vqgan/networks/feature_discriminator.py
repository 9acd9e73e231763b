"""A discriminator with small trained heads on the features of a frozen network.

Shape letters: B batch, C channels, H W image size, L feature maps, D their width, h w the size of the shallowest one.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from stage1_vqgan.networks.frozen import FrozenNetwork

KERNEL = 3


class FeatureDiscriminator(nn.Module):
    """Judges every position of every feature map: high logits for images, low logits for reconstructions.

    Images `(B, C, H, W)` in [-1, 1] → logits `(B, L, h, w)`. The logits of a deeper, smaller map are repeated, so that
    every map counts the same. The logits of an image do not depend on the other images of the batch.

    The frozen network is no part of the state dict, nor of what DistributedDataParallel synchronises.

    Args:
        network: the frozen network.

    Source: Sauer et al. 2023, "StyleGAN-T", section 3.2 (there DINO's ViT-S), as VAR and GigaTok take it over for
    tokenizers. Deviations: group norm in place of batch norm over eight images; a 3×3 convolution in the plane in place
    of one over nine patches of a row; no crops of images above the network's size.
    """

    def __init__(self, network: FrozenNetwork):
        super().__init__()
        self._frozen = (network,)  # a tuple hides it from state_dict, parameters and wrappers
        self.heads = nn.ModuleList(head(width) for width in network.widths)

    @property
    def network(self) -> FrozenNetwork:
        return self._frozen[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves and casts the frozen network with the heads."""
        self.network._apply(fn)
        return super()._apply(fn, recurse)

    def forward(self, images: Tensor) -> Tensor:
        features = self.network(images).features
        logits = [head(found) for head, found in zip(self.heads, features, strict=True)]
        return torch.cat([F.interpolate(found, logits[0].shape[-2:]) for found in logits], 1)


def head(width: int) -> nn.Module:
    """A feature map `(B, D, h, w)` → logits `(B, 1, h, w)`."""
    return nn.Sequential(_block(width, 1), Residual(_block(width, KERNEL)), spectral_norm(nn.Conv2d(width, 1, 1)))


class Residual(nn.Module):
    """(x + f(x)) / √2."""

    def __init__(self, function: nn.Module):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.function(x)) / 2**0.5


def _block(width: int, kernel: int) -> nn.Module:
    conv = nn.Conv2d(width, width, kernel, padding=kernel // 2, padding_mode="circular" if kernel > 1 else "zeros")
    return nn.Sequential(spectral_norm(conv), nn.GroupNorm(_groups(width), width), nn.LeakyReLU(0.2))


def _groups(width: int) -> int:
    return max(groups for groups in range(1, 33) if width % groups == 0)
