"""Random cut-outs of an image: what CLIP sees of it in a step. Gradients pass through all of it to the image.

torchvision's transforms are not used: they draw from the global generator, one draw holds for a whole batch, and their
change of hue has no gradient.

Shape letters: B images, M cut-outs of an image, N = B·M, H W image size, S side of a cut-out.

Source: Crowson et al. 2022, "VQGAN-CLIP: open domain image generation and editing with natural language guidance",
section 3.2. Average and maximum pooling, and the kinds of augmentation, follow the authors' notebooks, without their
changes of perspective and sharpness. Their crops have sides from S up to the image's shorter side. Here a crop may be
as small as half of that side, because many tokenizers have images smaller than S.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.randomness import seed_from, uniform

FLIPPED, MOVED, RECOLOURED = 0.5, 0.8, 0.7  # shares of the cut-outs
ANGLE, SHIFT = math.radians(30), 0.1  # the largest; a shift is a share of the side
HUE, SATURATION = 0.1, 0.1  # the largest changes; that of the hue is a share of the circle
NOISE = 0.1  # the largest standard deviation
NUM_DRAWS = 12  # random numbers of a cut-out


def cutouts(images: Tensor, seeds: list[int], step: int, count: int, size: int) -> Tensor:
    """Crops of differing sizes, brought to one size, flipped, moved, recoloured, and with noise.

    Args:
        images: float32 `(B, 3, H, W)` in [0, 1].
        seeds: the seed of each image. A cut-out depends only on the seed, the step and its own number.
        step: number of the step.
        count: M.
        size: S.

    Returns:
        float32 `(B·M, 3, S, S)`, those of an image one after another.
    """
    draws = uniform(
        torch.tensor(seeds)[:, None, None], torch.tensor(step), torch.arange(count)[:, None], torch.arange(NUM_DRAWS)
    )
    pairs = zip(images, draws.tolist(), strict=True)
    crops = torch.stack([pooled(crop(image, size, *row[:3]), size) for image, rows in pairs for row in rows])
    flip, moves, angle, right, down, recolours, hue, saturation, noise = (
        draws.flatten(0, 1).T[3:].float().to(images.device)
    )
    angle, right, down = ((2 * draw - 1) * (moves < MOVED) for draw in (angle, right, down))
    hue, saturation = ((2 * draw - 1) * (recolours < RECOLOURED) for draw in (hue, saturation))
    crops = moved(crops, flip < FLIPPED, ANGLE * angle, SHIFT * right, SHIFT * down)
    crops = recoloured(crops, 2 * math.pi * HUE * hue, 1 + SATURATION * saturation)
    return crops + (NOISE * noise)[:, None, None, None] * normal(crops, seeds, step)


def crop(image: Tensor, size: int, zoom: float, top: float, left: float) -> Tensor:
    """A square crop of an image `(3, H, W)`; its side and place are given as random numbers in [0, 1).

    The side is at most the shorter side of the image, and at least half of it, or `size` if that is less.
    """
    height, width = image.shape[1:]
    most = min(height, width)
    least = min(size, (most + 1) // 2)
    side = least + int(zoom * (most - least + 1))
    y, x = int(top * (height - side + 1)), int(left * (width - side + 1))
    return image[:, y : y + side, x : x + side]


def pooled(image: Tensor, size: int) -> Tensor:
    """An image `(3, H, W)` as `(3, S, S)`: the mean of average and maximum pooling."""
    return (F.adaptive_avg_pool2d(image, size) + F.adaptive_max_pool2d(image, size)) / 2


def moved(images: Tensor, flip: Tensor, angle: Tensor, right: Tensor, down: Tensor) -> Tensor:
    """Flips, turns and shifts images `(N, 3, S, S)`. Border pixels fill the gaps.

    Args:
        images: float32 `(N, 3, S, S)`.
        flip: bool `(N,)`, whether left and right change places.
        angle: `(N,)` in radians.
        right, down: `(N,)`, as shares of the side.
    """
    mirror, cos, sin = torch.where(flip, -1.0, 1.0), angle.cos(), angle.sin()
    rows = [mirror * cos, -mirror * sin, -2 * mirror * right, sin, cos, -2 * down]  # from result to source, in [-1, 1]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def recoloured(images: Tensor, hue: Tensor, saturation: Tensor) -> Tensor:
    """Changes hue and saturation by a linear map of the colours, which leaves gray as it is.

    The difference of a colour from its gray, the mean of the three channels, is turned about the gray axis, and
    multiplied.

    Args:
        images: float32 `(N, 3, S, S)`.
        hue: angle `(N,)` in radians.
        saturation: factor `(N,)`.
    """
    gray = images.new_full((3, 3), 1 / 3)
    across = images.new_tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    hue, saturation = hue[:, None, None], saturation[:, None, None]
    turned = hue.cos() * (torch.eye(3, device=images.device) - gray) + hue.sin() * across
    return torch.einsum("nij,njhw->nihw", gray + saturation * turned, images)


def normal(like: Tensor, seeds: list[int], step: int) -> Tensor:
    """Normal random numbers of the shape of the cut-outs, from a generator for each image and step."""
    noise = torch.empty_like(like)
    for rows, seed in zip(noise.chunk(len(seeds)), seeds, strict=True):
        rows.normal_(generator=torch.Generator(like.device).manual_seed(seed_from(seed, step)))
    return noise
