"""A frozen network as a function from images to features.

Shape letters: B batch, C channels, H W image size, D width of a feature map, h w its size.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.problems import one_line

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LARGEST_TRIED = 2**8  # pixels, in the search for the least size


class Activations(NamedTuple):
    """What a network computes from images `(B, C, H, W)`.

    features: maps `(B, D, h, w)` from shallow to deep. A convolutional network has one for each resolution, the last
        before it is halved; a transformer has four, of its patches, from blocks at equal distances.
    pooled: one vector for each image, `(B, D)`.
    logits: `(B, classes)`; None for a network without a classifier.
    """

    features: list[Tensor]
    pooled: Tensor
    logits: Tensor | None


class Backbone(NamedTuple):
    """A network and the images that it expects.

    module: its `forward` takes normalised images `(B, C, H, W)` and returns `Activations`.
    mean, std: of each of the C channels in [0, 1], which normalise images. C is 3 for most networks.
    size: height and width to which images are brought; None: the network takes them as they are.
    """

    module: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int | None


class FrozenNetwork(nn.Module):
    """A network whose weights never change. Gradients pass through it to the images.

    It stays in evaluation mode. Under autocast it computes in autocast's precision. Images of any shape are brought to
    `size` by bilinear interpolation with antialiasing. For a network of three channels, gray images get three equal
    channels, and so does the first channel of images with two; of more than three channels it sees the first three. A
    network of another number of channels takes only images that have them.

    Args:
        name: the name under which it was loaded, for messages.
        backbone: the network and the images that it expects.

    Attributes:
        size: height and width to which images are brought; None: it takes them as they are.
        channels: C of the network.
        least_size: smallest height and width of an image.
        widths: D of each feature map, from shallow to deep.
        has_logits: whether it is a classifier.

    Raises:
        ValueError: the network cannot take images of `size`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, backbone: Backbone):
        super().__init__()
        self.name, self.size = name, backbone.size
        self.module, self.channels = backbone.module, len(backbone.mean)
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(getattr(backbone, key)).view(1, -1, 1, 1))
        self.requires_grad_(False).eval()
        fits = self._least_size(range(self.size or 1, LARGEST_TRIED + (self.size or 0)))
        if self.size and self.size < fits:
            raise ValueError(f"received {name!r}; this network needs at least {fits} pixels")
        self.least_size = 1 if self.size else fits
        activations = self._probe(fits)
        self.widths = [features.shape[1] for features in activations.features]
        self.has_logits = activations.logits is not None

    def train(self, mode: bool = True) -> "FrozenNetwork":
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> Activations:
        """Features of images `(B, C, H, W)` in [-1, 1].

        Raises:
            ValueError: the images are smaller than `least_size`, or have other channels.
        """
        self.require_channels(images.shape[1])
        if min(images.shape[-2:]) < self.least_size:
            received = "×".join(map(str, images.shape[-2:]))
            raise ValueError(f"images: received {received}; {self.name} needs at least {self.least_size} pixels")
        if self.channels == 3:
            images = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
        if self.size:
            images = to_size(images, self.size)
        return self.module(((images + 1) / 2 - self.mean) / self.std)

    def require_channels(self, channels: int) -> None:
        """Raises a ValueError if the network cannot take images of so many channels."""
        if self.channels not in (3, channels):
            raise ValueError(f"images: received {channels} channels; {self.name} takes only images of {self.channels}")

    def _least_size(self, sizes: Iterable[int]) -> int:
        """The first of the sizes that the network takes.

        Raises:
            ValueError: it takes none.
        """
        problem = ""
        for size in sizes:
            try:
                self._probe(size)
                return size
            except (RuntimeError, AssertionError) as error:  # of torch, of timm
                problem = one_line(error)
        raise ValueError(f"received {self.name!r}; the network computes no feature maps from such images ({problem})")

    @torch.no_grad()
    def _probe(self, size: int) -> Activations:
        """Activations of one black image."""
        return self.module(torch.zeros(1, self.channels, size, size))


def to_size(images: Tensor, size: int) -> Tensor:
    """Images `(B, C, size, size)`, by bilinear interpolation with antialiasing."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True, align_corners=False)
