"""The layers of encoder and decoder.

Shape letters: B batch, C channels, h w resolution.

Source: Esser et al. 2021, "Taming transformers for high-resolution image synthesis", appendix A. Modules have the names
of the original, so its published weights can be loaded.
"""

import contextlib
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import GradientCheckpointingLayer

from .configuration_vqgan import VQGANConfig

# Beyond this number of positions, attention gets contiguous vectors. PyTorch then computes it on a CPU without a matrix
# of all pairs, which takes 19 GB for a map of 192 × 256. Smaller maps are up to 1.1 times as fast without.
LARGE_MAP = 2**10


def group_norm(config: VQGANConfig, channels: int) -> nn.GroupNorm:
    """The normalization of all layers."""
    return nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)


class NormSiLUConv(torch.autograd.Function):
    """norm → SiLU → 3×3 convolution, which saves only its input for the backward.

    The backward recomputes the inputs of SiLU and of the convolution, which takes little time. These are two thirds of
    the memory that autograd would save for a residual block.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, *norm: Any
    ) -> Tensor:
        ctx.autocast, ctx.norm = _current_autocast(x.device.type), norm
        ctx.save_for_backward(x, norm_weight, norm_bias, weight)
        return F.conv2d(_norm_silu(x, norm_weight, norm_bias, *norm), weight, bias, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, weight = ctx.saved_tensors
        inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        with torch.enable_grad(), ctx.autocast:
            activated = _norm_silu(*inputs, *ctx.norm)
        pair = activated.detach().to(gradient.dtype), weight.to(gradient.dtype)
        stride, padding, dilation, output_padding, of_all = [1, 1], [1, 1], [1, 1], [0, 0], [True, True, True]
        geometry = stride, padding, dilation, False, output_padding, 1
        of_activated, of_weight, of_bias = torch.ops.aten.convolution_backward(
            gradient, *pair, [len(weight)], *geometry, of_all
        )
        of_inputs = torch.autograd.grad(activated, inputs, of_activated.to(activated.dtype))
        return *of_inputs, of_weight.to(weight.dtype), of_bias.to(weight.dtype), None, None


def _current_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """A context with the current autocast settings, for the backward."""
    if not torch.amp.is_autocast_available(device_type):  # for instance on the device "meta"
        return contextlib.nullcontext()
    return torch.autocast(device_type, torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type))


def _norm_silu(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
    return F.silu(F.group_norm(x, num_groups, weight, bias, eps), inplace=not torch.is_grad_enabled())


def norm_silu_conv(x: Tensor, norm: nn.Module, conv: nn.Module) -> Tensor:
    """conv(SiLU(norm(x))), which saves little memory for the backward.

    It calls the modules themselves under torch.compile, which decides by itself what to recompute, and if a layer has
    been replaced, for instance by an adapter.
    """
    replaced = type(norm) is not nn.GroupNorm or type(conv) is not nn.Conv2d
    if replaced or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return conv(F.silu(norm(x)))
    return cast(
        Tensor, NormSiLUConv.apply(x, norm.weight, norm.bias, conv.weight, conv.bias, norm.num_groups, norm.eps)
    )


class ResidualBlock(nn.Module):
    """norm → SiLU → conv, twice, plus the input (through a 1×1 convolution if the widths differ)."""

    def __init__(self, config: VQGANConfig, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = group_norm(config, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(config, out_channels)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = norm_silu_conv(x, self.norm1, self.conv1)
        if self.training and self.dropout.p:
            h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        else:
            h = norm_silu_conv(h, self.norm2, self.conv2)
        return self.nin_shortcut(x) + h


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions, plus the input."""

    def __init__(self, config: VQGANConfig, channels: int):
        super().__init__()
        self.norm = group_norm(config, channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (rearrange(conv(normed), "B C h w -> B 1 (h w) C") for conv in (self.q, self.k, self.v))
        if x.shape[2:].numel() > LARGE_MAP:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(h, "B 1 (h w) C -> B C h w", h=x.shape[2]))


class Downsample(nn.Module):
    """Halves the resolution: pads right and bottom by one, then a 3×3 convolution with stride 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the resolution: nearest neighbour, then a 3×3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(GradientCheckpointingLayer):
    """One resolution of the encoder or decoder: residual blocks, each followed by attention or none, and a resampler.

    The encoder or decoder sets `downsample` or `upsample`, except at its last level.
    """

    def __init__(self, config: VQGANConfig, in_channels: int, out_channels: int, num_blocks: int, attends: bool):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(ResidualBlock(config, *pair) for pair in pairwise(widths))
        self.attn = nn.ModuleList(AttentionBlock(config, out_channels) for _ in range(num_blocks if attends else 0))

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        for name in ("downsample", "upsample"):
            if name in self._modules:
                x = self.get_submodule(name)(x)
        return x


class Middle(GradientCheckpointingLayer):
    """Residual block, attention if `mid_attention`, residual block at the lowest resolution."""

    def __init__(self, config: VQGANConfig, channels: int):
        super().__init__()
        self.block_1 = ResidualBlock(config, channels, channels)
        self.attn_1 = AttentionBlock(config, channels) if config.mid_attention else nn.Identity()
        self.block_2 = ResidualBlock(config, channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))
