"""The shape of the VQGAN networks: the fields of `VQGANConfig` and the rules between them.

This file imports neither torch nor transformers, so a command checks its `model` section before their slow import.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from typing import Any

# Quantizers with K × D weights; the codes of the others follow from a formula.
WITH_ENTRIES = ("vq", "ema", "simvq", "ibq", "gumbel")


@dataclass(kw_only=True)
class VQGANArchitecture:
    """Fields that determine the shapes of encoder, decoder and codebook.

    The defaults are the f16 layout of the original with 1,024 codes.

    Args:
        image_size: side in pixels of the square images the tokenizer is trained on. The model is fully
            convolutional: other sizes work as long as the downsampling factor divides them.
        in_channels: image channels: 1 (gray), 2 (gray, alpha), 3 (RGB), 4 (RGBA), or more for data that are no
            pictures.
        base_channels: width of the first level.
        channel_multiplier: width of each level as a multiple of `base_channels`; every level but the first halves
            the resolution, so the downsampling factor is `2 ** (len(channel_multiplier) - 1)`.
        num_res_blocks: residual blocks in each level of the encoder (the decoder has one more).
        attn_resolutions: resolutions (`image_size` halved per level) whose residual blocks are followed by
            self-attention. The middle of encoder and decoder always attends.
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

    image_size: int = 256
    in_channels: int = 3
    base_channels: int = 128
    channel_multiplier: list[float | int] | tuple[float | int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    attn_resolutions: list[int] | tuple[int, ...] = (16,)
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
    def grid_size(self) -> int:
        """Side of the code grid at the training resolution."""
        return self.image_size // self.downsampling_factor

    def architecture_problems(self) -> Iterator[tuple[str, Any, str]]:
        """Sizes that no network can have, as `(field, value received, what is allowed)`."""
        for name in (
            "image_size",
            "in_channels",
            "base_channels",
            "num_res_blocks",
            "latent_channels",
            "embed_dim",
            "norm_num_groups",
        ):
            if getattr(self, name) < 1:
                yield name, getattr(self, name), "must be at least 1"
        if self.num_embeddings < 2:
            yield "num_embeddings", self.num_embeddings, "a codebook needs at least 2 entries"
        if not 0 <= self.dropout < 1:
            yield "dropout", self.dropout, "must be at least 0 and below 1"
        if not self.channel_multiplier or not all(0 < multiplier < inf for multiplier in self.channel_multiplier):
            yield "channel_multiplier", self.channel_multiplier, "needs positive numbers, one for each level"
            return
        if self.image_size % self.downsampling_factor:
            allowed = (
                f"must be divisible by the downsampling factor {self.downsampling_factor} "
                "(one halving per entry of channel_multiplier after the first)"
            )
            yield "image_size", self.image_size, allowed
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

    @property
    def widths(self) -> list[int]:
        """Channels of each level, highest resolution first."""
        return [round(self.base_channels * multiplier) for multiplier in self.channel_multiplier]

    @property
    def resolutions(self) -> list[int]:
        """Side in pixels of the feature maps of each level, at the training resolution."""
        return [self.image_size >> level for level in range(len(self.channel_multiplier))]

    @property
    def num_weights(self) -> int:
        """Parameters of the encoder and the decoder, and entries × width of a learnt codebook.

        The model has at least so many parameters, and few more. It is not built to count them.
        """
        first, last, n = self.base_channels, self.widths[-1], self.num_res_blocks
        count = 2 * (_residual(last, last) * 2 + _attention(last))  # the middle of encoder and decoder
        count += _conv(self.in_channels, first) + _conv(self.widths[0], self.in_channels)
        count += 2 * _conv(last, self.latent_channels)
        for below, width, resolution in zip([first, *self.widths], self.widths, self.resolutions, strict=False):
            count += _residual(below, width) + (n - 1) * _residual(width, width)
            count += (2 * n + 1) * _attention(width) * (resolution in self.attn_resolutions)
        for width, previous in zip(self.widths, [*self.widths[1:], last], strict=True):
            count += _residual(previous, width) + n * _residual(width, width)
        count += sum(_conv(width, width) for width in self.widths[:-1]) + sum(_conv(w, w) for w in self.widths[1:])
        return count + (self.num_embeddings * self.embed_dim if self.quantizer in WITH_ENTRIES else 0)


def _conv(inner: int, outer: int, side: int = 3) -> int:
    return side * side * inner * outer


def _attention(width: int) -> int:
    return 4 * _conv(width, width, 1)


def _residual(inner: int, outer: int) -> int:
    shortcut = _conv(inner, outer, 1) if inner != outer else 0
    return _conv(inner, outer) + _conv(outer, outer) + shortcut


__all__ = ["VQGANArchitecture"]
