"""Builds what compares or judges images by a frozen network: LPIPS, named terms, alignment; and the discriminators."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

from accelerate import Accelerator
from torch import nn

from configs import ConfigError, Problem
from stage1_vqgan.configuration_vqgan import VQGANConfig
from stage1_vqgan.networks import FrozenNetwork, load_network
from stage1_vqgan.networks.alignment import Alignment
from stage1_vqgan.networks.feature_discriminator import FeatureDiscriminator
from stage1_vqgan.networks.perceptual import FeatureDistance, LogitDistance, NetworkDistance, ShiftTolerantLPIPS
from stage1_vqgan.networks.stylegan_discriminator import StyleGANDiscriminator
from stage1_vqgan.training.config import Stage1Config
from stage1_vqgan.training.discriminator import PatchDiscriminator
from stage1_vqgan.training.discriminator_config import DiscriminatorConfig, DiscriminatorType
from stage1_vqgan.training.loss_config import Backbone
from stage1_vqgan.training.losses import PerceptualLoss


def build_perceptual(config: Stage1Config, model: VQGANConfig, accelerator: Accelerator) -> nn.Module:
    """LPIPS, or shift-tolerant LPIPS. Says which it is, and which of the image's channels it compares, if not all."""
    backbone, weights = config.loss.lpips_backbone, config.loss.lpips_weights
    _say_channels("LPIPS", model.in_channels, accelerator)
    if backbone.startswith("stlpips_"):
        accelerator.print(f"loss/perceptual is shift-tolerant LPIPS ({backbone}); its values are not those of LPIPS")
        with _problems_of("loss.lpips_backbone"):
            return ShiftTolerantLPIPS(backbone.removeprefix("stlpips_"), weights)
    with _problems_of("loss"):
        perceptual = PerceptualLoss(cast(Backbone, backbone), weights)
    if config.torch_compile:
        perceptual.compile(fullgraph=True, dynamic=False)
    return perceptual


def build_features(config: Stage1Config, model: VQGANConfig, accelerator: Accelerator) -> nn.Module:
    """The distance of features of a named network."""
    return _distance(FeatureDistance, "features", config, model, accelerator)


def build_logits(config: Stage1Config, model: VQGANConfig, accelerator: Accelerator) -> nn.Module:
    """The distance of logits of a named classifier."""
    return _distance(LogitDistance, "logits", config, model, accelerator)


def build_alignment(config: Stage1Config, model: VQGANConfig) -> Alignment | None:
    """The alignment of latents to features of a named network; None if its weight is 0.

    Raises:
        ConfigError: weights of the network are missing or damaged.
    """
    if not config.loss.alignment_weight:
        return None
    network = _network("loss.alignment_network", model, *_named(config, "alignment"))
    return Alignment(network, model.embed_dim)


def build_patchgan(model: VQGANConfig, settings: DiscriminatorConfig) -> nn.Module:
    """The PatchGAN discriminator."""
    return PatchDiscriminator(model.in_channels, settings.base_channels, settings.num_layers, settings.norm_type)


def build_feature_discriminator(model: VQGANConfig, settings: DiscriminatorConfig) -> nn.Module:
    """Heads on the features of a named network."""
    network = _network("discriminator.network", model, settings.network, settings.network_weights)
    return FeatureDiscriminator(network)


def build_stylegan(model: VQGANConfig, settings: DiscriminatorConfig) -> nn.Module:
    """StyleGAN2's residual discriminator."""
    return StyleGANDiscriminator(model.in_channels, settings.base_channels, image_shape(model))


# How to build each type of discriminator, from the configuration of the tokenizer and the settings.
DISCRIMINATORS: dict[DiscriminatorType, Callable[[VQGANConfig, DiscriminatorConfig], nn.Module]] = {
    "patchgan": build_patchgan,
    "features": build_feature_discriminator,
    "stylegan": build_stylegan,
}


def image_shape(model: VQGANConfig) -> tuple[int, int]:
    """(H, W) of the images."""
    return model.image_shape


def _distance(
    kind: Callable[[FrozenNetwork], NetworkDistance],
    term: str,
    config: Stage1Config,
    model: VQGANConfig,
    accelerator: Accelerator,
) -> nn.Module:
    key = f"loss.{term}_network"
    network = _network(key, model, *_named(config, term))
    if network.channels == 3:
        _say_channels(f"loss/{term}", model.in_channels, accelerator)
    with _problems_of(key):
        return kind(network)


def _named(config: Stage1Config, term: str) -> tuple[str, str]:
    """Name and weights of the network of a term."""
    return getattr(config.loss, f"{term}_network"), getattr(config.loss, f"{term}_network_weights")


def _network(key: str, model: VQGANConfig, name: str, weights: str) -> FrozenNetwork:
    with _problems_of(key):
        network = load_network(name, weights)
        network.require_channels(model.in_channels)
        if min(image_shape(model)) < network.least_size:
            least, size = network.least_size, max(network.least_size, 64)
            raise ValueError(
                f"received {name!r}; it needs at least {least} pixels, images have {model.image_size}; a name "
                f"with a size, such as '{name}@{size}', enlarges them"
            )
        return network


@contextmanager
def _problems_of(key: str) -> Iterator[None]:
    """Names the key of a network that cannot be built."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError([Problem(key, str(error))]) from error


def _say_channels(name: str, channels: int, accelerator: Accelerator) -> None:
    if channels == 2 or channels > 3:
        part = "the first channel" if channels == 2 else "the first three channels"
        accelerator.print(f"{name} compares {part} of {channels}; l1 and l2 compare all")
