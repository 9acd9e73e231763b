"""Images of 1, 2, 3, 4 and more channels: converted where a conversion is known, else refused."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from stage1_vqgan import (
    AugmentationConfig,
    EncodedImage,
    ImageDataset,
    ImageKey,
    ImageSource,
    VQGANImageProcessor,
    image_grid,
)
from stage1_vqgan.data.augmentation import augment
from stage1_vqgan.data.decoding import UndecodableImage, decode_pixels

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (12, 10, 3), dtype=np.uint8)
GRAY, ALPHA = RGB[..., 0], RNG.integers(0, 256, (12, 10), dtype=np.uint8)
OPAQUE = np.full_like(ALPHA, 255)


def file(image, file_format="PNG", **options):
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, file_format, **options)
    return buffer.getvalue()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def pages(count, dtype=np.uint8):
    first, *others = [Image.fromarray((GRAY // (n + 1)).astype(dtype)) for n in range(count)]
    return file(first, "TIFF", save_all=True, append_images=others)


UNEQUAL = file(Image.fromarray(GRAY), "TIFF", save_all=True, append_images=[Image.new("L", (s, 5)) for s in (4, 6)])


def stack(count):
    return np.stack([GRAY // (n + 1) for n in range(count)], -1)


USED = {
    "rgba": (file(np.dstack([RGB, ALPHA])), 4, np.dstack([RGB, ALPHA])),
    "rgb as rgba": (file(RGB), 4, np.dstack([RGB, OPAQUE])),
    "gray as rgba": (file(GRAY), 4, np.dstack([GRAY, GRAY, GRAY, OPAQUE])),
    "gray and alpha": (file(np.dstack([GRAY, ALPHA])), 2, np.dstack([GRAY, ALPHA])),
    "gray as gray and alpha": (file(GRAY), 2, np.dstack([GRAY, OPAQUE])),
    "palette with a transparent colour": (file(Image.fromarray(GRAY // 255 * 1).convert("P"), transparency=0), 2, None),
    "pages": (pages(5), 5, stack(5)),
    "three pages": (pages(3), 3, stack(3)),
    "first of three pages": (pages(3), 1, GRAY[..., None]),
    "first of five pages": (pages(5), 3, np.dstack([GRAY] * 3)),
    "first of three pages of several sizes": (UNEQUAL, 3, np.dstack([GRAY] * 3)),
    "array": (npy(stack(6)), 6, stack(6)),
    "array, channels first": (npy(stack(6).transpose(2, 0, 1)), 6, stack(6)),
    "array of two": (npy(stack(2)), 2, stack(2)),
    "gray array": (npy(GRAY), 3, np.dstack([GRAY] * 3)),
    "jpeg as rgba": (file(np.full((12, 10, 3), 200, np.uint8), "JPEG"), 4, None),
}  # fmt: skip
REFUSED = {
    "rgba as five": (file(np.dstack([RGB, ALPHA])), 5, "received 4 channels, but the tokenizer has 5"),
    "gray as six": (file(GRAY), 6, "received 1 channels, but the tokenizer has 6"),
    "five pages as four": (pages(5), 4, "received 5 gray pages, but the tokenizer has 4"),
    "unequal pages": (
        file(Image.fromarray(GRAY), "TIFF", save_all=True, append_images=[Image.new("L", (4, 5))]),
        2,
        "received pages of several sizes or colours",
    ),
    "gray array as two": (npy(GRAY), 2, "received 1 channels, but the tokenizer has 2"),
    "array of two as gray": (npy(stack(2)), 1, "received shape (12, 10, 2); neither its first nor its last axis"),
    "objects": (npy(np.array([[None]])), 1, "holds Python objects, which are never read"),
    "cut array": (npy(GRAY)[:-9], 1, "buffer is smaller than requested size"),
    "huge array": (npy(GRAY).replace(b"(12, 10), }  ", b"(99999999, 9)}"), 1, "buffer is smaller"),
    "four dimensions": (npy(np.zeros((2, 3, 4, 5), np.uint8)), 1, "received shape (2, 3, 4, 5); needs"),
}


@pytest.mark.parametrize("kind", USED)
def test_used(kind):
    content, channels, expected = USED[kind]
    found = decode_pixels(EncodedImage("x", content), channels)
    assert found.shape == (12, 10, channels) and found.dtype == torch.uint8
    if expected is not None:
        assert np.array_equal(found, expected)
    if not content.startswith(b"\x93"):  # the image processor prepares an image alike
        processor = VQGANImageProcessor(10, channels)
        assert torch.equal(
            processor(Image.open(io.BytesIO(content)))["pixel_values"], processor(found.numpy())["pixel_values"]
        )


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind):
    content, channels, words = REFUSED[kind]
    with pytest.raises(UndecodableImage) as caught:
        decode_pixels(EncodedImage("x", content), channels)
    assert words in str(caught.value)


def test_deep_pages_share_the_range():
    content = EncodedImage("x", pages(4, np.uint16))
    assert decode_pixels(content, 4).max() <= 1
    found = decode_pixels(content, 4, VQGANImageProcessor(8, 4, value_range=[0, 255]).values)
    assert np.array_equal(found, stack(4))


@pytest.mark.parametrize("channels", [2, 4, 6])
def test_channels_are_augmented_alike(channels):
    """Colours under transparent pixels stay: channel c is what a gray image of it becomes."""
    pixels = torch.from_numpy(RNG.integers(0, 256, (16, 16, channels), dtype=np.uint8))
    config, draws = AugmentationConfig(rotate=20, translate=0.1, scale=0.1, horizontal_flip=True), np.full(8, 0.3)
    found, _ = augment(pixels, (16, 16), config, draws)
    for channel in range(channels):
        alone, _ = augment(pixels[..., channel : channel + 1], (16, 16), config, draws)
        assert torch.equal(found[..., channel : channel + 1], alone)


def test_batches_hold_every_channel():
    source = ImageSource([Image.fromarray(np.dstack([RGB, ALPHA]))], None, None)
    images = ImageDataset(source, (8, 8), 4).__getitems__([ImageKey(0, 0)]).images()
    assert images.shape == (1, 4, 8, 8) and images.unique().numel() > 50


@pytest.mark.parametrize("channels", [2, 4])
def test_a_grid_shows_transparent_images_on_white(channels):
    images = torch.full((1, channels, 4, 4), -1.0)
    images[:, -1, 2:] = 1  # the upper half is transparent, the lower half is black
    grid = image_grid(VQGANImageProcessor(4, channels).postprocess(images), 1, gap=0)
    assert grid.mode == ("L" if channels == 2 else "RGB")
    assert (np.asarray(grid)[:2] == 255).all() and (np.asarray(grid)[2:] == 0).all()
