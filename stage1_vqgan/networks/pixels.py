"""Pixels as features: images that are reduced to a small size. It needs no weights."""

from torch import Tensor, nn

from stage1_vqgan.networks.frozen import Activations, Backbone

SIZE = 16  # pixels


def backbone(model: str, weights: str, size: int | None) -> Backbone:
    """The pixels of images of `size`, by default 16."""
    if weights not in ("pretrained", "random"):
        raise ValueError(f"received the weights {weights!r} for 'pixels', which has none; leave them out")
    return Backbone(Pixels(), (0.5,) * 3, (0.5,) * 3, size or SIZE)


class Pixels(nn.Module):
    """The image as its only map, and its values as `pooled`."""

    def forward(self, images: Tensor) -> Activations:
        return Activations([images], images.flatten(1), None)
