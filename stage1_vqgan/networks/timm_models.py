"""Networks of timm: convolutional ones, and transformers such as DINOv2."""

from typing import Any

from torch import Tensor, nn

from stage1_vqgan.networks.frozen import Activations, Backbone
from stage1_vqgan.networks.weights import load_weights, package, read_weights

TRANSFORMER_LEVELS = 4


def backbone(model: str, weights: str, size: int | None) -> Backbone:
    """A network of timm. A transformer's position embeddings are interpolated to another size."""
    timm = package("timm", "timm")
    if not timm.is_model(model):
        raise ValueError(f"received 'timm/{model}'; timm.list_models() lists the names")
    network = _network(timm, model, weights, size)
    if not hasattr(network, "forward_intermediates"):
        raise ValueError(
            f"received 'timm/{model}'; this network of timm cannot return features (forward_intermediates)"
        )
    expected: Any = network.pretrained_cfg
    return Backbone(Levels(network), expected["mean"], expected["std"], size or expected["input_size"][-1])


def _network(timm: Any, model: str, weights: str, size: int | None) -> nn.Module:
    options = {"img_size": size} if size and timm.get_pretrained_cfg(model).fixed_input_size else {}
    if weights != "pretrained":
        network = timm.create_model(model, **({} if weights != "random" else options))
        if weights == "random":
            return network
        load_weights(network, read_weights(weights), weights)
        if options:
            network.set_input_size(img_size=size)
        return network
    try:
        return timm.create_model(model, pretrained=True, **options)
    except OSError as error:
        source = timm.get_pretrained_cfg(model).hf_hub_id
        message = f"the weights of timm/{model} could not be downloaded ({error}). Name a file as the weights"
        raise FileNotFoundError(f"{message}: model.safetensors of https://huggingface.co/{source}") from error


class Levels(nn.Module):
    """Maps of a convolutional network's stages or of a transformer's blocks; the head pools and classifies the last."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network: Any = network
        depth = len(getattr(network, "blocks", []))
        is_transformer = hasattr(network, "patch_embed") and depth >= TRANSFORMER_LEVELS
        ends = range(1, TRANSFORMER_LEVELS + 1)
        self.indices = [depth * end // TRANSFORMER_LEVELS - 1 for end in ends] if is_transformer else None

    def forward(self, images: Tensor) -> Activations:
        last, features = self.network.forward_intermediates(images, indices=self.indices, norm=True)
        pooled = self.network.forward_head(last, pre_logits=True)
        logits = self.network.forward_head(last) if getattr(self.network, "num_classes", 0) else None
        return Activations(features, pooled, logits)
