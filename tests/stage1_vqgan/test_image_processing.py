"""Pixels in, pixels out: every kind of image, geometry, and the exact way back."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from stage1_vqgan import VQGANImageProcessor, image_grid, normalize
from stage1_vqgan.image_processing_vqgan import convert_mode, resize_and_crop, to_pil, to_uint8

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 4, 3), dtype=np.uint8)
GRAY, RGBA = RGB[..., 0], np.dstack([RGB, RGB[..., :1]])


@pytest.mark.parametrize(
    "image, expected",
    [
        (Image.fromarray(RGB), RGB),
        (RGB, RGB),
        (GRAY, GRAY),
        (GRAY[..., None], GRAY),
        (RGBA, RGBA),
        (RGB / 255, RGB),
        ((GRAY / 255).astype(np.float16), GRAY),
        (torch.from_numpy(RGB).permute(2, 0, 1), RGB),
        (torch.from_numpy(GRAY), GRAY),
        (torch.from_numpy(GRAY)[None], GRAY),
        (torch.from_numpy(RGB).permute(2, 0, 1) / 255, RGB),
        ((torch.from_numpy(GRAY) / 255).requires_grad_(), GRAY),
        (torch.tensor([[0.0, 0.5], [1.0, 0.25]], dtype=torch.bfloat16), np.array([[0, 128], [255, 64]])),
    ],
    ids=lambda value: f"{type(value).__name__}-{getattr(value, 'dtype', '')}-{getattr(value, 'shape', '')}",
)
def test_to_pil(image, expected):
    assert np.array_equal(np.asarray(to_pil(image)), expected)


@pytest.mark.parametrize(
    "image, word",
    [
        ("cat.png", "str"),
        ([[0, 1]], "list"),
        (np.zeros(4), "shape"),
        (np.zeros((4, 4, 2)), "shape"),
        (np.zeros((3, 4, 5)), "shape"),  # channels first is for tensors
        (torch.zeros(6, 5, 3), "shape"),  # and channels last for arrays
        (np.full((4, 4), 1.5), "floats from 1.5"),
        (np.full((4, 4), -0.1), "floats from -0.1"),
        (np.full((4, 4), np.nan), "floats from nan"),
        (np.zeros((4, 4), dtype=np.int64), "int64"),
        (np.zeros((4, 4), dtype=np.uint16), "uint16"),
        (torch.zeros(4, 4, dtype=torch.bool), "bool"),
    ],
)
def test_to_pil_refuses(image, word):
    with pytest.raises(ValueError, match=word):
        to_pil(image)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_on_white(mode):
    alpha = np.array([[0, 64], [128, 255]], dtype=np.uint8)
    gray = np.array([[10, 60], [110, 160]], dtype=np.uint8)
    if mode == "P":
        image = Image.fromarray(np.array([[0, 1], [2, 3]], dtype=np.uint8), "P")
        image.putpalette([value for value in gray.flatten() for _ in range(3)])
        image.info["transparency"] = bytes(alpha.flatten())
    else:
        image = Image.fromarray(np.dstack([gray] * (len(mode) - 1) + [alpha]), mode)
    opacity = alpha / 255
    expected = gray * opacity + 255 * (1 - opacity)
    for channels in (1, 3):
        found = np.asarray(convert_mode(image, channels), dtype=float)
        assert found.shape == ((2, 2) if channels == 1 else (2, 2, 3))
        assert np.abs(found.reshape(2, 2, -1) - expected[..., None]).max() <= 1


def test_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90°
    file = io.BytesIO()
    Image.fromarray(RGB).save(file, "PNG", exif=exif)
    found = np.asarray(convert_mode(Image.open(file), 3))
    assert np.array_equal(found, np.rot90(RGB, -1))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_16_bits_become_8(dtype):
    values = np.array([[0, 257], [200 * 257, 65535]], dtype=dtype)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG" if dtype is np.uint16 else "TIFF")
    found = np.asarray(convert_mode(Image.open(file), 1))
    assert found.tolist() == [[0, 1], [200, 255]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "F"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_8_bit_pixels(mode, channels):
    image = Image.new("RGB", (5, 4), (255, 255, 255)).convert(mode)
    array = to_uint8(convert_mode(image, channels))
    assert array.shape == (channels, 4, 5) and array.dtype == np.uint8 and array.min() == 255


@pytest.mark.parametrize(
    "width, height", [(7, 100), (100, 7), (1, 50), (33, 32), (31, 32), (32, 32), (501, 333), (3, 2)]
)
@pytest.mark.parametrize("zoom, position", [(1.0, (0.5, 0.5)), (1.3, (0.0, 1.0)), (1.01, (1.0, 0.3))])
def test_every_shape_becomes_a_square_without_foreign_pixels(width, height, zoom, position):
    square = resize_and_crop(Image.new("L", (width, height), 77), 32, zoom, position)
    assert square.size == (32, 32) and set(np.asarray(square).flatten()) == {77}


def test_the_crop_is_where_it_should_be():
    wide = np.arange(32 * 50, dtype=np.uint8).reshape(32, 50)  # no resize needed
    for position, left in [((0, 0.5), 0), ((0.5, 0.5), 9), ((1, 0.5), 18)]:
        found = np.asarray(resize_and_crop(Image.fromarray(wide), 32, 1.0, position))
        assert np.array_equal(found, wide[:, left : left + 32])
    tall = np.ascontiguousarray(wide.T)
    assert np.array_equal(resize_and_crop(Image.fromarray(tall), 32, 1.0, (0.5, 1)), tall[18:])


def test_a_large_image_is_averaged_not_sampled():
    checkers = np.indices((256, 256)).sum(0) % 2 * 255
    small = np.asarray(resize_and_crop(Image.fromarray(checkers.astype(np.uint8)), 16))
    assert small.min() > 100 and small.max() < 155


def test_preprocess_shapes_and_range():
    processor = VQGANImageProcessor(image_size=8, num_channels=3)
    white = np.full((20, 30), 255, dtype=np.uint8)
    for images, count in [(white, 1), ([white, Image.new("RGBA", (9, 5))], 2), (torch.zeros(4, 3, 16, 16), 4)]:
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        assert pixels.shape == (count, 3, 8, 8) and pixels.dtype == torch.float32
        assert pixels.min() >= -1 and pixels.max() <= 1
    assert processor(white)["pixel_values"].eq(1).all()
    assert processor(np.zeros((8, 8)))["pixel_values"].eq(-1).all()


def test_preprocess_refuses():
    processor = VQGANImageProcessor(image_size=8)
    with pytest.raises(ValueError, match="empty"):
        processor.preprocess([])
    with pytest.raises(ValueError, match="do_resize"):
        processor.preprocess(RGB, do_resize=False)


@pytest.mark.parametrize("channels", [1, 3])
def test_postprocess(channels):
    images = torch.linspace(-2, 2, 2 * channels * 6 * 4).view(2, channels, 6, 4)
    processor = VQGANImageProcessor(num_channels=channels)
    expected = (images.clamp(-1, 1) + 1) / 2
    as_tensor = processor.postprocess(images.bfloat16().float().requires_grad_(), "pt")
    assert not as_tensor.requires_grad and as_tensor.min() == 0 and as_tensor.max() == 1
    torch.testing.assert_close(processor.postprocess(images, "pt"), expected)
    as_array = processor.postprocess(images, "np")
    assert as_array.shape == (2, 6, 4, channels) and as_array.dtype == np.float32
    np.testing.assert_allclose(as_array, expected.permute(0, 2, 3, 1).numpy())
    as_pil = processor.postprocess(images)
    assert [image.mode for image in as_pil] == ["L" if channels == 1 else "RGB"] * 2
    found = np.stack([np.asarray(image).reshape(6, 4, channels) for image in as_pil])
    assert np.abs(found / 255 - as_array).max() <= 0.5 / 255 + 1e-6
    with pytest.raises(ValueError, match="'jpeg'"):
        processor.postprocess(images, "jpeg")


@pytest.mark.parametrize("channels", [1, 3])
def test_bytes_come_back_exactly(channels):
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, channels, 1, 1)
    pixels = normalize(values)
    assert pixels.dtype == torch.float32 and pixels.min() == -1 and pixels.max() == 1
    (image,) = VQGANImageProcessor(16, channels).postprocess(pixels)
    assert np.array_equal(to_uint8(image), values[0].numpy())
    again = VQGANImageProcessor(16, channels)(image)["pixel_values"]
    assert torch.equal(again, pixels)


def test_save_and_load(tmp_path):
    VQGANImageProcessor(image_size=24, num_channels=1).save_pretrained(tmp_path)
    loaded = VQGANImageProcessor.from_pretrained(tmp_path)
    assert (loaded.image_size, loaded.num_channels) == (24, 1)
    assert loaded(RGB)["pixel_values"].shape == (1, 1, 24, 24)


def test_image_grid():
    tiles = [Image.new("L", (4, 3), 10 * n) for n in range(5)]
    grid = np.asarray(image_grid(tiles, columns=2, min_tile=8, gap=2))
    assert grid.shape == (3 * (6 + 2) + 2, 2 * (8 + 2) + 2)
    for n in range(5):
        top, left = 2 + n // 2 * 8, 2 + n % 2 * 10
        assert (grid[top : top + 6, left : left + 8] == 10 * n).all()
    assert (grid[:2] == 255).all() and (grid[18:24, 12:20] == 255).all()  # gaps and the empty place are white
