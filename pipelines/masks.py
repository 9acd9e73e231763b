"""Masks of images: which pixels are hidden, which codes that leaves known, and how new pixels join the old ones.

Shape letters: N images, C channels, H W image size, h w code grid, f downsampling factor, L codes of an image.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from configs.arguments import described, whole
from pipelines.arguments import has_values
from stage1_vqgan import VQGANImageProcessor, normalize
from stage1_vqgan.image_processing_pixels import pixels_of
from stage1_vqgan.image_processing_shapes import to_shape

BLANK = 128  # the level of hidden pixels before resizing, and in an image without a visible one
HALF = 128  # from this level on, a pixel of a gray mask is white


class MaskedImages(NamedTuple):
    """Images without their hidden pixels.

    Attributes:
        pixel_values: float32 `(N, C, H, W)` in [-1, 1]. A hidden pixel has the colour of the nearest visible one.
        hidden: bool `(N, 1, H, W)`.
        nearest: int64 `(N, H·W)`, the nearest visible pixel of each pixel.
        distance: float32 `(N, 1, H, W)`, how far that is, in pixels.
    """

    pixel_values: Tensor
    hidden: Tensor
    nearest: Tensor
    distance: Tensor

    @classmethod
    def of(cls, pixel_values: Tensor, hidden: Tensor) -> "MaskedImages":
        """Hides pixels of images `(N, C, H, W)`. `hidden` is bool `(N, 1, H, W)`.

        A constant would change more codes of the visible part: convolutions reach across the border, and group
        normalization and attention mix the whole image.
        """
        found = [_nearest(mask) for mask in hidden[:, 0].numpy()]
        nearest, distance = (torch.stack(each) for each in zip(*found, strict=True))
        visible = pixel_values.masked_fill(hidden, float(normalize(torch.tensor(BLANK))))
        return cls(_taken(visible, nearest), hidden, nearest, distance[:, None])


def _nearest(mask: np.ndarray) -> tuple[Tensor, Tensor]:
    """Index `(H·W,)` of the nearest visible pixel and its distance `(H, W)`; without any, its own and infinity."""
    if mask.all():
        return torch.arange(mask.size), torch.full(mask.shape, torch.inf)
    distance, (rows, columns) = distance_transform_edt(mask, return_indices=True)
    index = np.ravel_multi_index((rows, columns), mask.shape)
    return torch.from_numpy(index).flatten(), torch.from_numpy(distance).float()


def _taken(images: Tensor, index: Tensor) -> Tensor:
    """Images `(N, C, H, W)` whose pixels are taken from the places `index` `(N, H·W)`."""
    return images.flatten(2).gather(2, index[:, None].expand(-1, images.shape[1], -1)).view_as(images)


def masked_images(processor: VQGANImageProcessor, images: Any, masks: Any) -> MaskedImages:
    """Reads images and masks, hides pixels, and brings both to the size of the processor.

    An image of another size is blanked before it is resized, because resizing mixes neighbouring pixels. Then every
    pixel counts as hidden that resizing could mix with a hidden one.

    Args:
        processor: the image processor.
        images: see `VQGANImageProcessor.preprocess`.
        masks: see `Editing.inpaint`.

    Raises:
        ValueError: an image or a mask cannot be read, or their numbers or sizes differ.
    """
    levels = list(processor.read(images))
    prepared, hidden = [], []
    for number, (image, mask) in enumerate(zip(levels, read_masks(masks, len(levels)), strict=True)):
        if mask.shape != image.shape[:2]:
            size, needed = " × ".join(map(str, mask.shape)), " × ".join(map(str, image.shape[:2]))
            raise ValueError(
                f"masks: received {size} pixels (height × width) for images[{number}], which has {needed}; "
                "needs a mask of the same size"
            )
        image, mask = _resized(processor, image.masked_fill(mask[..., None], BLANK), mask)
        prepared.append(image)
        hidden.append(mask)
    pixel_values = normalize(torch.stack(prepared).permute(0, 3, 1, 2)).contiguous()
    return MaskedImages.of(pixel_values, torch.stack(hidden)[:, None])


def _resized(processor: VQGANImageProcessor, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """An image uint8 `(H, W, C)` and its mask bool `(H, W)` in the size of the processor."""
    shape = processor.image_shape
    if image.shape[:2] == shape:
        return image, mask
    visible = (~mask)[..., None].to(torch.uint8) * 255  # so that the sides of a padded image are visible
    image, visible = (to_shape(pixels, shape, processor.aspect_ratio) for pixels in (image, visible))
    # Bicubic interpolation reaches two pixels far: of the result, or of an image that is enlarged.
    fit = max if processor.aspect_ratio == "crop" else min
    growth = fit(new / old for new, old in zip(shape, mask.shape, strict=True))
    return image, _widened(visible[..., 0] < 255, math.ceil(2 * max(1.0, growth)))


def _widened(mask: Tensor, reach: int) -> Tensor:
    """A mask bool `(H, W)` and the pixels at most `reach` beside it."""
    return F.max_pool2d(mask[None].float(), 2 * reach + 1, stride=1, padding=reach)[0] > 0


def read_masks(masks: Any, count: int) -> list[Tensor]:
    """One bool mask `(H, W)` for each of `count` images, true where a pixel is hidden; see `Editing.inpaint`.

    Raises:
        ValueError: a mask has another type, dtype or shape, or there are neither one nor `count` of them.
    """
    single = isinstance(masks, Image.Image) or (isinstance(masks, np.ndarray | Tensor) and masks.ndim == 2)
    each = [masks] * count if single else masks
    listed = isinstance(each, list | tuple) or (isinstance(each, np.ndarray | Tensor) and each.ndim > 0)
    if not listed or len(each) != count:
        counted = f"a list of {len(masks)}" if isinstance(masks, list | tuple) else described(masks)
        raise ValueError(f"masks: received {counted} for {count} images; needs one mask for each, or one for all")
    return [_read(mask, "masks" if single else f"masks[{number}]") for number, mask in enumerate(each)]


def _read(mask: Any, name: str) -> Tensor:
    if isinstance(mask, Image.Image):
        if mask.has_transparency_data:
            raise ValueError(f"{name}: received a picture with transparency; needs black (keep) and white (repaint)")
        try:
            return pixels_of(mask, 1)[..., 0] >= HALF
        except Exception as error:  # Pillow raises errors of many types for damaged files
            reason = str(error).removeprefix("image: ").partition("\n")[0][:200]
            raise ValueError(f"{name}: {reason or type(error).__name__}") from error
    holds = isinstance(mask, np.ndarray) or (isinstance(mask, Tensor) and has_values(mask))
    if not holds or mask.dtype not in (np.bool_, torch.bool) or mask.ndim != 2:
        advice = "needs a PIL image, or an array or a tensor (H, W) of booleans, for instance mask > 0"
        raise ValueError(f"{name}: received {described(mask)}; {advice}")
    return torch.as_tensor(mask).cpu()


def known_codes(codes: Tensor, hidden: Tensor) -> Tensor:
    """The codes of the places at which no pixel is hidden, and -1 at the others.

    Args:
        codes: int64 `(N, h, w)` or `(N, h, w, G)`.
        hidden: bool `(N, 1, H, W)`; f is H / h.
    """
    places = F.max_pool2d(hidden.float(), hidden.shape[-1] // codes.shape[2])[:, 0].bool()
    return codes.masked_fill(places if codes.ndim == 3 else places[..., None], -1)


def joined(images: Tensor, originals: MaskedImages, seam: int) -> Tensor:
    """New pixels where the originals are hidden, and the originals elsewhere.

    At the border the two differ. A hidden pixel takes over this difference from the nearest visible pixel. It fades
    linearly to 0 over `seam` pixels. So there is no step, and no visible pixel changes.

    Args:
        images: new images, float32 `(N, C, H, W)`.
        originals: the images whose visible pixels stay.
        seam: width in pixels; 0 leaves the step.
    """
    pixel_values, hidden, nearest, distance = (tensor.to(images.device) for tensor in originals)
    difference = _taken(pixel_values - images, nearest)
    return torch.where(hidden, images + difference * (1 - distance / (seam + 1)).clamp(min=0), pixel_values)


def kept_box(rows: Any, box: Any, shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the part of an image of `shape` (H, W) that `rows` or `box` keeps.

    Raises:
        ValueError: both or neither are given, or they do not lie in the image.
    """
    height, width = shape
    if (rows is None) == (box is None):
        given = "neither rows nor" if rows is None else "rows, and a"
        raise ValueError(f"rows: received {given} box; give one of them, the part of the images that is kept")
    if rows is not None:
        return 0, 0, width, whole("rows", rows, most=height - 1)
    try:
        left, top, right, bottom = (whole("box", side, least=0) for side in box)
    except (TypeError, ValueError) as error:
        raise ValueError(f"box: received {described(box)}; needs left, top, right, bottom in pixels") from error
    if not (left < right <= width and top < bottom <= height):
        allowed = f"needs left < right <= {width} and top < bottom <= {height}"
        raise ValueError(f"box: received {described(box)}; {allowed}")
    return left, top, right, bottom


def hidden_around(box: tuple[int, int, int, int], shape: tuple[int, int]) -> Tensor:
    """bool `(1, 1, H, W)`, false in the box and true around it."""
    left, top, right, bottom = box
    hidden = torch.ones(1, 1, *shape, dtype=torch.bool)
    hidden[..., top:bottom, left:right] = False
    return hidden
