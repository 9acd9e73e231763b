"""Loads a frozen network by its name."""

import torch

from stage1_vqgan.networks import (
    efficientnet_lite,
    pixels,
    shift_tolerant,
    timm_models,
    torchvision_models,
    transformers_models,
)
from stage1_vqgan.networks.frozen import FrozenNetwork
from stage1_vqgan.networks.names import split_name

# By the first part of the name; each takes the rest of the name, the weights and the size of images.
BACKBONES = {
    "torchvision": torchvision_models.backbone,
    "timm": timm_models.backbone,
    "transformers": transformers_models.backbone,
    "efficientnet-lite0": efficientnet_lite.backbone,
    "stlpips": shift_tolerant.backbone,
    "pixels": pixels.backbone,
}


def load_network(name: str, weights: str = "pretrained") -> FrozenNetwork:
    """A frozen network.

    The same name and weights give the same network in every process and in every run; so checkpoints hold none of it.

    Args:
        name: "torchvision/<model>", for instance "torchvision/resnet50"; "timm/<model>"; "transformers/<Hub id or
            folder>"; "efficientnet-lite0"; "stlpips/alex" or "stlpips/vgg", the backbones of shift-tolerant LPIPS;
            "pixels", whose features are the values of images reduced to 16 pixels. Images are brought to the size that
            the network was trained with, but for stlpips, which takes them as they are. A size behind the name takes
            its place: "efficientnet-lite0@96".
        weights: "pretrained" (efficientnet-lite0 and stlpips have them in their packages, others download them once); a
            file of its state dict, safetensors or one of torch.save; or "random", for tests.

    Raises:
        ValueError: an unknown name, a file that does not hold its weights, or a size that the network cannot take.
        FileNotFoundError: the weights are missing and cannot be downloaded; the message names the file to provide.
        ImportError: the package is missing; the message names it.
    """
    family, model, size = split_name(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FrozenNetwork(name, BACKBONES[family](model, weights, size))
