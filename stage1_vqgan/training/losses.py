"""The terms of the VQGAN objective, and the adaptive weight of the adversarial term.

Shape letters: B batch, C channels, H W image size.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast
from urllib.parse import urlparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from stage1_vqgan.networks.weights import read_weights
from stage1_vqgan.training.loss_config import AdversarialType, Backbone

# LPIPS backbones that always compute in float32. The cosine between gradients in bfloat16 and in float32 is 0.991 to
# 0.995 with vgg and 0.987 to 0.994 with alex, but only 0.947 to 0.968 with squeeze, which is cheap anyway (measured on
# photos with noise from 0.03 to 0.3, with random backbone weights).
FLOAT32_BACKBONES = {"squeeze"}

MAX_ADAPTIVE_WEIGHT = 1e4


def weighted_sum(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Σ weight · term over scalar terms, 0 without terms. Both have the same names."""
    return cast(Tensor, sum(weights[name] * term for name, term in terms.items()))


class PerceptualLoss(nn.Module):
    """LPIPS distance, with frozen weights.

    Its networks know colour images. Gray images get three equal channels, and so does the first channel of images with
    two. Of more than three channels, it compares the first three, which are the colours of RGBA.

    Under autocast the backbones "vgg" and "alex" compute in its precision. The features are compared in float32.

    Args:
        backbone: "vgg", "alex" or "squeeze".
        weights: "pretrained" (torchvision's ImageNet weights, downloaded once), the path of torchvision's weight file,
            or "random" (for tests; it is no useful distance).

    Raises:
        FileNotFoundError: the weights are missing and cannot be downloaded; the message names the file to provide.
        ValueError: the file does not hold the weights of this backbone.

    Source: Zhang et al. 2018, "The unreasonable effectiveness of deep features as a perceptual metric".
    """

    def __init__(self, backbone: Backbone = "vgg", weights: str = "pretrained"):
        super().__init__()
        import lpips

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips calls torchvision by a deprecated name
            self.lpips = lpips.LPIPS(net=backbone, pnet_rand=True, verbose=False)
        if weights != "random":
            _load_backbone(self.lpips.net, _backbone_weights(backbone, weights), weights)
        self.in_float32 = backbone in FLOAT32_BACKBONES
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "PerceptualLoss":
        """Stays in evaluation mode, because the linear layers have dropout."""
        return super().train(False)

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """Mean distance of two batches `(B, C, H, W)` in [-1, 1], a scalar."""
        with torch.autocast(images.device.type, enabled=False) if self.in_float32 else contextlib.nullcontext():
            pair = zip(self._features(reconstruction), self._features(images), strict=True)
            distances = [
                (linear.model[-1].weight * (_units(found) - _units(wanted)).square()).sum(1).mean()
                for linear, (found, wanted) in zip(self.lpips.lins, pair, strict=True)
            ]
        return torch.stack(distances).sum()

    def _features(self, images: Tensor) -> Iterator[Tensor]:
        """Activations of the backbone at the depths that LPIPS compares."""
        known = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
        x = self.lpips.scaling_layer(known)
        for depth in range(1, self.lpips.net.N_slices + 1):
            x = self.lpips.net.get_submodule(f"slice{depth}")(x)
            yield x


def _units(features: Tensor) -> Tensor:
    """The feature vectors of all positions, scaled to unit length, in float32."""
    features = features.float()
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)


def generator_linear_loss(logits_fake: Tensor) -> Tensor:
    """-mean D(x̂), a scalar."""
    return -logits_fake.mean()


def generator_logistic_loss(logits_fake: Tensor) -> Tensor:
    """mean softplus(-D(x̂)) = -mean log σ(D(x̂)), a scalar."""
    return F.softplus(-logits_fake).mean()


def discriminator_hinge_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """½ (mean max(0, 1 - D(x)) + mean max(0, 1 + D(x̂))), a scalar."""
    return 0.5 * (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean())


def discriminator_logistic_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """½ (mean softplus(-D(x)) + mean softplus(D(x̂))), a scalar."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


def discriminator_wasserstein_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """mean D(x̂) - mean D(x), a scalar without a lower bound."""
    return logits_fake.mean() - logits_real.mean()


# The losses of both sides: functions of D(x̂), and of D(x) and D(x̂).
# Sources: hinge, Lim and Ye 2017, "Geometric GAN"; vanilla and non-saturating, Goodfellow et al. 2014, "Generative
# adversarial nets"; Wasserstein, Arjovsky et al. 2017, "Wasserstein GAN". As in the original VQGAN, "vanilla" and
# "non_saturating" differ in the generator's loss only, and all but Wasserstein halve the discriminator's loss.
GENERATOR_LOSSES: dict[AdversarialType, Callable[[Tensor], Tensor]] = {
    "hinge": generator_linear_loss,
    "vanilla": generator_linear_loss,
    "non_saturating": generator_logistic_loss,
    "wasserstein": generator_linear_loss,
}
DISCRIMINATOR_LOSSES: dict[AdversarialType, Callable[[Tensor, Tensor], Tensor]] = {
    "hinge": discriminator_hinge_loss,
    "vanilla": discriminator_logistic_loss,
    "non_saturating": discriminator_logistic_loss,
    "wasserstein": discriminator_wasserstein_loss,
}


def last_layer_gradients(features: Tensor, last_layer: nn.Conv2d, output_gradients: Sequence[Tensor]) -> Tensor:
    """∂L/∂W of the last convolution, computed from ∂L/∂x̂ of several losses L, without any other layer.

    Args:
        features: `(B, base_channels × channel_multiplier[0], H, W)`, input of the last convolution. Their precision is
            that of the computation; sums are in float32.
        last_layer: the decoder's last convolution.
        output_gradients: ∂L/∂x̂ of n losses, each `(B, C, H, W)`.

    Returns:
        float32 `(n, *last_layer.weight.shape)`.
    """
    channels, *kernel = last_layer.weight.shape
    together = torch.cat(list(output_gradients), 1).to(features.dtype)  # one convolution reads the features once
    shape = torch.Size((len(output_gradients) * channels, *kernel))
    gradients = conv2d_weight(features.detach(), shape, together, padding=last_layer.padding)
    return gradients.float().view(len(output_gradients), channels, *kernel)


def adaptive_weight(reconstruction_gradient: Tensor, adversarial_gradient: Tensor) -> Tensor:
    """λ = ‖∂L_rec/∂W‖ / (‖∂L_adv/∂W‖ + 1e-4), at most 1e4, a scalar.

    Source: Esser et al. 2021, equation 7, with the δ and the clamp of the original code.
    """
    return (reconstruction_gradient.norm() / (adversarial_gradient.norm() + 1e-4)).clamp(0.0, MAX_ADAPTIVE_WEIGHT)


def _backbone_weights(backbone: Backbone, weights: str) -> dict[str, Tensor]:
    """The backbone's state dict, with torchvision's names."""
    from torchvision import models

    url = {
        "vgg": models.VGG16_Weights.IMAGENET1K_V1,
        "alex": models.AlexNet_Weights.IMAGENET1K_V1,
        "squeeze": models.SqueezeNet1_1_Weights.IMAGENET1K_V1,
    }[backbone].url
    name = os.path.basename(urlparse(url).path)
    if weights != "pretrained":
        if not os.path.isfile(weights):
            raise FileNotFoundError(f"loss.lpips_weights: no file {weights!r}; provide torchvision's {name}")
        return read_weights(weights)
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
    except OSError as error:  # URLError is an OSError
        with contextlib.suppress(OSError):
            os.makedirs(folder, exist_ok=True)
        raise FileNotFoundError(
            f"The LPIPS backbone '{backbone}' could not be downloaded ({error}). Put {url} at "
            f"{os.path.join(folder, name)}, or name the file in loss.lpips_weights, or set loss.perceptual_weight to 0."
        ) from error


def _load_backbone(net: nn.Module, state_dict: dict[str, Tensor], source: str) -> None:
    """Copies torchvision's `features.N.*` into the slices of the lpips module, which keep the layer numbers N."""
    expected = net.state_dict()
    by_layer = {name.partition(".")[2]: name for name in expected}
    found = {
        by_layer[key.removeprefix("features.")]: value
        for key, value in state_dict.items()
        if key.removeprefix("features.") in by_layer
    }
    wrong = [name for name in expected if name not in found or found[name].shape != expected[name].shape]
    if wrong:
        raise ValueError(f"loss.lpips_weights: {source!r} does not hold this backbone; missing or misshapen: {wrong}")
    net.load_state_dict(found)
