"""The network of the Frechet distance with DINOv2: ViT-L/14 at 224 pixels."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from configs.problems import one_line
from pipelines.evaluation.generation_config import DINOV2
from stage1_vqgan.networks import Activations, FrozenNetwork, load_network
from stage1_vqgan.networks.frozen import Backbone

HUB_ID, SIZE = "facebook/dinov2-large", 224


def load_dinov2() -> FrozenNetwork:
    """DINOv2, whose feature is its class token. Images of any size become 224×224 by bicubic interpolation.

    Raises:
        FileNotFoundError: the weights are missing and cannot be downloaded; the message says how to get them.

    Source: Stein et al. 2023, "Exposing flaws of generative model evaluation metrics and their unfair treatment of
        diffusion models".
    """
    try:
        network = load_network(f"transformers/{HUB_ID}@{SIZE}")
    except FileNotFoundError as error:
        advice = f"run `hf download {HUB_ID}` where the Hub can be reached, and copy its folder in the cache (HF_HOME)"
        raise FileNotFoundError(f"{one_line(error.__cause__ or error, 200)}; {advice}") from error
    return FrozenNetwork(DINOV2, Backbone(Bicubic(network), (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255), None))


class Bicubic(nn.Module):
    """Gives a network images of 224×224 pixels, as Pillow's bicubic interpolation makes them.

    Pillow changes the width first, then the height, and rounds and clips to 8 bits after each. (Of images that are not
    square, some versions change the height first.)
    """

    def __init__(self, network: Callable[[Tensor], Activations]):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Activations:
        """Features of images `(B, 3, H, W)` in [0, 255]."""
        for size in ((images.shape[-2], SIZE), (SIZE, SIZE)):
            if images.shape[-2:] != size:
                images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
            images = images.round().clamp(0, 255)
        return self.network(images / 127.5 - 1)
