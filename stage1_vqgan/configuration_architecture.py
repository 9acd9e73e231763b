"""The shape of the VQGAN networks: the fields of `VQGANConfig` and the rules between them.

This file imports neither torch nor transformers, so a command checks its `model` section before their slow import.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from typing import Any

# Side of the feature maps with attention, where a configuration names none.
DEFAULT_RESOLUTIONS = (16,)
# Quantizers that learn K × D weights, or twice as many. The codes of the others follow from a formula.
WITH_ENTRIES = {"vq": 1, "ema": 1, "simvq": 1, "ibq": 1, "gumbel": 1, "product": 1, "pyramid": 2, "residual": 1}


@dataclass(kw_only=True)
class VQGANArchitecture:
    """Fields that determine the shapes of encoder, decoder and codebook.

    The defaults are the f16 layout of the original with 1,024 codes.

    Args:
        image_size: size in pixels of the images that the tokenizer is trained on: the side of a square, or
            [height, width]. The model also takes images of other sizes that the downsampling factor divides.
        in_channels: image channels: 1 (gray), 2 (gray, alpha), 3 (RGB), 4 (RGBA), or more for data that are no
            pictures.
        base_channels: width of the first level.
        channel_multiplier: width of each level as a multiple of `base_channels`; every level but the first halves
            the resolution, so the downsampling factor is `2 ** (len(channel_multiplier) - 1)`.
        num_res_blocks: residual blocks in each level of the encoder.
        decoder_num_res_blocks: residual blocks in each level of the decoder; by default one more than in the encoder.
        attn_levels: levels whose residual blocks are followed by self-attention; 0 is the highest resolution. By
            default the level of 16 pixels, if there is one.
        attn_resolutions: the same levels, named by the shorter side of their feature maps: that of `image_size`, halved
            per level. `VQGANConfig` turns it into `attn_levels`.
        mid_attention: whether the middle of encoder and decoder, after the last level, attends.
        norm_num_groups: groups of every GroupNorm; must divide every width.
        dropout: dropout probability inside the residual blocks.
        latent_channels: channels between encoder or decoder and the 1×1 convolutions around the codebook.
        embed_dim: D, width of a codebook entry.
        num_embeddings: K, number of codebook entries.
        quantizer: "vq", "ema", "simvq", "ibq", "gumbel", "fsq", "lfq", "bsq", "residual", "product" or "pyramid", see
            quantizers.py.
        quantizer_options: options of this kind, see `Options` of its class; "vq" has among others `l2_normalize` and
            `commitment_cost`.
    """

    image_size: int | list[int] | tuple[int, int] = 256
    in_channels: int = 3
    base_channels: int = 128
    channel_multiplier: list[float | int] | tuple[float | int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    decoder_num_res_blocks: int | None = None
    attn_levels: list[int] | tuple[int, ...] | None = None
    attn_resolutions: list[int] | tuple[int, ...] | None = None
    mid_attention: bool = True
    norm_num_groups: int = 32
    dropout: float | int = 0.0
    latent_channels: int = 256
    embed_dim: int = 256
    num_embeddings: int = 1024
    quantizer: str = "vq"
    quantizer_options: dict[str, Any] = field(default_factory=dict)

    @property
    def downsampling_factor(self) -> int:
        """f, pixels of the image's side per code."""
        return 2 ** (len(self.channel_multiplier) - 1)

    @property
    def image_shape(self) -> tuple[int, int]:
        """(H, W): height and width in pixels of the images that the tokenizer is trained on."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w): height and width of the code grid of such an image."""
        height, width = self.image_shape
        return height // self.downsampling_factor, width // self.downsampling_factor

    def architecture_problems(self) -> Iterator[tuple[str, Any, str]]:
        """Sizes that no network can have, as `(field, value received, what is allowed)`."""
        for name in (
            "in_channels",
            "base_channels",
            "num_res_blocks",
            "latent_channels",
            "embed_dim",
            "norm_num_groups",
        ):
            if getattr(self, name) < 1:
                yield name, getattr(self, name), "must be at least 1"
        if self.decoder_num_res_blocks is not None and self.decoder_num_res_blocks < 1:
            yield "decoder_num_res_blocks", self.decoder_num_res_blocks, "must be at least 1"
        if self.num_embeddings < 2:
            yield "num_embeddings", self.num_embeddings, "a codebook needs at least 2 entries"
        if not 0 <= self.dropout < 1:
            yield "dropout", self.dropout, "must be at least 0 and below 1"
        if not self.channel_multiplier or not all(0 < multiplier < inf for multiplier in self.channel_multiplier):
            yield "channel_multiplier", self.channel_multiplier, "needs positive numbers, one for each level"
            return
        wrong_size = list(self._size_problems())
        yield from wrong_size or self._attention_problems()
        exact = [self.base_channels * multiplier for multiplier in self.channel_multiplier]
        if any(abs(width - round(width)) > 1e-6 for width in exact):
            yield (
                "channel_multiplier",
                self.channel_multiplier,
                f"times {self.base_channels} (base_channels) must be whole",
            )
            return
        widths = self.widths
        uneven = [width for width in widths if self.norm_num_groups > 0 and width % self.norm_num_groups]
        if uneven:
            allowed = (
                "must divide every width, which are base_channels × channel_multiplier = "
                f"{', '.join(map(str, widths))}; it does not divide {uneven[0]}"
            )
            yield "norm_num_groups", self.norm_num_groups, allowed

    def _size_problems(self) -> Iterator[tuple[str, Any, str]]:
        factor = self.downsampling_factor
        if not isinstance(self.image_size, int) and len(self.image_size) != 2:
            yield "image_size", self.image_size, "must be the side of a square, or [height, width]"
        elif min(self.image_shape) < 1:
            yield "image_size", self.image_size, "must be at least 1"
        elif any(side % factor for side in self.image_shape):
            allowed = (
                f"must be divisible by the downsampling factor {factor} "
                "(one halving per entry of channel_multiplier after the first)"
            )
            yield "image_size", self.image_size, allowed

    def _attention_problems(self) -> Iterator[tuple[str, Any, str]]:
        levels, sides = self.attn_levels or (), [min(shape) for shape in self.resolutions]
        if not set(levels) <= set(range(len(sides))):
            yield "attn_levels", self.attn_levels, f"must be among the levels, 0 (the largest) to {len(sides) - 1}"
        if self.attn_resolutions is None:
            return
        if self.attn_levels is not None:
            yield "attn_resolutions", self.attn_resolutions, f"attn_levels is {self.attn_levels}; set one to null"
        elif not set(self.attn_resolutions) <= set(sides):
            allowed = (
                f"must be among the resolutions of the levels, {', '.join(map(str, sides))} "
                "(image_size, or its shorter side, halved by each)"
            )
            yield "attn_resolutions", self.attn_resolutions, allowed

    @property
    def attention(self) -> list[bool]:
        """Whether the residual blocks of each level are followed by attention, highest resolution first."""
        if self.attn_levels is not None:
            return [level in self.attn_levels for level in range(len(self.channel_multiplier))]
        named = DEFAULT_RESOLUTIONS if self.attn_resolutions is None else self.attn_resolutions
        return [min(shape) in named for shape in self.resolutions]

    @property
    def decoder_blocks(self) -> int:
        """Residual blocks in each level of the decoder."""
        return self.num_res_blocks + 1 if self.decoder_num_res_blocks is None else self.decoder_num_res_blocks

    @property
    def widths(self) -> list[int]:
        """Channels of each level, highest resolution first."""
        return [round(self.base_channels * multiplier) for multiplier in self.channel_multiplier]

    @property
    def resolutions(self) -> list[tuple[int, int]]:
        """(height, width) of the feature maps of each level, for images of `image_size`."""
        height, width = self.image_shape
        return [(height >> level, width >> level) for level in range(len(self.channel_multiplier))]

    @property
    def num_weights(self) -> int:
        """Parameters of the encoder and the decoder, and entries × width of a learnt codebook.

        The model has at least so many parameters, and few more. It is not built to count them.
        """
        first, last = self.base_channels, self.widths[-1]
        n, m = self.num_res_blocks, self.decoder_blocks
        count = 2 * (_residual(last, last) * 2 + _attention(last) * self.mid_attention)  # of encoder and decoder
        count += _conv(self.in_channels, first) + _conv(self.widths[0], self.in_channels)
        count += 2 * _conv(last, self.latent_channels)
        for below, width, attends in zip([first, *self.widths], self.widths, self.attention, strict=False):
            count += _residual(below, width) + (n - 1) * _residual(width, width)
            count += (n + m) * _attention(width) * attends
        for width, previous in zip(self.widths, [*self.widths[1:], last], strict=True):
            count += _residual(previous, width) + (m - 1) * _residual(width, width)
        count += sum(_conv(width, width) for width in self.widths[:-1]) + sum(_conv(w, w) for w in self.widths[1:])
        codebooks, options = WITH_ENTRIES.get(self.quantizer, 0), self.quantizer_options
        if self.quantizer == "residual" and not options.get("shared_codebook"):
            codebooks = options.get("depth", 4)
        return count + codebooks * self.num_embeddings * self.embed_dim


def _conv(inner: int, outer: int, side: int = 3) -> int:
    return side * side * inner * outer


def _attention(width: int) -> int:
    return 4 * _conv(width, width, 1)


def _residual(inner: int, outer: int) -> int:
    shortcut = _conv(inner, outer, 1) if inner != outer else 0
    return _conv(inner, outer) + _conv(outer, outer) + shortcut


__all__ = ["VQGANArchitecture"]
