"""The image processor: every kind of image, geometry, and the exact inverse."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from stage1_vqgan import VQGANImageProcessor, image_grid, normalize
from stage1_vqgan.image_processing_pixels import convert_mode, to_pil, to_pixels
from stage1_vqgan.image_processing_shapes import resize, resize_in_floats, to_shape

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
        (np.zeros((4, 4, 6)), "shape"),
        (np.zeros((3, 4, 5)), "shape"),  # arrays are channels-last
        (torch.zeros(6, 5, 3), "shape"),  # tensors are channels-first
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
    exif[0x0112] = 6  # a clockwise rotation by 90°
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


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "LAB", "I", "LA", "RGBA"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_every_mode_becomes_8_bit_pixels(mode, channels):
    white = Image.new("RGB", (5, 4), (255, 255, 255))
    image = Image.new("I", (5, 4), 65535) if mode == "I" else white.convert(mode)
    pixels = to_pixels(convert_mode(image, channels))
    assert pixels.shape == (4, 5, channels) and pixels.dtype == torch.uint8
    assert pixels.min() >= (253 if mode == "LAB" else 255)  # Pillow's white of LAB is not quite white


def square(image, size, *args):
    """`to_shape` of a PIL image, as an array `(size, size)` or `(size, size, C)`."""
    return to_shape(to_pixels(image), (size, size), *args).squeeze(2).numpy()


@pytest.mark.parametrize(
    "width, height", [(7, 100), (100, 7), (1, 50), (33, 32), (31, 32), (32, 32), (501, 333), (3, 2)]
)
@pytest.mark.parametrize("zoom, position", [(1.0, (0.5, 0.5)), (1.3, (0.0, 1.0)), (1.01, (1.0, 0.3))])
def test_every_shape_becomes_a_square_without_foreign_pixels(width, height, zoom, position):
    found = square(Image.new("L", (width, height), 77), 32, "crop", zoom, position)
    assert found.shape == (32, 32) and set(found.flatten()) == {77}
    padded = square(Image.new("L", (width, height), 77), 32, "pad", 1.0, position)
    assert padded.shape == (32, 32) and set(padded.flatten()) <= {77, 255} and 77 in padded


def test_the_crop_is_where_it_should_be():
    wide = np.arange(32 * 50, dtype=np.uint8).reshape(32, 50)  # no resize needed
    for position, left in [((0, 0.5), 0), ((0.5, 0.5), 9), ((1, 0.5), 18)]:
        assert np.array_equal(square(Image.fromarray(wide), 32, "crop", 1.0, position), wide[:, left : left + 32])
    tall = np.ascontiguousarray(wide.T)
    assert np.array_equal(square(Image.fromarray(tall), 32, "crop", 1.0, (0.5, 1)), tall[18:])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("before, after", [((90, 70), (40, 40)), ((9, 8), (33, 31)), ((300, 7), (24, 24))])
def test_resize_is_that_of_pillow(before, after, channels):
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(before, Image.Resampling.BILINEAR)
    image = smooth.convert("L" if channels == 1 else "RGB")
    expected = np.asarray(image.resize(after, Image.Resampling.BICUBIC), dtype=int).reshape(*after[::-1], channels)
    found = resize(to_pixels(image), *after[::-1]).numpy()
    assert found.dtype == np.uint8 and np.abs(found - expected).max() <= 2


@pytest.mark.parametrize("before, after", [((9, 12), (8, 8)), ((72, 72), (64, 64)), ((5, 7), (9, 9))])
def test_resize_of_a_batch_and_in_floats(before, after):
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, *before, 3), dtype=np.uint8))
    found = resize(noise, *after)
    assert found.shape == (6, *after, 3) and torch.equal(found, torch.stack([resize(image, *after) for image in noise]))
    in_floats = resize_in_floats(noise.permute(0, 3, 1, 2), *after).permute(0, 2, 3, 1)
    difference = (in_floats.int() - found.int()).abs()
    assert in_floats.dtype == torch.uint8 and difference.max() <= 2 and (difference > 0).float().mean() < 0.02


@pytest.mark.parametrize("size, zoom", [(32, 1.0), (32, 1.25), (32, 1.6), (128, 1.0), (128, 1.3)])
def test_crop_against_pillow_with_an_exact_box(size, zoom):
    """The region differs from the reference by at most half a pixel, because one of the two boxes is rounded."""
    ramp = np.add.outer(np.arange(60) * 2, np.arange(90)).astype(np.uint8)
    side = 60 / zoom
    for x, y in [(0.0, 0.0), (0.5, 0.5), (1.0, 0.2)]:
        left, top = x * (90 - side), y * (60 - side)
        box = (left, top, left + side, top + side)
        expected = np.asarray(Image.fromarray(ramp).resize((size, size), Image.Resampling.BICUBIC, box), dtype=int)
        found = square(Image.fromarray(ramp), size, "crop", zoom, (x, y))
        assert np.abs(found - expected).max() <= 4  # the ramp rises by 3 levels per pixel


@pytest.mark.parametrize("shape", [(32, 48), (48, 32), (16, 80)])
@pytest.mark.parametrize("width, height", [(90, 60), (60, 90), (300, 7), (40, 30), (48, 32)])
def test_crop_and_pad_to_any_shape_are_those_of_pillow(width, height, shape):
    """Of smooth images, whose levels rise by 2 a pixel of the result at most; so half a pixel more or less is seen."""
    ramp = np.add.outer(np.linspace(0, 60, height), np.linspace(0, 60, width)).astype(np.uint8)
    image, size = Image.fromarray(ramp), shape[::-1]
    for zoom, position in [(1.0, (0.5, 0.5)), (1.0, (1.0, 0.0)), (1.5, (0.5, 0.5))]:
        found = to_shape(to_pixels(image), shape, "crop", zoom, position)
        bleed = (1 - 1 / zoom) / 2  # of each side
        expected = ImageOps.fit(image, size, Image.Resampling.BICUBIC, bleed, position)
        assert found.shape == (*shape, 1)
        assert np.abs(found[..., 0].numpy().astype(int) - np.asarray(expected, dtype=int)).max() <= 6
    padded = to_shape(to_pixels(image), shape, "pad")[..., 0].numpy().astype(int)
    difference = np.abs(padded - np.asarray(ImageOps.pad(image, size, Image.Resampling.BICUBIC, 255), dtype=int))
    assert (difference > 6).mean() < 0.1  # the border of the background may lie a pixel beside


def test_a_crop_of_any_shape_is_where_it_should_be():
    wide = torch.arange(32 * 50, dtype=torch.int64).remainder(256).to(torch.uint8).view(32, 50, 1)
    for position, top, left in [((0, 0.5), 0, 0), ((0.5, 0.5), 0, 5), ((1, 0.5), 0, 10)]:
        assert torch.equal(to_shape(wide, (32, 40), position=position), wide[top : top + 32, left : left + 40])
    for position, top in [((0.5, 0), 0), ((0.5, 0.5), 3), ((0.5, 1), 6)]:
        assert torch.equal(to_shape(wide, (26, 50), position=position), wide[top : top + 26])


def test_pad_keeps_the_whole_image_in_the_middle():
    wide = Image.fromarray(np.arange(20 * 40, dtype=np.uint8).reshape(20, 40) // 4)
    found = square(wide, 40, "pad")
    assert np.array_equal(found[10:30], wide) and (found[:10] == 255).all() and (found[30:] == 255).all()
    tall = square(wide.transpose(Image.Transpose.TRANSPOSE), 40, "pad")
    assert np.array_equal(tall, found.T)
    half = square(wide, 20, "pad")
    assert np.abs(half[5:15] - np.asarray(wide.resize((20, 10), Image.Resampling.BICUBIC), dtype=int)).max() <= 2
    zoomed = square(wide, 20, "pad", 2.0, (1.0, 0.0))  # the upper right quarter of the padded image
    assert np.array_equal(zoomed, found[:20, 20:])


@pytest.mark.parametrize("aspect_ratio", ["crop", "pad"])
@pytest.mark.parametrize("shape", [(1, 100_000), (100_000, 1), (2, 1000)])
def test_extreme_shapes_take_no_memory(shape, aspect_ratio):
    pixels = torch.full((*shape, 3), 9, dtype=torch.uint8)
    with torch.profiler.profile(profile_memory=True) as profile:
        found = to_shape(pixels, (64, 64), aspect_ratio, 1.2, (0.3, 0.7))
    assert found.shape == (64, 64, 3) and 9 in found
    taken = sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())
    assert taken < 10 * 2**20  # enlarging the whole image would take gigabytes


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_do_not_depend_on_threads(channels):
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (700, 900, channels), dtype=np.uint8))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(to_shape(pixels, (256, 256), "crop", 1.1, (0.2, 0.9)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_large_image_is_averaged_not_sampled():
    checkers = np.indices((256, 256)).sum(0) % 2 * 255
    small = square(Image.fromarray(checkers.astype(np.uint8)), 16)
    assert small.min() > 100 and small.max() < 155


def test_preprocess_shapes_and_range():
    processor = VQGANImageProcessor(size=8, num_channels=3)
    white = np.full((20, 30), 255, dtype=np.uint8)
    for images, count in [(white, 1), ([white, Image.new("RGBA", (9, 5))], 2), (torch.zeros(4, 3, 16, 16), 4)]:
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        assert pixels.shape == (count, 3, 8, 8) and pixels.dtype == torch.float32
        assert pixels.min() >= -1 and pixels.max() <= 1
    assert processor(white)["pixel_values"].eq(1).all()
    assert processor(np.zeros((8, 8)))["pixel_values"].eq(-1).all()


def test_preprocess_refuses():
    processor = VQGANImageProcessor(size=8)
    with pytest.raises(ValueError, match="empty"):
        processor.preprocess([])
    with pytest.raises(ValueError, match="do_resize"):
        processor.preprocess(RGB, do_resize=False)


@pytest.mark.parametrize("channels, mode", [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA"), (7, "RGB")])
def test_postprocess(channels, mode):
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
    assert [image.mode for image in as_pil] == [mode] * 2
    found = np.stack([np.asarray(image).reshape(6, 4, -1) for image in as_pil])  # of 7 channels the first three
    assert np.abs(found / 255 - as_array[..., : len(mode)]).max() <= 0.5 / 255 + 1e-6
    with pytest.raises(ValueError, match="'jpeg'"):
        processor.postprocess(images, "jpeg")


@pytest.mark.parametrize("channels", [1, 3])
def test_bytes_come_back_exactly(channels):
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, channels, 1, 1)
    pixels = normalize(values)
    assert pixels.dtype == torch.float32 and pixels.min() == -1 and pixels.max() == 1
    (image,) = VQGANImageProcessor(16, channels).postprocess(pixels)
    assert torch.equal(to_pixels(image).permute(2, 0, 1), values[0])
    again = VQGANImageProcessor(16, channels)(image)["pixel_values"]
    assert torch.equal(again, pixels)


def test_save_and_load(tmp_path):
    VQGANImageProcessor(size=24, num_channels=1).save_pretrained(tmp_path)
    loaded = VQGANImageProcessor.from_pretrained(tmp_path)
    assert (loaded.image_shape, loaded.num_channels, loaded.aspect_ratio) == ((24, 24), 1, "crop")
    assert loaded(RGB)["pixel_values"].shape == (1, 1, 24, 24)
    path = tmp_path / "preprocessor_config.json"
    saved = json.loads(path.read_text())
    assert saved.pop("size") == {"height": 24, "width": 24} and "image_size" not in saved
    path.write_text(json.dumps(saved | {"image_size": 20}))  # saved by an earlier version
    assert VQGANImageProcessor.from_pretrained(tmp_path).size == {"height": 20, "width": 20}


def test_sizes_that_are_no_squares(tmp_path):
    for size in ({"height": 12, "width": 20}, [12, 20], (12, 20)):
        VQGANImageProcessor(size, 3, "pad").save_pretrained(tmp_path)
        loaded = VQGANImageProcessor.from_pretrained(tmp_path)
        assert loaded.image_shape == (12, 20) and loaded.size == {"height": 12, "width": 20}
        assert loaded([RGB, RGB])["pixel_values"].shape == (2, 3, 12, 20)
    for size in ([12], [12, 0], {"height": 12}, {"height": 12, "width": 2.0}, "12", {"shortest_edge": 12}):
        with pytest.raises(ValueError, match="size: received"):
            VQGANImageProcessor(size)
    with pytest.raises(ValueError, match="image_size: received a number beside size"):
        VQGANImageProcessor(12, image_size=12)


def test_a_range_of_values(tmp_path):
    """Floats, arrays and 16 bits are values of the range; 8-bit images are pictures, as `postprocess` makes them."""
    VQGANImageProcessor(4, 1, value_range=[-1000, 400]).save_pretrained(tmp_path)
    processor = VQGANImageProcessor.from_pretrained(tmp_path)
    assert processor.value_range == [-1000, 400]
    values = np.array([[-2000, -1000, -300, 0], [399, 400, 401, 9000]] * 2)
    expected = (values.clip(-1000, 400) + 1000) / 700 - 1
    tensor = torch.from_numpy(values).float()
    images = [values, values.astype(np.int16), values.astype(np.float32), tensor, tensor[None], values[..., None]]
    for image in [*images, Image.fromarray(values.astype(np.float32)), Image.fromarray(values.astype(np.int32))]:
        found = processor(image)["pixel_values"][0, 0].numpy()
        assert np.abs(found - expected).max() <= 1 / 255 + 1e-6
    picture = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4) * 17)
    pixels = processor(picture)["pixel_values"]
    assert torch.equal(pixels, VQGANImageProcessor(4, 1)(picture)["pixel_values"])
    assert processor.postprocess(pixels)[0].tobytes() == picture.tobytes()
    in_units = processor.to_values(processor.postprocess(pixels, "np"))
    assert in_units.min() == -1000 and in_units.max() == 400
    assert torch.equal(processor(in_units)["pixel_values"], pixels)
    of_bytes = VQGANImageProcessor(4, 1, value_range=[0, 51], value_range_of_bytes=True)
    assert of_bytes(picture)["pixel_values"].flatten().tolist()[:4] == pytest.approx([-1, -1 / 3, 1 / 3, 1])
    with pytest.raises(ValueError, match="transparency, which has no place in a value_range"):
        of_bytes(Image.new("LA", (4, 4)))
    with pytest.raises(ValueError, match="NaN or infinite"):
        processor(tensor / 0)


def test_16_bits_and_masks_have_a_range_of_their_own():
    processor = VQGANImageProcessor(2, 1)
    deep = np.array([[0, 257], [32896, 65535]], np.uint16)
    assert ((processor(deep)["pixel_values"] + 1) * 127.5).round().flatten().tolist() == [0, 1, 128, 255]
    assert processor(deep > 300)["pixel_values"].flatten().tolist() == [-1, -1, 1, 1]
    for wrong in (deep.astype(np.int32), deep.astype(np.float32)):
        with pytest.raises(ValueError, match=r"no range of their own: give a value_range|needs \[0, 1\]"):
            processor(wrong)


@pytest.mark.parametrize(
    "wrong", [[1], [2, 1], [1, 1], [0, np.nan], [0, np.inf], [0, 1e-320], "auto", [True, 2], ["0", "1"], 5]
)
def test_a_wrong_range_is_refused(wrong):
    with pytest.raises(ValueError, match="value_range: received"):
        VQGANImageProcessor(value_range=wrong)
    with pytest.raises(ValueError, match="value_range_of_bytes: received"):
        VQGANImageProcessor(value_range_of_bytes=True)


def test_aspect_ratio_is_a_setting_of_the_processor(tmp_path):
    wide = np.zeros((10, 20, 3), dtype=np.uint8)
    VQGANImageProcessor(20, 3, "pad").save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    saved = json.loads(path.read_text())
    assert saved["aspect_ratio"] == "pad"
    pixels = VQGANImageProcessor.from_pretrained(tmp_path)(wide)["pixel_values"]
    assert pixels[0, 0, 5:15].eq(-1).all() and pixels[0, 0, :5].eq(1).all() and pixels[0, 0, 15:].eq(1).all()
    del saved["aspect_ratio"]  # saved by a version without this option
    path.write_text(json.dumps(saved))
    assert VQGANImageProcessor.from_pretrained(tmp_path)(wide)["pixel_values"].eq(-1).all()
    with pytest.raises(ValueError, match="'stretch'"):
        VQGANImageProcessor(aspect_ratio="stretch")


def test_image_grid():
    tiles = [Image.new("L", (4, 3), 10 * n) for n in range(5)]
    grid = np.asarray(image_grid(tiles, columns=2, min_tile=8, gap=2))
    assert grid.shape == (3 * (6 + 2) + 2, 2 * (8 + 2) + 2)
    for n in range(5):
        top, left = 2 + n // 2 * 8, 2 + n % 2 * 10
        assert (grid[top : top + 6, left : left + 8] == 10 * n).all()
    assert (grid[:2] == 255).all() and (grid[18:24, 12:20] == 255).all()  # gaps and the empty place are white
