"""StyleGAN2's residual discriminator in the form that MAGVIT gave it for tokenizers: one logit for each image.

Shape letters: B batch, C channels, H W image size, D width.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAST_SIDE = 4  # of the shorter side, before the linear layers
MOST_FACTOR = 4  # of the widest layers, as multiple of `base_channels`


class StyleGANDiscriminator(nn.Module):
    """Residual blocks, each after a blur that halves the image, and two linear layers.

    Images `(B, C, H, W)` in [-1, 1] → logits `(B, 1, 1, 1)`. The logit of an image does not depend on the other images
    of the batch: like MAGVIT's and unlike StyleGAN2's, this discriminator has no minibatch standard deviation. Nor has
    it StyleGAN2's equalised learning rate.

    Args:
        in_channels: C.
        base_channels: width of the first convolution; later ones have up to four times this width.
        image_shape: (H, W); it determines the number of blocks and the size of the linear layers.

    Sources: Karras et al. 2020, "Analyzing and improving the image quality of StyleGAN"; Yu et al. 2023, "MAGVIT:
    masked generative video transformer", with the layers of its code for single images and its blur.
    """

    def __init__(self, in_channels: int, base_channels: int, image_shape: tuple[int, int]):
        super().__init__()
        sides, blocks = list(image_shape), 0
        while min(sides) > LAST_SIDE:
            sides, blocks = [(side + 1) // 2 for side in sides], blocks + 1
        widths = [base_channels * min(2**block, MOST_FACTOR) for block in range(blocks + 1)]
        last = widths[-1]
        self.main = nn.Sequential(
            nn.Conv2d(in_channels, base_channels, 3, padding=1),
            nn.LeakyReLU(0.2),
            *(BlurBlock(before, after) for before, after in pairwise(widths)),
            nn.Conv2d(last, last, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(last * sides[0] * sides[1], last),
            nn.LeakyReLU(0.2),
            nn.Linear(last, 1),
        )
        self.apply(_init_weights)

    def forward(self, images: Tensor) -> Tensor:
        return self.main(images)[:, :, None, None]


class BlurBlock(nn.Module):
    """Two convolutions beside a linear one, with a blur that keeps every second position of rows and columns."""

    kernel: Tensor

    def __init__(self, before: int, after: int):
        super().__init__()
        self.first = nn.Conv2d(before, before, 3, padding=1)
        self.second = nn.Conv2d(before, after, 3, padding=1)
        self.skip = nn.Conv2d(before, after, 1, bias=False)
        line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", torch.outer(line, line).view(1, 1, 4, 4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        found = F.leaky_relu(self.second(self._blurred(F.leaky_relu(self.first(x), 0.2))), 0.2)
        return (self.skip(self._blurred(x)) + found) / 2**0.5

    def _blurred(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        padded = F.pad(x, (1, 1 + width % 2, 1, 1 + height % 2))
        return F.conv2d(padded, self.kernel.to(x.dtype).expand(x.shape[1], -1, -1, -1), stride=2, groups=x.shape[1])


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
