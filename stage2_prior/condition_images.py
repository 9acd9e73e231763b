"""Condition images: the transforms that make one from the image itself, and their codes."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.arguments import described
from stage1_vqgan import AspectRatio, VQGANModel, normalize, to_shape
from stage2_prior.conditions import Segment
from stage2_prior.transforms import Transform, parse_transform

# Shares of red, green and blue in the brightness (ITU-R BT.601, as in Pillow).
BRIGHTNESS = (0.299, 0.587, 0.114)
# How much the channels of a drawing without colours may differ, in levels of an image file: JPEG changes them a little.
COLOURLESS = 32
# Differences to the right and downwards (Sobel), divided so that a step from black to white has length 1.
SOBEL = ((-0.125, 0.0, 0.125), (-0.25, 0.0, 0.25), (-0.125, 0.0, 0.125))


def apply_transform(transform: str, pixels: Tensor) -> Tensor:
    """Makes condition images from images.

    The result has 256 levels, as an image file has, so an image that was saved and read again gives the same codes.

    Args:
        transform: "downscale 4": each pixel is the mean of 4×4 pixels. "gray": the brightness, in all channels.
            "edges": dark lines on white where the brightness changes (Sobel). "mask 0.5": a rectangle at the centre
            with half the height and half the width becomes gray.
        pixels: float `(B, C, H, W)` in [-1, 1].

    Returns:
        Float `(B, C, H', W')` in [-1, 1]. H' and W' are H and W; "downscale" divides them.

    Raises:
        ValueError: the transform does not exist, or does not fit the shape of the images.
    """
    try:
        name, amount = parse_transform(transform)
    except ValueError as error:
        raise ValueError(f"transform: received {transform!r}; {error}") from error
    if pixels.ndim != 4 or not pixels.is_floating_point():
        raise ValueError(f"pixels: received {described(pixels)}; must be float (B, C, H, W) in [-1, 1]")
    if problem := transform_problem(transform, pixels.shape[1], (pixels.shape[2], pixels.shape[3])):
        raise ValueError(f"transform: received {transform!r}; {problem}")
    return _levels(_changed(Transform(name, amount), pixels)).to(pixels.dtype)


def transform_problem(transform: str, channels: int, shape: tuple[int, int]) -> str:
    """Why images of this shape `(H, W)` cannot have a transform; empty if they can."""
    name, amount = parse_transform(transform)
    if name == "gray" and channels != 3:
        return f"these images have {channels} channels; only images with 3 have colours to remove"
    if name == "downscale" and (shape[0] % amount or shape[1] % amount):
        return f"{int(amount)} must divide height and width of the images, {shape[0]} and {shape[1]}"
    return ""


def transformed_shape(transform: str, shape: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the condition images of images with this height and width."""
    name, amount = parse_transform(transform)
    factor = int(amount) if name == "downscale" else 1
    return shape[0] // factor, shape[1] // factor


def condition_pixels(
    levels: Tensor, segment: Segment, aspect_ratio: AspectRatio = "crop", name: str = "image"
) -> Tensor:
    """The condition image of an image that a user gives: a picture, or already what the transform makes of it.

    "gray" and "mask" change nothing at the second time, so they are applied to both. "downscale" is applied to images
    of at least the size that the training images have; a smaller one is the small image itself. "edges" at the second
    time would draw the edges of lines, so it needs a drawing.

    Args:
        levels: uint8 `(H, W, C)`.
        segment: the condition.
        aspect_ratio: see `VQGANImageProcessor`.
        name: what messages call the image.

    Returns:
        Float32 `(C, *segment.image_shape)` in [-1, 1].

    Raises:
        ValueError: the image has colours, and the condition is "edges".
    """
    transform, shape = _missing_transform(levels, segment, name)
    pixels = normalize(to_shape(levels, shape, aspect_ratio).permute(2, 0, 1))[None]
    return (apply_transform(transform, pixels) if transform else pixels)[0]


def _missing_transform(levels: Tensor, segment: Segment, image: str) -> tuple[str, tuple[int, int]]:
    """The transform that an image needs, "" if none; and the height and width at which it is applied."""
    shape = (segment.image_shape[0], segment.image_shape[1])
    name, amount = parse_transform(segment.transform) if segment.transform else ("", 0)
    if name in ("gray", "mask"):
        return segment.transform, shape
    if name == "downscale":
        whole = shape[0] * int(amount), shape[1] * int(amount)
        return (
            (segment.transform, whole) if levels.shape[0] >= whole[0] and levels.shape[1] >= whole[1] else ("", shape)
        )
    if name == "edges" and int((levels.amax(2) - levels.amin(2)).max()) > COLOURLESS:
        advice = (
            f"{segment.name!r} is a drawing, dark lines on white: apply_transform('edges', …) of "
            "stage2_prior.condition_images makes it of a picture, and image.convert('L') removes colours of a drawing"
        )
        raise ValueError(f"{image}: received an image with colours; {advice}")
    return "", shape


def encode_images(tokenizer: VQGANModel, pixels: Tensor) -> Tensor:
    """The codes of images in the order of a sequence, int64 `(B, L)`; pixels `(B, C, H, W)` in [-1, 1]."""
    return cast(Tensor, tokenizer.encode(pixels).codes).flatten(1)


def _changed(transform: Transform, pixels: Tensor) -> Tensor:
    if transform.name == "downscale":
        return F.avg_pool2d(pixels, int(transform.amount))
    if transform.name == "mask":
        return _masked(pixels, transform.amount)
    gray = _brightness(pixels)
    changed = gray if transform.name == "gray" else 1 - 2 * _edges(gray)
    return changed.expand_as(pixels)


def _brightness(pixels: Tensor) -> Tensor:
    """`(B, 1, H, W)`: of images that are not RGB, the mean of the channels."""
    if pixels.shape[1] != 3:
        return pixels.mean(1, keepdim=True)
    return torch.einsum("bchw,c->bhw", pixels, pixels.new_tensor(BRIGHTNESS))[:, None]


def _edges(gray: Tensor) -> Tensor:
    """Strength of the edges in [0, 1]; `gray` is `(B, 1, H, W)` in [-1, 1]."""
    right = gray.new_tensor(SOBEL)
    kernels = torch.stack([right, right.T])[:, None]
    differences = F.conv2d(F.pad(gray, (1, 1, 1, 1), mode="replicate"), kernels)
    return differences.square().sum(1, keepdim=True).sqrt().clamp(max=1)


def _masked(pixels: Tensor, share: float) -> Tensor:
    """Images with a gray rectangle at the centre, whose sides are a share of theirs, at least one pixel."""
    height, width = pixels.shape[2:]
    tall, wide = max(1, round(share * height)), max(1, round(share * width))
    top, left = (height - tall) // 2, (width - wide) // 2
    masked = pixels.clone()
    masked[:, :, top : top + tall, left : left + wide] = 0
    return masked


def _levels(pixels: Tensor) -> Tensor:
    """Values rounded to the 256 levels of an image file."""
    return normalize(((pixels.float() + 1) * 127.5).round().clamp(0, 255))
