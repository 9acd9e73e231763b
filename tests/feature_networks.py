"""Networks of tests: a small one with random weights, Inception with random weights, and ours inside torch-fidelity."""

from pathlib import Path

import pytest
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


def as_extractor(network: FrozenNetwork) -> type:
    """A class by which torch-fidelity computes the pooled features of one of our networks."""
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class Extractor(FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], **options: object):
            super().__init__(name, features_list)
            self.network = network

        get_provided_features_list = staticmethod(lambda: ("pooled",))
        get_default_feature_layer_for_metric = staticmethod(lambda metric: "pooled")

        def forward(self, images: Tensor) -> tuple[Tensor]:
            assert images.dtype == torch.uint8
            return (self.network(images / 127.5 - 1).pooled,)

    return Extractor


def put_random_inception(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights of Inception, where torch-fidelity looks for those of the original that it has downloaded."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    monkeypatch.setenv("TORCH_HOME", str(folder))
    checkpoints = folder / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, *rest, **options: None)
    with monkeypatch.context() as patched:
        patched.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **o: {})
        patched.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *a, **o: None)
        torch.manual_seed(0)
        random = FeatureExtractorInceptionV3("random", ["2048"])
    for layer in random.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)  # torch's own would make all features almost equal
    torch.save(random.state_dict(), checkpoints / URL_INCEPTION_V3.rpartition("/")[2])
