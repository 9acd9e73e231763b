"""Metrics that need a network, by the network's name.

Shape letters: B batch, C channels, H W image size, D features of an image.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn

from configs import ConfigError, Problem
from configs.problems import one_line
from stage1_vqgan.evaluation.config import INCEPTION, MetricsConfig
from stage1_vqgan.evaluation.frechet import Moments, fitted, frechet_distance
from stage1_vqgan.evaluation.inception import load_inception
from stage1_vqgan.networks import FrozenNetwork, load_network
from stage1_vqgan.networks.perceptual import ShiftTolerantLPIPS
from stage1_vqgan.reconstruction import ImageMean, Metric, Reduce
from stage1_vqgan.training.loss_config import LPIPS_MIN_SIZE, Backbone
from stage1_vqgan.training.losses import PerceptualLoss

# Where the advice of a missing file begins that only a network of a loss can follow: it has a key for its weights.
ADVICE_OF_A_LOSS = ", or name the file"
NewMetric: TypeAlias = Callable[[], Metric]


class NetworkMetrics(NamedTuple):
    """Metrics that need a network.

    Attributes:
        new: each makes a metric that has seen no image yet.
        left_out: by the name of a figure, why it cannot be computed.
    """

    new: list[NewMetric]
    left_out: dict[str, str]


def network_metrics(
    config: MetricsConfig, size: tuple[int, int], channels: int, device: torch.device
) -> NetworkMetrics:
    """Loads the networks of the metrics.

    A figure is left out if its network cannot be had on this machine, or if the images are too small for it.

    Args:
        config: names of the networks.
        size: height and width of the images in pixels.
        channels: number of their channels.
        device: where the networks compute.

    Raises:
        ConfigError: there is no network of that name, or it does not take such images.
    """
    found = NetworkMetrics([], {})
    for key, load in {"perceptual_networks": perceptual_metric, "feature_networks": feature_metric}.items():
        for name in dict.fromkeys(getattr(config, key)):
            try:
                new, least_size = load(name, channels, device)
            except (ImportError, FileNotFoundError) as error:
                found.left_out[figure_of(name)] = one_line(error, 400).partition(ADVICE_OF_A_LOSS)[0]
            except ValueError as error:
                raise ConfigError([Problem(f"metrics.{key}", one_line(error))]) from error
            else:
                if min(size) >= least_size:
                    found.new.append(new)
                else:
                    reason = f"images of {size[0]}×{size[1]} pixels; {name} needs {least_size}"
                    found.left_out[figure_of(name)] = reason
    return found


def figure_of(network: str) -> str:
    """The name of the figure that a network gives."""
    if network == INCEPTION:
        return "rfid"
    return network if network.startswith(("lpips/", "stlpips/")) else f"frechet_distance/{network}"


def is_frechet_distance(figure: str) -> bool:
    """Whether a figure is a Frechet distance, by its name."""
    return figure == "rfid" or figure.startswith("frechet_distance/")


def perceptual_metric(name: str, channels: int, device: torch.device) -> tuple[NewMetric, int]:
    """The mean perceptual distance of an image and its reconstruction; and the smallest side of an image.

    Raises:
        ImportError, FileNotFoundError, ValueError: see `PerceptualLoss` and `ShiftTolerantLPIPS`.
    """
    family, _, backbone = name.partition("/")
    if family == "stlpips":
        shift_tolerant = ShiftTolerantLPIPS(backbone).to(device)
        return mean_of(name, shift_tolerant, device), shift_tolerant.network.least_size
    loss = PerceptualLoss(cast(Backbone, backbone)).to(device)
    return mean_of(name, loss, device), LPIPS_MIN_SIZE[cast(Backbone, backbone)]


def perceptual_name(backbone: str, weights: str) -> str:
    """The name of the figure of a training's loss: "vgg" is "lpips/vgg", "stlpips_vgg" is "stlpips/vgg"."""
    name = backbone.replace("_", "/") if "_" in backbone else f"lpips/{backbone}"
    return name if weights != "random" else f"{name}-random"


def mean_of(name: str, loss: nn.Module, device: torch.device) -> NewMetric:
    """The mean of a perceptual loss over images. Not compiled: the compiled loss is for the batches of a training."""
    return partial(ImageMean, name, lambda *pair: loss.forward(*pair).expand(len(pair[0])), device)


def feature_metric(name: str, channels: int, device: torch.device) -> tuple[NewMetric, int]:
    """The Frechet distance of the features of all images and of all reconstructions; and the smallest side.

    Raises:
        ImportError, FileNotFoundError, ValueError: see `load_network`; or it does not take images of these channels.
    """
    network = load_inception() if name == INCEPTION else load_network(name)
    network.require_channels(channels)
    return partial(FrechetDistance, figure_of(name), network.to(device), device), network.least_size


class FrechetDistance:
    """The Frechet distance of the pooled features of all images and of all reconstructions, rounded to 8 bits.

    Args:
        name: name of the figure.
        network: computes the features.
        device: of the images.
    """

    def __init__(self, name: str, network: FrozenNetwork, device: torch.device):
        self.name, self.network = name, network
        least = torch.zeros(1, network.channels, network.least_size, network.least_size, device=device)
        width = self.features(least).shape[1]  # also for a process without images
        self.real, self.reconstructed = Moments(width, device), Moments(width, device)

    def add(self, reconstruction: Tensor, images: Tensor) -> None:
        self.real.add(self.features(images))
        self.reconstructed.add(self.features(reconstruction))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features `(B, D)` of images `(B, C, H, W)` in [-1, 1] as a PNG file would hold them."""
        return self.network(((images + 1) * 127.5).round() / 127.5 - 1).pooled

    def figures(self, reduce: Reduce) -> dict[str, float]:
        """The distance; none for a single image, which has no covariance."""
        distance = frechet_distance(*(fitted(reduce(moments.sums)) for moments in (self.real, self.reconstructed)))
        return {} if math.isnan(distance) else {self.name: distance}
