"""Encodes images in chunks: how many the tokenizer encodes or decodes at once, and how much memory they take."""

from typing import Any

import torch
from torch import Tensor

from configs.memory import USABLE, free_memory
from stage1_vqgan import VQGANModel
from stage2_prior import TokenLayout

# Larger chunks are not faster.
LARGEST_CHUNK = 2**22  # pixels

# The tokenizer needs memory for about this many feature maps of its widest level at once: input and output of a
# residual block, the outputs of the block's inner layers, and the workspace of the convolution.
MAPS_AT_ONCE = 8


def images_at_once(vqgan: VQGANModel, pixels: int) -> int:
    """The number of images in one chunk, at least 1.

    Args:
        vqgan: the tokenizer, on its device.
        pixels: number of pixels of one image, H·W.
    """
    widths = vqgan.config.widths
    # Each level has a quarter of the pixels of the level above. The decoder enters it with the channels of the level
    # below.
    pairs = zip(widths, [*widths[1:], widths[-1]], strict=True)
    channels_per_pixel = max(vqgan.config.base_channels, *(max(pair) / 4**level for level, pair in enumerate(pairs)))
    each = int(MAPS_AT_ONCE * channels_per_pixel * pixels * vqgan.dtype.itemsize)
    return max(1, min(LARGEST_CHUNK // pixels, int(USABLE * free_memory(vqgan.device)) // each))


def encode_in_chunks(vqgan: VQGANModel, pixel_values: Tensor) -> Tensor:
    """Codes of prepared images `(N, C, H, W)`; their shape is that of `VQGANModel.encode`.

    Raises:
        FloatingPointError: latents were NaN or infinite.
    """
    parts = pixel_values.split(images_at_once(vqgan, pixel_values[0, 0].numel()))
    encoded: list[Any] = [vqgan.encode(part.to(vqgan.device, vqgan.dtype)) for part in parts]
    if not torch.stack([part.latents.isfinite().all() for part in encoded]).all():
        advice = "load the pipeline in float32, or check whether the tokenizer's weights are damaged"
        raise FloatingPointError(f"the tokenizer's latents are NaN or infinite in {vqgan.dtype}; {advice}")
    return torch.cat([part.codes for part in encoded])


def bytes_of_image(vqgan: VQGANModel, layout: TokenLayout, pixels: int, output_type: str) -> int:
    """Bytes that one image takes at least in what `generate` or `decode` returns.

    Args:
        vqgan: the tokenizer.
        layout: the token layout.
        pixels: number of pixels of one image, H·W.
        output_type: see `VQGANPipeline.generate`. Arrays and tensors are 32-bit floats, PIL images are bytes.
    """
    codes = 8 * layout.length * pixels // layout.pixels
    each = {"pil": 1, "np": 4, "pt": 4, "codes": 0}[output_type]
    return codes + each * pixels * vqgan.config.in_channels
