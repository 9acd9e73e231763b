"""Distances of reconstructions from images, in the features of a frozen network.

Each is a module that takes reconstructions and images, both `(B, C, H, W)` in [-1, 1], and returns a scalar. The images
get no gradient. Under autocast the network computes in its precision; what it returns is compared in float32.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_vqgan.networks.frozen import Activations, FrozenNetwork
from stage1_vqgan.networks.loading import load_network
from stage1_vqgan.networks.shift_tolerant import linear_weights


class NetworkDistance(nn.Module):
    """What all these distances share: two passes of a frozen network, and a subclass's `compare`."""

    def __init__(self, network: FrozenNetwork):
        super().__init__()
        self.network = network

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.network(images)
        return self.compare(self.network(reconstruction), wanted)

    def compare(self, found: Activations, wanted: Activations) -> Tensor:
        raise NotImplementedError


class ShiftTolerantLPIPS(NetworkDistance):
    """Shift-tolerant LPIPS. Its numbers are not those of LPIPS: do not compare them with published ones.

    Args:
        backbone: "alex" or "vgg".
        weights: "pretrained" (the trained weights in the package stlpips-pytorch), a file like that of the package, or
            "random" (for tests; every channel then has the same weight).

    Raises:
        FileNotFoundError, ImportError, ValueError: as `load_network`.

    Source: Ghildyal and Liu 2022, "Shift-tolerant perceptual similarity metric".
    """

    def __init__(self, backbone: str = "alex", weights: str = "pretrained"):
        super().__init__(load_network(f"stlpips/{backbone}", weights))
        lines = [torch.ones(width) for width in self.network.widths]
        if weights != "random":
            lines = linear_weights(backbone, weights)
        for level, line in enumerate(lines):
            self.register_buffer(f"line{level}", line.view(1, -1, 1, 1))

    def compare(self, found: Activations, wanted: Activations) -> Tensor:
        distances = [
            (self.get_buffer(f"line{level}") * (unit_vectors(a) - unit_vectors(b)).square()).sum(1).mean()
            for level, (a, b) in enumerate(zip(found.features, wanted.features, strict=True))
        ]
        return torch.stack(distances).sum()


class FeatureDistance(NetworkDistance):
    """1 - cos of the features at a position, averaged over the positions of a map, then over the maps.

    Source: Zhang et al. 2018, "The unreasonable effectiveness of deep features as a perceptual metric", section 3:
    LPIPS with equal weights is the cosine distance. Ma et al. 2026, "PixelGen", takes it of DINOv2's last features.
    """

    def compare(self, found: Activations, wanted: Activations) -> Tensor:
        return cosine_distance(found.features, wanted.features)


class LogitDistance(NetworkDistance):
    """Mean squared difference of the logits of a classifier.

    Args:
        network: a classifier. MaskBit takes torchvision's ResNet50, TiTok its ConvNeXt-S, both at 224 pixels.

    Raises:
        ValueError: the network is no classifier.

    Sources: Weber et al. 2024, "MaskBit: embedding-free image generation via bit tokens"; Yu et al. 2024, "An image is
    worth 32 tokens for reconstruction and generation"; both in their code.
    """

    def __init__(self, network: FrozenNetwork):
        super().__init__(network)
        if not network.has_logits:
            raise ValueError(f"received {network.name!r}, which has no logits; allowed is a classifier")

    def compare(self, found: Activations, wanted: Activations) -> Tensor:
        assert found.logits is not None and wanted.logits is not None, "checked when it was built"
        return F.mse_loss(found.logits.float(), wanted.logits.float())


def cosine_distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """1 - cos of the vectors at each position of maps `(B, D, h, w)`, averaged over each map, then over the maps."""
    maps = zip(found, wanted, strict=True)
    return torch.stack([1 - F.cosine_similarity(a.float(), b.float(), dim=1).mean() for a, b in maps]).mean()


def unit_vectors(features: Tensor) -> Tensor:
    """The vectors of all positions of a map `(B, D, h, w)`, scaled to unit length, in float32."""
    features = features.float()
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)
