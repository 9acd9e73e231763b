"""The PatchGAN discriminator: one logit for each patch of an image."""

from typing import Literal

from torch import Tensor, nn

NormType = Literal["batch", "group"]


class PatchDiscriminator(nn.Module):
    """Convolutional classifier of overlapping patches, real (high) or made (low).

    Images `(B, C, H, W)` in [-1, 1] → logits `(B, 1, H', W')`.

    Args:
        in_channels: image channels.
        base_channels: width after the first convolution; doubled by every further one, at most eight times.
        num_layers: convolutions with stride 2. More layers see larger patches.
        norm_type: "batch" as in the source, or "group" (32 groups at most), which does not depend on the other images
            of a batch nor on how it is spread over processes.

    Source: Isola et al. 2017, "Image-to-image translation with conditional adversarial networks", section 3.2.2;
    layers and initialisation as in Esser et al. 2021.
    """

    def __init__(
        self, in_channels: int = 3, base_channels: int = 64, num_layers: int = 3, norm_type: NormType = "batch"
    ):
        super().__init__()
        norm = nn.BatchNorm2d if norm_type == "batch" else _group_norm
        layers: list[nn.Module] = [nn.Conv2d(in_channels, base_channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        width = base_channels
        for n in range(1, num_layers + 1):
            previous, width = width, base_channels * min(2**n, 8)
            stride = 2 if n < num_layers else 1
            layers += [nn.Conv2d(previous, width, 4, stride, 1, bias=False), norm(width), nn.LeakyReLU(0.2)]
        layers.append(nn.Conv2d(width, 1, 4, 1, 1))
        self.main = nn.Sequential(*layers)
        self.apply(_init_weights)

    def forward(self, images: Tensor) -> Tensor:
        return self.main(images)


def logit_grid_size(image_size: int, num_layers: int) -> int:
    """Side of the logit grid for a square image; below 1 the image is too small for the discriminator."""
    for _ in range(num_layers):
        image_size //= 2
    return image_size - 2


def _group_norm(width: int) -> nn.Module:
    most = max(1, min(32, width // 4))
    return nn.GroupNorm(max(groups for groups in range(1, most + 1) if width % groups == 0), width)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
