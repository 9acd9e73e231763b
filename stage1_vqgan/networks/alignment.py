"""Alignment of the latents to the features of a frozen network.

Shape letters: B batch, C channels, H W image size, D width of the latents, F width of the features, h w code grid.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_vqgan.networks.frozen import FrozenNetwork
from stage1_vqgan.networks.perceptual import cosine_distance


class Alignment(nn.Module):
    """1 - cos of projected quantized latents and the deepest features of the images, averaged over grid and batch.

    The projection is trained with the tokenizer and is no part of it. The frozen network is no part of the state dict,
    nor of what DistributedDataParallel synchronises. `forward` takes the quantized latents `(B, D, h, w)`, whose
    gradient the quantizer passes on to the encoder, and the images `(B, C, H, W)` in [-1, 1].

    Args:
        network: the frozen network, for instance DINOv2.
        width: D.

    Source: Xiong et al. 2025, "GigaTok", section 3.2 (semantic regularization), with the projection of Yu et al. 2024,
    "Representation alignment for generation": two hidden layers. Deviation: GigaTok projects a middle layer of its
    decoder, a transformer; here it is the decoder's input, which the prior of stage 2 predicts.
    """

    def __init__(self, network: FrozenNetwork, width: int):
        super().__init__()
        self._frozen = (network,)  # a tuple hides it from state_dict, parameters and wrappers
        hidden = network.widths[-1]
        sizes = ((width, hidden), (hidden, hidden), (hidden, hidden))
        first, second, third = (nn.Conv2d(before, after, 1) for before, after in sizes)
        self.project = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), third)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves and casts the frozen network with the projection."""
        self._frozen[0]._apply(fn)
        return super()._apply(fn, recurse)

    def forward(self, quantized: Tensor, images: Tensor) -> Tensor:
        with torch.no_grad():
            features = self._frozen[0](images).features[-1].float()
        wanted = F.interpolate(features, quantized.shape[-2:], mode="bilinear", antialias=True)
        return cosine_distance([self.project(quantized)], [wanted])
