"""The encoder and the decoder.

Shape letters: B batch, C image channels, H W image size, h w code grid.

Source: Esser et al. 2021, "Taming transformers for high-resolution image synthesis", appendix A. Modules have the names
of the original, so its published weights can be loaded.
"""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_vqgan import VQGANConfig
from .modeling_blocks import Downsample, Level, Middle, Upsample, group_norm


class Encoder(nn.Module):
    """Images `(B, C, H, W)` → features `(B, latent_channels, h, w)`."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(config.in_channels, config.base_channels, 3, padding=1)
        self.down = nn.ModuleList()
        previous = config.base_channels
        for index, width in enumerate(widths):
            level = Level(config, previous, width, config.num_res_blocks, config.attention[index])
            if index < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
            previous = width
        self.mid = Middle(config, previous)
        self.norm_out = group_norm(config, previous)
        self.conv_out = nn.Conv2d(previous, config.latent_channels, 3, padding=1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.conv_in(pixel_values)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Features `(B, latent_channels, h, w)` → images `(B, C, H, W)`. `up[0]` is the highest resolution."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(config, widths[-1])
        self.up = nn.ModuleList()
        for index, width in enumerate(widths):
            previous = widths[min(index + 1, len(widths) - 1)]
            level = Level(config, previous, width, config.decoder_blocks, config.attention[index])
            if index > 0:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = group_norm(config, widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.in_channels, 3, padding=1)

    def trunk(self, features: Tensor) -> Tensor:
        """All layers but the last convolution: `(B, base_channels × channel_multiplier[0], H, W)`."""
        x = self.mid(self.conv_in(features))
        for level in reversed(self.up):
            x = level(x)
        # under autocast, CUDA returns float32 from a norm: more bits than x had
        return F.silu(self.norm_out(x)).to(x.dtype)

    def forward(self, features: Tensor) -> Tensor:
        return self.conv_out(self.trunk(features))

    def compile(self, **options: Any) -> None:
        """Compiles the trunk, because training calls the last convolution separately."""
        self.trunk = MethodType(torch.compile(Decoder.trunk, **options), self)  # type: ignore[method-assign]
