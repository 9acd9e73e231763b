"""Vision networks of transformers, such as DINOv2, ConvNeXt and ViT."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from configs.checksums import verify_checksums
from configs.problems import listed, one_line
from configs.staging import finish_interrupted
from stage1_vqgan.networks.frozen import IMAGENET_MEAN, IMAGENET_STD, Activations, Backbone
from stage1_vqgan.networks.weights import load_weights, read_weights

LEVELS = 4


def backbone(model: str, weights: str, size: int | None) -> Backbone:
    """A vision network in a folder or Hub repository. A transformer's position embeddings are interpolated."""
    if Path(model).is_dir():
        finish_interrupted(model)
        verify_checksums(model)  # of a network that this project has trained
    try:
        network = _network(model, weights)
        expected = _preprocessing(model)
    except OSError as error:
        message = (
            f"'transformers/{model}' could not be loaded ({one_line(error)}). Name a folder that holds the repository"
        )
        raise FileNotFoundError(message) from error
    except SafetensorError as error:
        message = (
            f"received 'transformers/{model}'; its weights are damaged ({one_line(error)}); copy or train it again"
        )
        raise ValueError(message) from error
    except ValueError as error:  # no model, or one that needs code of its own
        raise ValueError(
            f"received 'transformers/{model}'; it is no network of transformers: {one_line(error)}"
        ) from error
    size = size or expected.get("size") or getattr(network.config, "image_size", 224)
    return Backbone(Levels(network), expected["mean"], expected["std"], size)


def _network(model: str, weights: str) -> nn.Module:
    from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

    config = AutoConfig.from_pretrained(model)
    is_classifier = any("ForImageClassification" in name for name in config.architectures or [])
    kind: Any = AutoModelForImageClassification if is_classifier else AutoModel
    if weights == "pretrained":
        network, read = kind.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
        # Some repositories lack the pooler of AutoModel, which classifiers do not have.
        missing = sorted(name for name in read["missing_keys"] if "pooler" not in name)
        if missing:
            raise ValueError(f"its files lack weights: {listed(missing)}")
        return network
    network = kind.from_config(config)
    if weights != "random":
        load_weights(network, read_weights(weights), weights)
    return network


def _preprocessing(model: str) -> dict[str, Any]:
    """Size, mean and standard deviation of the images, as the image processor beside the network states them."""
    from transformers.image_processing_utils import BaseImageProcessor

    try:
        stated = BaseImageProcessor.get_image_processor_dict(model)[0]
    except OSError:
        return {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    size = stated.get("crop_size") or stated.get("size")
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    return {"size": size, "mean": tuple(stated["image_mean"]), "std": tuple(stated["image_std"])}


class Levels(nn.Module):
    """Hidden states as maps: of a convolutional network's stages, or of the patches of a transformer.

    The deepest map of a transformer has passed its last normalisation. `pooled` is what the network pools; where it
    pools nothing, it is the class token, or the mean of the deepest map.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network: Any = network
        takes = inspect.signature(network.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}

    def forward(self, images: Tensor) -> Activations:
        captured: list[Any] = []  # of the network without its head, which returns more than a classifier does
        hook = self.network.base_model.register_forward_hook(lambda module, inputs, output: captured.append(output))
        try:
            out = self.network(images, output_hidden_states=True, **self.options)
        finally:
            hook.remove()
        last, states = captured[0].last_hidden_state, captured[0].hidden_states
        pooled = captured[0].get("pooler_output")
        if last.ndim == 4:
            features = list({state.shape[-2:]: state for state in states}.values())
            pooled = features[-1].mean((2, 3)) if pooled is None else pooled.flatten(1)
        else:
            depth = len(states) - 1  # the first one is the embedding
            tokens = [states[depth * level // LEVELS] for level in range(1, LEVELS)] + [last]
            features = [_patches(state, images.shape, self.network.config.patch_size) for state in tokens]
            pooled = last[:, 0] if pooled is None else pooled
        return Activations(features, pooled, out.get("logits"))


def _patches(tokens: Tensor, images: Sequence[int], patch_size: int) -> Tensor:
    """The map of the patch tokens; class and register tokens stand in front of them."""
    height, width = images[-2] // patch_size, images[-1] // patch_size
    return tokens[:, -height * width :].transpose(1, 2).unflatten(2, (height, width))
