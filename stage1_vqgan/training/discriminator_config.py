"""Settings of the discriminator of stage 1."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from configs import Section
from configs.sections import Momentum, NonNegativeFloat, PositiveFloat
from stage1_vqgan.networks.names import name_problems, weights_problems

DiscriminatorType = Literal["patchgan", "features", "stylegan"]
NormType = Literal["batch", "group", "actnorm"]

# The settings that decide the network of each type.
OF_TYPE: dict[DiscriminatorType, tuple[str, ...]] = {
    "patchgan": ("base_channels", "num_layers", "norm_type"),
    "features": ("network", "network_weights"),
    "stylegan": ("base_channels",),
}


@dataclass(kw_only=True)
class DiscriminatorConfig(Section):
    """The discriminator.

    type: "patchgan"; "features", small heads on the features of a frozen network; or "stylegan", the residual one of
        StyleGAN2 without its minibatch standard deviation
    base_channels: width after the first convolution of patchgan and stylegan
    num_layers: number of convolutions with stride 2 of patchgan; it determines the size of a patch
    norm_type: of patchgan: "batch" (synchronised over GPUs), "group" or "actnorm"
    network, network_weights: of features: a frozen network by its name; "pretrained", a file, or "random" (for tests)
    augmentation: random changes of colours, a shift and a cutout of all images that the discriminator sees (DiffAug);
        null augments for features alone
    learning_rate: peak learning rate; null takes the generator's, and so do the next keys
    adam_beta1, adam_beta2, weight_decay, max_grad_norm: its optimizer, as the keys of the same names
    """

    type: DiscriminatorType = "patchgan"
    base_channels: Annotated[int, Ge(4), Le(4096)] = 64
    num_layers: Annotated[int, Ge(1), Le(8)] = 3
    norm_type: NormType = "batch"
    network: str = "timm/vit_small_patch16_224.dino"
    network_weights: str = "pretrained"
    augmentation: bool | None = None
    learning_rate: PositiveFloat | None = None
    adam_beta1: Momentum | None = None
    adam_beta2: Momentum | None = None
    weight_decay: NonNegativeFloat | None = None
    max_grad_norm: NonNegativeFloat | None = None

    @property
    def architecture(self) -> dict[str, Any]:
        """The settings that decide the network."""
        return {"type": self.type, **{name: getattr(self, name) for name in OF_TYPE[self.type]}}

    @property
    def augments(self) -> bool:
        """Whether the images that the discriminator sees are augmented."""
        return self.type == "features" if self.augmentation is None else self.augmentation

    def problems(self) -> Iterable[tuple[str, Any, str]]:
        if self.type == "features":
            yield from name_problems("network", self.network)
            yield from weights_problems("network_weights", self.network_weights)


def logit_grid_size(image_size: int, num_layers: int) -> int:
    """Shorter side of the discriminator's logit grid, for that of an image. Below 1, the image is too small for it."""
    for _ in range(num_layers):
        image_size //= 2
    return image_size - 2
