"""A small network with random weights, where a test needs the features of any network."""

import torch
from torch import Tensor, nn

from stage1_vqgan.networks import Activations, FrozenNetwork
from stage1_vqgan.networks.frozen import Backbone

WIDTH = 24


class Means(nn.Module):
    """Averages of random filters."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.filters = nn.Conv2d(3, WIDTH, 3, stride=2)

    def forward(self, images: Tensor) -> Activations:
        maps = torch.relu(self.filters(images))
        return Activations([maps], maps.mean((2, 3)), None)


def small_network(name: str = "small") -> FrozenNetwork:
    return FrozenNetwork(name, Backbone(Means(), (0.5, 0.5, 0.5), (0.3, 0.3, 0.3), None))
