"""Convolutional classifiers of torchvision."""

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from stage1_vqgan.networks.frozen import Activations, Backbone
from stage1_vqgan.networks.weights import download_errors, load_weights, read_weights

TRANSFORMERS = ("vit", "swin", "maxvit")
OWN_INPUT = {"googlenet", "inception_v3"}  # their trained weights expect other statistics, to which they convert images


def backbone(model: str, weights: str, size: int | None) -> Backbone:
    """A classifier of torchvision. "pretrained" are the weights that torchvision calls DEFAULT.

    Another of torchvision's names, such as "IMAGENET1K_V1", chooses its other weights.
    """
    from torchvision import models

    if model not in models.list_models(module=models):
        raise ValueError(f"received 'torchvision/{model}'; torchvision.models.list_models() lists the names")
    if model.startswith(TRANSFORMERS):
        raise ValueError(f"received 'torchvision/{model}'; transformers are to be had from timm/ and transformers/")
    known: Any = models.get_model_weights(model)
    stated = getattr(known, "DEFAULT" if weights == "pretrained" else weights, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some builders announce other defaults of their initialisation
        with download_errors(stated.url) if stated else nullcontext():
            network = models.get_model(model, weights=stated)
    if weights != "random" and stated is None:
        network.transform_input = model in OWN_INPUT
        load_weights(network, read_weights(weights), weights)
    expected = (stated or known.DEFAULT).transforms()
    (trained_at,) = expected.crop_size
    levels = Levels(network.eval(), trained_at)
    return Backbone(levels, tuple(expected.mean), tuple(expected.std), size or trained_at)


class Levels(nn.Module):
    """The last output of a network at each resolution, and its logits; the deepest map is averaged for `pooled`."""

    def __init__(self, network: nn.Module, size: int):
        super().__init__()
        from torchvision.models.feature_extraction import create_feature_extractor

        *_, self.head = dict(network.named_children())
        self.levels = list(_levels(network, size).values())
        self.network = create_feature_extractor(network, [*self.levels, self.head])

    def forward(self, images: Tensor) -> Activations:
        found = self.network(images)
        features = [found[name] for name in self.levels]
        return Activations(features, features[-1].mean((2, 3)), found[self.head].flatten(1))


@torch.no_grad()
def _levels(network: nn.Module, size: int) -> dict[torch.Size, str]:
    """The last stage at each resolution, in the order of computation."""
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    nodes = get_graph_node_names(network)[1]
    stages = [stage for stage in _stages(network) if any(f"{node}.".startswith(f"{stage}.") for node in nodes)]
    outputs = create_feature_extractor(network, stages)(torch.zeros(1, 3, size, size))
    maps = {stage: output.shape[-2:] for stage, output in outputs.items() if output.ndim == 4}
    return {shape: stage for stage, shape in maps.items() if min(shape) > 1}


def _stages(network: nn.Module) -> Iterator[str]:
    """The modules inside a network, and the modules inside its sequences."""
    for name, child in network.named_children():
        parts = [f"{name}.{part}" for part, _ in child.named_children()] if isinstance(child, nn.Sequential) else []
        yield from parts or [name]
