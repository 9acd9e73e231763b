"""The backbones of shift-tolerant LPIPS, whose trained weights come in a package: no download.

AlexNet and VGG16 with blurred down-sampling. They are written here with torch's layers, because the package's own code
needs packages that it does not declare, and parts of it are licensed for non-commercial use only. Only its weight files
are read. Its numbers are not those of LPIPS.

Source: Ghildyal and Liu 2022, "Shift-tolerant perceptual similarity metric", section 3.
"""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.problems import listed
from stage1_vqgan.networks.frozen import IMAGENET_MEAN, IMAGENET_STD, Activations, Backbone
from stage1_vqgan.networks.weights import load_weights, package, read_weights

VGG16_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def backbone(model: str, weights: str, size: int | None) -> Backbone:
    """The backbone "alex" or "vgg", with the weights that its distance was trained with."""
    if model not in SLICES:
        raise ValueError(f"received 'stlpips/{model}'; allowed are 'stlpips/alex' and 'stlpips/vgg'")
    module = ShiftTolerant(model)
    if weights != "random":
        file = weights_file(model) if weights == "pretrained" else weights
        load_weights(
            module, {name.removeprefix("net."): tensor for name, tensor in read_weights(file).items()}, str(file)
        )
    return Backbone(module, IMAGENET_MEAN, IMAGENET_STD, size)


def linear_weights(model: str, weights: str) -> list[Tensor]:
    """The weight of each channel in the distance, float32 `(D,)` for each of the five maps.

    Raises:
        ValueError: the file does not hold them.
    """
    file = weights_file(model) if weights == "pretrained" else weights
    found = read_weights(file)
    names = [f"lin{level}.model.1.weight" for level in range(5)]
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"{str(file)!r} does not hold the linear layers of the distance; missing: {listed(missing)}")
    return [found[name].flatten() for name in names]


def weights_file(model: str) -> Path:
    """The package's file of weights: of the backbone, `net.*`, and of the linear layers of its distance, `lin*`."""
    package("stlpips_pytorch", "stlpips-pytorch")
    spec = importlib.util.find_spec("stlpips_pytorch")
    (folder,) = spec.submodule_search_locations  # type: ignore[union-attr,misc]
    return Path(folder) / "weights" / "vST0.0" / f"{model}_shift_tolerant.pth"


class BlurPool(nn.Module):
    """Keeps every second position of an image blurred by [1, 2, 1] in both directions; its edges are reflected.

    Source: Zhang 2019, "Making convolutional networks shift-invariant again", section 3.
    """

    filt: Tensor

    def __init__(self, width: int):
        super().__init__()
        line = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("filt", torch.outer(line, line).expand(width, 1, 3, 3).clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (2, 2, 2, 2), "reflect"), self.filt, stride=2, groups=x.shape[1])


class ShiftTolerant(nn.Module):
    """Five maps of normalised images, each after a ReLU."""

    def __init__(self, model: str):
        super().__init__()
        index = 0
        for number, layers in enumerate(SLICES[model](), start=1):
            names = {str(index + offset): layer for offset, layer in enumerate(layers)}
            self.add_module(f"slice{number}", nn.Sequential())
            for name, layer in names.items():
                self.get_submodule(f"slice{number}").add_module(name, layer)
            index += len(layers)

    def forward(self, images: Tensor) -> Activations:
        features = []
        for part in self.children():
            images = part(images)
            features.append(images)
        return Activations(features, images.mean((2, 3)), None)


def _alex() -> Iterator[list[nn.Module]]:
    yield [nn.Conv2d(3, 64, 11, padding=2), BlurPool(64), nn.ReLU()]
    yield [nn.MaxPool2d(3, 1), BlurPool(64), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU()]
    yield [nn.MaxPool2d(3, 1), BlurPool(192), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()]
    yield [nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()]
    yield [nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()]


def _vgg() -> Iterator[list[nn.Module]]:
    previous = 3
    for widths in VGG16_WIDTHS:
        layers: list[nn.Module] = [] if previous == 3 else [nn.MaxPool2d(2, 1), BlurPool(previous)]
        for width in widths:
            layers += [nn.Conv2d(previous, width, 3, padding=1), nn.ReLU()]
            previous = width
        yield layers


SLICES: dict[str, Callable[[], Iterator[list[nn.Module]]]] = {"alex": _alex, "vgg": _vgg}
