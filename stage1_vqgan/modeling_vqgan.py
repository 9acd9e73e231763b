"""The VQGAN tokenizer: encoder, quantizer, decoder.

Shape letters: B batch, C image channels, H W image size, D code width, h w code grid, K codebook size.

Source: Esser et al. 2021, "Taming transformers for high-resolution image synthesis", section 3.1. Module names are the
original's, so its published weights fit.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_vqgan import VQGANConfig
from .quantizers import build_quantizer

# Fields that decide which codes an image gets; together with the weights they make the fingerprint.
FINGERPRINT_FIELDS = (
    "in_channels",
    "base_channels",
    "channel_multiplier",
    "num_res_blocks",
    "attn_resolutions",
    "image_size",
    "norm_num_groups",
    "latent_channels",
    "embed_dim",
    "num_embeddings",
    "quantizer",
)


@dataclass
class VQGANEncoderOutput(ModelOutput):
    """Output of [`VQGANModel.encode`].

    Attributes:
        codes: int64 `(B, h, w)`, indices of codebook entries.
        latents: `(B, D, h, w)` before quantization.
        quantized: float32 `(B, D, h, w)`, the codebook entries, gradients straight through.
        codebook_loss: float32 scalar.
    """

    codes: Tensor | None = None
    latents: Tensor | None = None
    quantized: Tensor | None = None
    codebook_loss: Tensor | None = None


@dataclass
class VQGANOutput(VQGANEncoderOutput):
    """Output of [`VQGANModel.forward`]: that of `encode`, and

    Attributes:
        reconstruction: `(B, C, H, W)`, about [-1, 1], not clamped.
        decoder_features: `(B, base_channels × channel_multiplier[0], H, W)`, input of the decoder's last convolution.
    """

    reconstruction: Tensor | None = None
    decoder_features: Tensor | None = None


class NormSiLUConv(torch.autograd.Function):
    """norm → SiLU → 3×3 convolution, of which only the input is kept for the backward.

    The inputs of SiLU and of the convolution, two thirds of what autograd would keep of a residual block, are made
    again in the backward, which takes little time.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, *norm: Any
    ) -> Tensor:
        kind = x.device.type
        ctx.autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.norm = norm
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
        where = (
            [1, 1],
            [1, 1],
            [1, 1],
            False,
            [0, 0],
            1,
        )  # stride, padding, dilation, transposed, output padding, groups
        of_activated, of_weight, of_bias = torch.ops.aten.convolution_backward(
            gradient, *pair, [len(weight)], *where, [True, True, True]
        )
        of_inputs = torch.autograd.grad(activated, inputs, of_activated.to(activated.dtype))
        return *of_inputs, of_weight.to(weight.dtype), of_bias.to(weight.dtype), None, None


def _norm_silu(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
    return F.silu(F.group_norm(x, num_groups, weight, bias, eps), inplace=not torch.is_grad_enabled())


def norm_silu_conv(x: Tensor, norm: nn.Module, conv: nn.Module) -> Tensor:
    """conv(SiLU(norm(x))) with little memory for the backward; a compiler finds that by itself.

    Modules that were put in the place of the layers, such as adapters, are called as they are.
    """
    replaced = type(norm) is not nn.GroupNorm or type(conv) is not nn.Conv2d
    if replaced or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return conv(F.silu(norm(x)))
    return cast(
        Tensor, NormSiLUConv.apply(x, norm.weight, norm.bias, conv.weight, conv.bias, norm.num_groups, norm.eps)
    )


class ResidualBlock(nn.Module):
    """norm → SiLU → conv, twice, plus the input (through a 1×1 convolution where the widths differ)."""

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


class Level(nn.Module):
    """One resolution of the encoder or decoder: residual blocks, attention after each of them or none, a resampler."""

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


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, config: VQGANConfig, channels: int):
        super().__init__()
        self.block_1 = ResidualBlock(config, channels, channels)
        self.attn_1 = AttentionBlock(config, channels)
        self.block_2 = ResidualBlock(config, channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Images `(B, C, H, W)` → features `(B, latent_channels, h, w)`."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(config.in_channels, config.base_channels, 3, padding=1)
        self.down = nn.ModuleList()
        previous = config.base_channels
        for index, width in enumerate(widths):
            attends = config.image_size >> index in config.attn_resolutions
            level = Level(config, previous, width, config.num_res_blocks, attends)
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
            attends = config.image_size >> index in config.attn_resolutions
            level = Level(config, previous, width, config.num_res_blocks + 1, attends)
            if index > 0:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = group_norm(config, widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.in_channels, 3, padding=1)

    def trunk(self, features: Tensor) -> Tensor:
        """All but the last convolution: `(B, base_channels × channel_multiplier[0], H, W)`."""
        x = self.mid(self.conv_in(features))
        for level in reversed(self.up):
            x = level(x)
        return F.silu(self.norm_out(x))

    def forward(self, features: Tensor) -> Tensor:
        return self.conv_out(self.trunk(features))


class VQGANModel(PreTrainedModel):
    """Image tokenizer: `encode` images into codes, `decode_codes` back into images.

    Pixels are float32 `(B, C, H, W)` in [-1, 1]; codes are int64 `(B, h, w)`, row-major raster when flattened.
    """

    config_class = VQGANConfig
    config: VQGANConfig
    base_model_prefix = "vqgan"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    # saved models carry these files, so that AutoModel loads them with trust_remote_code where this package is not
    _auto_class = "AutoModel"

    def __init__(self, config: VQGANConfig):
        super().__init__(config)
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.embed_dim, 1)
        self.quantize = build_quantizer(
            config.quantizer, config.num_embeddings, config.embed_dim, config.quantizer_options
        )
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.latent_channels, 1)
        self.decoder = Decoder(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own defaults for convolutions and norms, as in the original; a quantizer knows its own."""
        if isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            bound = 1 / math.sqrt(module.weight[0].numel())
            init.uniform_(cast(Tensor, module.bias), -bound, bound)
        elif isinstance(module, nn.GroupNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            module.reset_parameters()

    def encode(self, pixel_values: Tensor) -> VQGANEncoderOutput:
        """Encodes images.

        Args:
            pixel_values: `(B, C, H, W)` in [-1, 1]; H and W divisible by the downsampling factor.

        Raises:
            ValueError: the shape does not fit the configuration.
        """
        self._check_pixels(pixel_values)
        latents = self.quant_conv(self.encoder(pixel_values))
        out = self.quantize(latents)
        return VQGANEncoderOutput(codes=out.codes, latents=latents, quantized=out.quantized, codebook_loss=out.loss)

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Decodes int64 codes `(B, h, w)` into images `(B, C, H, W)`, about [-1, 1], not clamped.

        Raises:
            ValueError: the codes are not a batch of grids, or one is outside `[0, K)`.
        """
        if codes.ndim != 3 or codes.dtype != torch.int64:
            raise ValueError(f"codes: received {codes.dtype} {tuple(codes.shape)}; needs int64 (B, h, w)")
        if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) < self.config.num_embeddings):
            raise ValueError(
                f"codes: received values from {int(codes.min())} to {int(codes.max())}; "
                f"allowed are 0 to {self.config.num_embeddings - 1}"
            )
        return self.decoder(self.post_quant_conv(self.quantize.lookup(codes).to(self.dtype)))

    def forward(self, pixel_values: Tensor) -> VQGANOutput:
        """Encodes and decodes images `(B, C, H, W)` in [-1, 1]; see [`VQGANOutput`]."""
        encoded = self.encode(pixel_values)
        quantized = cast(Tensor, encoded.quantized).to(self.dtype)
        features = self.decoder.trunk(self.post_quant_conv(quantized))
        return VQGANOutput(**encoded, reconstruction=self.decoder.conv_out(features), decoder_features=features)

    def compute_fingerprint(self) -> str:
        """Hash of what decides the codes of an image: encoder and quantizer weights as float32, the fields of
        `FINGERPRINT_FIELDS`, and the quantizer's options that decide codes."""
        facts = {name: getattr(self.config, name) for name in FINGERPRINT_FIELDS}
        options = self.quantize.options
        facts |= {name: getattr(options, name) for name in sorted(options.DECIDE_CODES)}
        digest = hashlib.sha256(json.dumps(facts).encode())
        for name, tensor in sorted(self.named_parameters()):  # a quantizer's buffers serve its training
            if name.startswith(("encoder.", "quant_conv.", "quantize.")):
                digest.update(name.encode())
                digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a tokenizer without a fingerprint gets one. Set `config.fingerprint = None` after
        changing weights, so that a new one is made; a cast to another dtype keeps it."""
        if self.config.fingerprint is None:
            self.config.fingerprint = self.compute_fingerprint()
        return super().save_pretrained(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but weights that are missing, unexpected or of another shape are an error.

        Raises:
            ValueError: the weights do not fit the configuration.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["output_loading_info"] = True
        kwargs.setdefault("ignore_mismatched_sizes", True)  # reported below by name, with the other kinds
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model, info = loaded
        wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        wrong = {kind: keys for kind, keys in wrong.items() if keys}
        if wrong:
            raise ValueError(f"{pretrained_model_name_or_path}: the weights do not fit the configuration: {wrong}")
        return (model, info) if wants_info else model

    def _check_pixels(self, pixel_values: Tensor) -> None:
        factor, channels = self.config.downsampling_factor, self.config.in_channels
        shape = tuple(pixel_values.shape)
        if len(shape) != 4 or shape[1] != channels or shape[2] % factor or shape[3] % factor:
            raise ValueError(
                f"pixel_values: received shape {shape}; needs (B, {channels}, H, W) with H and W divisible by {factor}"
            )


def group_norm(config: VQGANConfig, channels: int) -> nn.GroupNorm:
    """The normalisation used throughout."""
    return nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)


__all__ = ["VQGANModel"]
