"""Encoding and decoding of very large images in tiles, with the result of the whole image.

Tiles that know nothing of each other show seams, because two kinds of layers look at the whole image. Here these layers
do so too:

- A group normalization uses the mean and variance of the whole image. A first pass over all tiles measures them, one
  pass for each normalization. A later pass uses them.
- Attention always gets its whole feature map. Architectures have it at low resolutions, where maps are small.

All other layers are convolutions. Tiles overlap by as many pixels as convolutions look beyond their edge, so nothing is
blended. The result differs from that of the whole image by rounding only.

The layers between two changes of the resolution form a stage. Only the maps between stages are held whole, and these
have at most half of the image's height and width. With base channels C, an image of H × W pixels and tiles of T × T
pixels, the held maps take about C · H · W / 4 numbers and a tile about 4 · C · T² numbers, in place of 4 · C · H · W
without tiles. A stage with n normalizations computes its layers about (n + 1) / 2 times.

Shape letters: B batch, C channels, H W image size, h w resolution of a feature map.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .modeling_blocks import AttentionBlock, Downsample, ResidualBlock, Upsample
from .modeling_networks import Decoder, Encoder
from .modeling_vqgan import VQGANEncoderOutput, VQGANModel

Norm = Callable[[nn.GroupNorm, Tensor], Tensor]
Box = tuple[slice, slice]
Model = TypeVar("Model", bound=VQGANModel)


def tiled(model: Model, tile: int = 512) -> Model:
    """A view of a tokenizer that encodes and decodes in tiles. It shares the weights.

    Use its `encode`, `decode` and `decode_codes`, for images of any size that the downsampling factor divides. They
    compute no gradients and no dropout.

    Args:
        model: the tokenizer.
        tile: height and width of a tile in pixels, without its overlap; a multiple of 4 from 16 up.

    Raises:
        ValueError: `tile` is no such number.
    """
    if not isinstance(tile, int) or tile < 16 or tile % 4:
        raise ValueError(f"tile: received {tile!r}; allowed are multiples of 4 from 16 up")
    view = copy.copy(model)
    parts = {"encoder": Tiles(_layers_of_encoder(model.encoder), tile)}
    parts["decoder"] = Tiles(_layers_of_decoder(model.decoder), tile)
    view._modules = {**model._modules, **parts}
    return view


def encode_tiled(model: VQGANModel, pixel_values: Tensor, tile: int = 512) -> VQGANEncoderOutput:
    """Encodes large images, see `VQGANModel.encode` and `tiled`. The codes are those without tiles, but for ties."""
    return tiled(model, tile).encode(pixel_values)


def decode_tiled(model: VQGANModel, codes: Tensor, tile: int = 512, grid: tuple[int, int] | None = None) -> Tensor:
    """Decodes codes into large images, see `VQGANModel.decode_codes` and `tiled`."""
    return tiled(model, tile).decode_codes(codes, grid)


class Output(nn.Module):
    """The last layers of encoder and decoder: norm → SiLU → conv."""

    def __init__(self, network: Encoder | Decoder):
        super().__init__()
        self.norm, self.conv = network.norm_out, network.conv_out


class Tiles(nn.Module):
    """Computes the layers of an encoder or decoder in tiles."""

    def __init__(self, layers: list[nn.Module], tile: int):
        super().__init__()
        self.stages, self.tile = list(_stages(layers)), tile

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._one(image) for image in x.split(1)])

    def _one(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = _by_tiles(stage, x, self.tile)
        return x


def _layers_of_encoder(encoder: Encoder) -> list[nn.Module]:
    levels = [layer for level in encoder.down for layer in _layers_of_level(level)]
    return [encoder.conv_in, *levels, *encoder.mid.children(), Output(encoder)]


def _layers_of_decoder(decoder: Decoder) -> list[nn.Module]:
    levels = [layer for level in reversed(decoder.up) for layer in _layers_of_level(level)]
    return [decoder.conv_in, *decoder.mid.children(), *levels, Output(decoder)]


def _layers_of_level(level: Any) -> Iterator[nn.Module]:
    for index, block in enumerate(level.block):
        yield block
        if len(level.attn):
            yield level.attn[index]
    for name in ("downsample", "upsample"):
        if name in level._modules:
            yield level.get_submodule(name)


def _stages(layers: list[nn.Module]) -> Iterator[list[nn.Module]]:
    """Splits layers before each `Upsample`, after each `Downsample`, and on both sides of attention."""
    stage: list[nn.Module] = []
    for layer in layers:
        if stage and isinstance(layer, Upsample | AttentionBlock):
            yield stage
            stage = []
        stage.append(layer)
        if isinstance(layer, Downsample | AttentionBlock):
            yield stage
            stage = []
    if stage:
        yield stage


def _by_tiles(stage: list[nn.Module], x: Tensor, tile: int) -> Tensor:
    """The output of a stage for a feature map `(1, C, h, w)`."""
    growth = 2 if isinstance(stage[0], Upsample) else 1
    side = tile // growth  # in positions of x
    if max(x.shape[2:]) <= side or isinstance(stage[0], AttentionBlock):
        return _run(stage, x, lambda norm, x: norm(x))
    boxes = [(rows, columns) for rows in _cuts(x.shape[2], side) for columns in _cuts(x.shape[3], side)]
    margin = -(-sum(map(_reach, stage)) // growth)
    margin += margin % 2  # so that a Downsample finds the same pixels as in the whole map
    norms = _WholeNorms()
    for norm in _norms(stage):
        norms.learn(norm, [_before(norm, stage, x, box, margin, norms, growth) for box in boxes])
    scale = growth / 2 if isinstance(stage[-1], Downsample) else growth
    out: Tensor | None = None
    for box in boxes:
        y = _cropped(_run(stage, x[..., *_wider(box, x, margin)], norms), box, margin, scale)
        if out is None:
            out = y.new_empty(1, y.shape[1], *(int(size * scale) for size in x.shape[2:]))
        out[..., *_scaled(box, scale)] = y
    return cast(Tensor, out)


def _before(
    norm: nn.GroupNorm, stage: list[nn.Module], x: Tensor, box: Box, margin: int, norms: "_WholeNorms", growth: int
) -> tuple[int, Tensor, Tensor]:
    """Number, mean and variance `(G,)` of what a tile gives to a normalization."""
    try:
        _run(stage, x[..., *_wider(box, x, margin)], norms)
    except _Unknown as stopped:
        inner = _cropped(stopped.args[0], box, margin, growth)
        groups = inner.reshape(norm.num_groups, -1).to(torch.promote_types(inner.dtype, torch.float32))
        variance, mean = torch.var_mean(groups, dim=1, correction=0)
        return groups.shape[1], mean, variance
    raise AssertionError("the normalization was not reached")


def _cuts(size: int, side: int) -> list[slice]:
    return [slice(start, min(start + side, size)) for start in range(0, size, side)]


def _wider(box: Box, x: Tensor, margin: int) -> Box:
    """A box with a margin on each side, cut off at the edges of x."""
    rows, columns = (
        slice(max(0, part.start - margin), min(size, part.stop + margin))
        for part, size in zip(box, x.shape[2:], strict=True)
    )
    return rows, columns


def _cropped(y: Tensor, box: Box, margin: int, scale: float) -> Tensor:
    """The part of a wider tile's output that belongs to the box. `scale`: positions of y for one of the input."""
    rows, columns = (
        slice(int(min(part.start, margin) * scale), int((min(part.start, margin) + part.stop - part.start) * scale))
        for part in box
    )
    return y[..., rows, columns]


def _scaled(box: Box, scale: float) -> Box:
    rows, columns = (slice(int(part.start * scale), int(part.stop * scale)) for part in box)
    return rows, columns


def _reach(layer: nn.Module) -> int:
    """How many positions beyond the edge of its output a layer looks."""
    return 2 if isinstance(layer, ResidualBlock) else 1


def _norms(stage: list[nn.Module]) -> list[nn.GroupNorm]:
    """The normalizations of a stage, in the order of their use."""
    return [norm for layer in stage for norm in layer.modules() if isinstance(norm, nn.GroupNorm)]


def _run(stage: list[nn.Module], x: Tensor, normalize: Norm) -> Tensor:
    """The layers of a stage, with another function in place of each normalization."""
    for layer in stage:
        if isinstance(layer, ResidualBlock):
            h = layer.conv1(F.silu(normalize(layer.norm1, x), inplace=True))
            h = layer.conv2(F.silu(normalize(layer.norm2, h), inplace=True))
            x = layer.nin_shortcut(x) + h
        elif isinstance(layer, Output):
            x = layer.conv(F.silu(normalize(layer.norm, x), inplace=True).to(x.dtype))
        else:
            x = layer(x)
    return x


class _Unknown(Exception):
    """A normalization was reached whose mean and variance are not known yet; holds its input."""


class _WholeNorms:
    """Normalizations that use the mean and variance of the whole feature map."""

    def __init__(self) -> None:
        self._known: dict[nn.GroupNorm, tuple[Tensor, Tensor]] = {}

    def learn(self, norm: nn.GroupNorm, parts: list[tuple[int, Tensor, Tensor]]) -> None:
        """Joins number, mean and variance `(G,)` of all tiles."""
        counts = [count for count, _, _ in parts]
        means = torch.stack([mean for _, mean, _ in parts]).double()
        variances = torch.stack([variance for _, _, variance in parts]).double()
        share = torch.tensor(counts, dtype=torch.float64, device=means.device)[:, None] / sum(counts)
        mean = (share * means).sum(0)
        variance = (share * (variances + (means - mean).square())).sum(0)
        each = norm.num_channels // norm.num_groups
        scale = norm.weight * (variance + norm.eps).rsqrt().repeat_interleave(each)
        shift = norm.bias - mean.repeat_interleave(each) * scale
        dtype = torch.promote_types(norm.weight.dtype, torch.float32)
        self._known[norm] = (scale[:, None, None].to(dtype), shift[:, None, None].to(dtype))

    def __call__(self, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        if norm not in self._known:
            raise _Unknown(x)
        scale, shift = self._known[norm]
        return torch.addcmul(shift, x.to(scale.dtype), scale).to(x.dtype)
