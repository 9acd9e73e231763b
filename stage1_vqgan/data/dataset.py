"""Images of a source → batches of uint8 crops.

Random numbers are functions of (seed, epoch, image, view), never drawn from a global generator. So a batch does not
depend on the number of workers and processes, or on interruptions.
"""

from bisect import bisect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from configs.randomness import uniform_rows
from stage1_vqgan.data.augmentation import NUM_DRAWS, augment, ten_crop
from stage1_vqgan.data.config import AugmentationConfig
from stage1_vqgan.data.decoding import EncodedImage, SkippedImage, UndecodableImage, decode_pixels
from stage1_vqgan.data.indexed import ImageSource
from stage1_vqgan.data.sources import Images
from stage1_vqgan.data.transfer import to_device
from stage1_vqgan.image_processing_shapes import AspectRatio, normalize, resize, to_shape
from stage1_vqgan.image_processing_values import ValueRange

# A crop of up to this many times the height and width of the images is resized on the model's device. For images of
# 256 pixels that includes photos of 500×375. Larger crops would need too much memory, so the workers resize them.
MAX_REDUCTION = 1.5


class ImageKey(NamedTuple):
    """The address of a training image. Its numbers and the seed determine the augmentation.

    Attributes:
        epoch: number of the pass over the source.
        image: number of the image in the source.
        view: number of the augmented view of the image.
        encoded: the image, if the source is a stream; None if the source reads it by number.
    """

    epoch: int
    image: int
    view: int = 0
    encoded: EncodedImage | None = None


class ImageBatch(NamedTuple):
    """A batch of a loader: crops of different sizes, which `images` resizes and mirrors on the model's device.

    Attributes:
        rows: uint8 `(B, n)`; the first values of a row are the pixels of a crop `(height, width, C)`, the rest is
            undefined.
        shapes: height and width of each crop in pixels, at least `image_shape`.
        flips: whether `images` must mirror a crop.
        image_shape, num_channels: as in the dataset.
        indices: int64 `(B,)`, number of each image in the source.
        skipped: images that could not be decoded.
    """

    rows: Tensor
    shapes: list[tuple[int, int]]
    flips: list[bool]
    image_shape: tuple[int, int]
    num_channels: int
    indices: Tensor
    skipped: list[SkippedImage]

    def images(self, device: torch.device | str = "cpu") -> Tensor:
        """The model's input: float32 `(B, C, *image_shape)` in [-1, 1], channels-last in memory."""
        rows = to_device(self.rows, device)
        pixels = torch.empty((len(rows), *self.image_shape, self.num_channels), dtype=torch.uint8, device=device)
        for shape in set(self.shapes):
            same = [place for place, other in enumerate(self.shapes) if other == shape]
            places = to_device(torch.tensor(same), device)
            crops = rows[places, : prod(shape) * self.num_channels].view(-1, *shape, self.num_channels)
            pixels[places] = resize(crops, *self.image_shape)
        mirrored = [place for place, flip in enumerate(self.flips) if flip]
        flipped = to_device(torch.tensor(mirrored, dtype=torch.int64), device)
        pixels[flipped] = pixels[flipped].flip(2)
        return normalize(pixels.permute(0, 3, 1, 2))


@dataclass(frozen=True)
class ImageDataset(Dataset):
    """Images of one split as uint8 crops. The key of an image determines its augmentation.

    Attributes:
        source: the images.
        image_shape: height and width of the images of a batch, in pixels.
        num_channels: number of their channels.
        augmentation: None does not augment; then only the `image` of a key matters.
        seed: seed of the augmentation.
        first_view_plain: do not augment view 0; without effect with ten_crop.
        aspect_ratio: see `to_shape`.
        keep_batch_size: replace an image that cannot be decoded by another view of the next image of the batch.
            Otherwise it is left out, and the batch may be empty.
        value_range: the pixel values that become black and white; None takes the range of the dtype.
    """

    source: Images
    image_shape: tuple[int, int]
    num_channels: int
    augmentation: AugmentationConfig | None = None
    seed: int = 0
    first_view_plain: bool = False
    aspect_ratio: AspectRatio = "crop"
    keep_batch_size: bool = False
    value_range: ValueRange | None = None

    @property
    def max_shape(self) -> tuple[int, int]:
        """Height and width of the largest crop in a batch, in pixels."""
        height, width = self.image_shape
        return int(MAX_REDUCTION * height), int(MAX_REDUCTION * width)

    @property
    def row_size(self) -> int:
        """Number of bytes of the largest crop in a batch."""
        return prod(self.max_shape) * self.num_channels

    def __getitems__(self, keys: Sequence[ImageKey], rows: Tensor | None = None) -> ImageBatch:
        """The batch of some keys, in their order; a pure function of the keys.

        Args:
            keys: keys of the images.
            rows: uint8 `(len(keys) or more, row_size)`, memory to write the batch to; by default it is allocated.

        Raises:
            UndecodableImage: with `keep_batch_size`, none of the images can be decoded.
        """
        encoded = self._encoded(keys)
        rows = torch.empty((len(keys), self.row_size), dtype=torch.uint8) if rows is None else rows[: len(keys)]
        memory = rows.numpy()
        images, flips = [key.image for key in keys], [False] * len(keys)
        shapes = [(0, 0)] * len(keys)
        skipped = {}
        for place, key, draws in zip(range(len(keys)), keys, self._draws(keys), strict=True):
            if place == 0 or keys[place - 1].image != key.image:  # decode once for neighbouring views of an image
                image = self._decode(encoded[place])
            if isinstance(image, UndecodableImage):
                skipped[place] = SkippedImage(key.image, encoded[place].name, str(image))
            else:
                shapes[place], flips[place] = self._put(memory[place], image, key, draws)
        if skipped:
            used = [place for place in range(len(keys)) if place not in skipped]
            if self.keep_batch_size:
                for place, stand_in, key in _stand_ins(keys, used, skipped):
                    image = decode_pixels(encoded[stand_in], self.num_channels, self.value_range)
                    shapes[place], flips[place] = self._put(memory[place], image, key, self._draws([key])[0])
                    images[place] = key.image
            else:
                rows[: len(used)] = rows[used]
                rows, images = rows[: len(used)], [images[place] for place in used]
                shapes, flips = [shapes[place] for place in used], [flips[place] for place in used]
        indices = torch.tensor(images, dtype=torch.int64)
        return ImageBatch(rows, shapes, flips, self.image_shape, self.num_channels, indices, list(skipped.values()))

    def _encoded(self, keys: Sequence[ImageKey]) -> list[EncodedImage]:
        """The encoded images: from the keys of a stream, else read from the source in one call."""
        numbers = [key.image for key in keys if key.encoded is None]
        read = iter(self.source.encoded(numbers) if isinstance(self.source, ImageSource) and numbers else ())
        return [next(read) if key.encoded is None else key.encoded for key in keys]

    def _draws(self, keys: Sequence[ImageKey]) -> np.ndarray:
        numbers = np.array([key[:3] for key in keys], dtype=np.int64).reshape(-1, 3)
        return uniform_rows(self.seed, numbers, NUM_DRAWS)

    def _decode(self, encoded: EncodedImage) -> Tensor | UndecodableImage:
        try:
            pixels = decode_pixels(encoded, self.num_channels, self.value_range)
        except UndecodableImage as error:
            return error
        if self.augmentation is not None and self.augmentation.ten_crop:  # all views are crops of these pixels
            height, width = (round(self.augmentation.max_zoom * side) for side in self.image_shape)
            return to_shape(pixels, (height, width), self.aspect_ratio)
        return pixels

    def _put(self, row: np.ndarray, pixels: Tensor, key: ImageKey, draws: np.ndarray) -> tuple[Any, bool]:
        """Writes the crop of an image, uint8 `(H, W, C)`, to a row; returns its shape and whether to mirror it."""
        if self.augmentation is not None and self.augmentation.ten_crop:
            crop, flip = ten_crop(pixels, self.image_shape, key.view), False
        elif self.augmentation is None or (self.first_view_plain and key.view == 0):
            crop, flip = to_shape(pixels, self.image_shape, self.aspect_ratio, max_shape=self.max_shape), False
        else:
            change, ratio = self.augmentation, self.aspect_ratio
            crop, flip = augment(pixels, self.image_shape, change, draws, ratio, self.max_shape)
        array = crop.numpy()  # numpy copies a small array faster than torch
        row[: array.size].reshape(array.shape)[:] = array
        return array.shape[:2], flip


def _stand_ins(
    keys: Sequence[ImageKey], used: Sequence[int], skipped: Mapping[int, SkippedImage]
) -> Iterator[tuple[int, int, ImageKey]]:
    """For each place of a skipped image: the place of the next decodable image, and the key of another view of it."""
    if not used:
        listed = "\n".join(f"  {image.name}: {image.reason}" for image in list(skipped.values())[:3])
        raise UndecodableImage(f"none of the {len(keys)} images of a batch can be decoded:\n{listed}")
    times = Counter[int]()
    for place in skipped:
        stand_in = used[bisect(used, place) % len(used)]
        times[stand_in] += 1
        yield place, stand_in, keys[stand_in]._replace(view=keys[stand_in].view + times[stand_in])
