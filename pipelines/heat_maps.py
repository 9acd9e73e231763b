"""Heat maps: where in an image its codes surprise the prior.

Shape letters: N images, H W height and width in pixels, h w code grid, g codes at a position.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from configs.arguments import described, is_number
from stage2_prior import TokenLayout

# Colours from the lowest to the highest value, evenly spaced: "inferno" of matplotlib.
COLOURS = np.array(
    [(0, 0, 4), (40, 11, 84), (101, 21, 110), (159, 42, 99), (212, 72, 66), (245, 125, 21), (250, 193, 39),
     (252, 255, 164)]
)  # fmt: skip
OPACITY = 0.8  # of the highest colour; lower ones let more of the image through


def surprise_maps(code_nats: Tensor, layout: TokenLayout) -> Tensor:
    """Bits per pixel at every pixel, float32 `(N, H, W)`, interpolated between the centres of the codes' patches.

    Several codes at a position, and several grids, add up.

    Args:
        code_nats: `(N, *codes_shape)`.
        layout: the token layout.
    """
    flat = code_nats.flatten(1).float()
    total = torch.zeros(len(flat), *layout.image_shape)
    for h, w, g in layout.all_grids:
        part, flat = flat[:, : h * w * g], flat[:, h * w * g :]
        bits = part.view(-1, h, w, g).sum(-1) / (math.log(2) * layout.pixels / (h * w))
        total += F.interpolate(bits[:, None], size=layout.image_shape, mode="bilinear")[:, 0]
    return total


def overlays(images: Sequence[Image.Image], maps: Tensor, span: tuple[float, float] | None = None) -> list[Image.Image]:
    """Images in gray under the colours of their maps, RGB. The higher a value, the more its colour covers.

    Args:
        images: N images; transparent ones lie on white.
        maps: float32 `(N, H, W)`, of the sizes of the images.
        span: the values of the lowest and of the highest colour; by default the 1st and the 99th percentile of `maps`.

    Raises:
        ValueError: the span is not two ascending numbers.
    """
    low, high = span_of(maps) if span is None else _ends(span)
    shares = ((maps.numpy() - low) / (high - low or 1)).clip(0, 1)[..., None]
    return [_overlay(image, share) for image, share in zip(images, shares, strict=True)]


def span_of(maps: Tensor) -> tuple[float, float]:
    """The 1st and the 99th percentile of all values."""
    low, high = np.percentile(maps.numpy(), (1, 99)).tolist()
    return low, high


def _overlay(image: Image.Image, shares: np.ndarray) -> Image.Image:
    """One image under the colours of shares in [0, 1], float32 `(H, W, 1)`."""
    places = np.linspace(0, 1, len(COLOURS))
    colours = np.concatenate([np.interp(shares, places, channel) for channel in COLOURS.T], -1)
    opacity = OPACITY * shares
    return Image.fromarray(np.rint(_gray(image) * (1 - opacity) + colours * opacity).astype(np.uint8))


def _ends(span: tuple[float, float]) -> tuple[float, float]:
    ends = list(span) if isinstance(span, list | tuple) else []
    if len(ends) == 2 and all(map(is_number, ends)) and ends[0] < ends[1]:
        return float(ends[0]), float(ends[1])
    raise ValueError(f"span: received {described(span)}; must be two numbers of bits per pixel, the lower one first")


def _gray(image: Image.Image) -> np.ndarray:
    """float64 `(H, W, 1)` from 0 to 255."""
    if image.mode.endswith("A"):
        white = Image.new(image.mode, image.size, (255,) * len(image.getbands()))
        image = Image.alpha_composite(white.convert("RGBA"), image.convert("RGBA"))
    return np.asarray(image.convert("L"), dtype=np.float64)[..., None]
