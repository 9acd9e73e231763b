"""Images of every kind, created here: each is decoded correctly or refused with the reason."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, features
from torchvision.io import decode_jpeg

from stage1_vqgan import EncodedImage, VQGANImageProcessor, decode
from stage1_vqgan.data.decoding import UndecodableImage, decode_pixels
from stage1_vqgan.image_processing_pixels import convert_mode
from stage1_vqgan.image_processing_shapes import to_shape

RNG = np.random.default_rng(0)
# smooth, so that lossy formats change little
PICTURE = Image.fromarray(RNG.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((50, 40), Image.Resampling.BICUBIC)
RGB = np.asarray(PICTURE, dtype=float)
GRAY = np.asarray(PICTURE.convert("L"))
ALPHA = np.linspace(0, 255, 50 * 40).reshape(40, 50).astype(np.uint8)


def file(image, file_format, **options):
    """The encoded bytes of an image."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def pixels_of(content, channels=3):
    pixels = decode_pixels(EncodedImage("x", content), channels)
    assert pixels.dtype == torch.uint8 and pixels.shape[2] == channels
    return pixels.numpy().astype(float)


def exif(orientation):
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def png_header(width, height):
    """A PNG that declares a size and holds no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in (header, b"IDAT")
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def with_alpha(image):
    image = image.copy()
    image.putalpha(Image.fromarray(ALPHA))
    return image


def palette(transparent):
    """Four colours; the third is transparent or half transparent."""
    image = Image.fromarray(np.arange(2000, dtype=np.uint8).reshape(40, 50) % 4)
    image.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    image.info["transparency"] = transparent
    return file(image, "PNG", transparency=transparent)


def two_colours(third):
    colours = np.array([[0, 0, 0], [200, 0, 0], third, [0, 0, 200]])
    return colours[np.arange(2000).reshape(40, 50) % 4]


def upright(orientation):
    """`RGB` as a viewer shows it for an EXIF orientation, by the table of the standard."""
    first_row, first_column = {
        1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"),
        5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom"),
    }[orientation]  # fmt: skip
    shown = RGB.transpose(1, 0, 2) if first_row in ("left", "right") else RGB
    shown = shown[::-1] if "bottom" in (first_row, first_column) else shown
    return shown[:, ::-1] if "right" in (first_row, first_column) else shown


ON_WHITE = RGB * (ALPHA / 255)[..., None] + 255 * (1 - ALPHA / 255)[..., None]
GRAY_ON_WHITE = GRAY * (ALPHA / 255) + 255 * (1 - ALPHA / 255)
INK = np.asarray(PICTURE.convert("CMYK"), dtype=float)
OTHERS = [Image.new("RGB", (50, 40), "red"), Image.new("RGB", (50, 40), "lime")]
TRANSLUCENT = with_alpha(PICTURE)
JPEG = file(PICTURE, "JPEG", quality=95)

# file, expected pixels, and allowed difference in levels
USED = {
    "jpeg": (JPEG, RGB, 20),
    "progressive jpeg": (file(PICTURE, "JPEG", quality=95, progressive=True, subsampling=0), RGB, 20),
    "gray jpeg": (file(PICTURE.convert("L"), "JPEG", quality=95), GRAY[..., None], 20),
    "cmyk jpeg": (file(PICTURE.convert("CMYK"), "JPEG", quality=95), RGB, 20),
    "cmyk tiff": (file(PICTURE.convert("CMYK"), "TIFF"), (255 - INK[..., :3]) * (255 - INK[..., 3:]) / 255, 1),
    "jpeg with invalid exif": (file(PICTURE, "JPEG", quality=95, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12"), RGB, 20),
    "png with orientation 0": (file(PICTURE, "PNG", exif=exif(0)), RGB, 0),
    "png with orientation 99": (file(PICTURE, "PNG", exif=exif(99)), RGB, 0),
    "rgba png": (file(TRANSLUCENT, "PNG"), ON_WHITE, 1),
    "la png": (file(with_alpha(PICTURE.convert("L")), "PNG"), GRAY_ON_WHITE[..., None], 1),
    "webp with alpha": (file(TRANSLUCENT, "WEBP", lossless=True, exact=True), ON_WHITE, 1),
    "palette": (file(PICTURE.quantize(256), "PNG"), RGB, 40),
    "palette, one colour transparent": (palette(2), two_colours([255, 255, 255]), 0),
    "palette with alphas": (palette(bytes([255, 255, 51, 255])), two_colours([204, 244, 204]), 1),
    "1 bit": (file(Image.fromarray(GRAY > 99), "PNG"), (GRAY > 99)[..., None] * 255.0, 0),
    "16-bit png": (file(Image.fromarray(GRAY.astype(np.uint16) * 257), "PNG"), GRAY[..., None], 0),
    "16-bit tiff": (file(Image.fromarray(GRAY.astype(np.uint16) * 257 + 100), "TIFF"), GRAY[..., None], 0),
    "16-bit pgm": (b"P5 50 40 65535\n" + (GRAY.astype(">u2") * 257).tobytes(), GRAY[..., None], 0),
    "32-bit tiff": (file(Image.fromarray(GRAY.astype(np.int32) * 257), "TIFF"), GRAY[..., None], 0),
    "lab tiff": (file(Image.merge("LAB", [Image.new("L", (50, 40), v) for v in (138, 209, 198)]), "TIFF"),
                 np.full((40, 50, 3), [255.0, 0, 0]), 20),  # L* 54.3, a* 80.8, b* 69.9: the red of sRGB
    "animated gif": (file(PICTURE.quantize(256), "GIF", save_all=True, append_images=OTHERS), RGB, 40),
    "animated png": (file(PICTURE, "PNG", save_all=True, append_images=OTHERS), RGB, 0),
    "animated webp": (file(PICTURE, "WEBP", save_all=True, append_images=OTHERS, lossless=True), RGB, 1),
    "multi-page tiff": (file(PICTURE, "TIFF", save_all=True, append_images=OTHERS), RGB, 0),
    "1×64": (file(PICTURE.resize((1, 64)), "PNG"), np.asarray(PICTURE.resize((1, 64))), 0),
    "1000×2": (file(PICTURE.resize((1000, 2)), "PNG"), np.asarray(PICTURE.resize((1000, 2))), 0),
    **{f"jpeg turned by {n}": (file(PICTURE, "JPEG", quality=95, exif=exif(n)), upright(n), 20) for n in range(1, 9)},
    **{f"png turned by {n}": (file(PICTURE, "PNG", exif=exif(n)), upright(n), 0) for n in range(1, 9)},
    **{f"tiff turned by {n}": (file(PICTURE, "TIFF", exif=exif(n)), upright(n), 0) for n in range(1, 9)},
}  # fmt: skip
if features.check("avif"):
    USED["avif"] = (file(PICTURE, "AVIF", quality=95), RGB, 25)

NO_FORMAT = "no image format that Pillow knows"
SKIPPED = {
    "empty": (b"", "the file is empty"),
    "text": (b"this is no image, whatever it is called", NO_FORMAT),
    "jpeg signature and zeros": (b"\xff\xd8\xff\xe0" + bytes(200), NO_FORMAT),
    "gif of zero width": (b"GIF89a\0\0\x10\0\0\0\0,\0\0\0\0\0\0\x10\0\0\x02\x02D\x01\0;", NO_FORMAT),
    "truncated jpeg": (JPEG[: len(JPEG) // 2], "OSError: image file is truncated"),
    "jpeg without its end": (JPEG[:-40], "OSError: image file is truncated"),
    "truncated png": (file(PICTURE, "PNG")[:900], "OSError: image file is truncated"),
    "broken png": (file(PICTURE, "PNG")[:300] + bytes(500), "OSError"),
    "bomb": (png_header(10_000, 9_000), "more pixels than the limit of 89,478,485 (PIL.Image.MAX_IMAGE_PIXELS)"),
    "large bomb": (png_header(60_000, 60_000), "decompression bomb"),
    "no such file": ("/no/such/file.png", "FileNotFoundError"),
    "not a number": (
        file(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"),
        "float32 from nan to nan; such numbers have no range",
    ),
    "negative": (
        file(Image.fromarray(np.full((4, 4), -1, np.int32)), "TIFF"),
        "int32 from -1 to -1; such numbers have no range",
    ),
    "too large": (file(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF"), "int32 from 70000 to 70000"),
    "floats": (file(Image.fromarray(GRAY.astype(np.float32) / 255), "TIFF"), "give a value_range"),
}


@pytest.mark.parametrize("kind", USED)
def test_used(kind, recwarn):
    content, expected, tolerance = USED[kind]
    found = pixels_of(content)
    assert found.shape[:2] == expected.shape[:2] and np.abs(found - expected).max() <= tolerance
    assert np.abs(found - expected).mean() <= tolerance / 4
    gray = pixels_of(content, 1)[..., 0]
    assert np.abs(gray - found @ [0.299, 0.587, 0.114]).max() <= 1.01
    assert not recwarn.list
    # opening the file with Pillow gives the same pixels
    image = Image.open(io.BytesIO(content))
    for channels in (1, 3):
        prepared = VQGANImageProcessor(16, channels)(image)["pixel_values"]
        square = to_shape(decode_pixels(EncodedImage("x", content), channels), (16, 16))
        assert torch.equal(((prepared[0] + 1) * 127.5).round().to(torch.uint8), square.permute(2, 0, 1))


@pytest.mark.parametrize("kind", SKIPPED)
def test_skipped(kind, recwarn):
    content, reason = SKIPPED[kind]
    for channels in (1, 3):
        with pytest.raises(UndecodableImage) as caught:
            decode_pixels(EncodedImage("x", content), channels)
        found = str(caught.value)
        assert reason in found and "\n" not in found and "object at 0x" not in found
    assert not recwarn.list


def test_values_out_of_range_are_a_value_error_for_the_processor():
    for value in (-1.0, np.inf, np.nan, 65536.0):
        with pytest.raises(ValueError, match=r"float32 from .* no range of their own"):
            VQGANImageProcessor(8)(Image.fromarray(np.full((4, 4), value, np.float32)))
    with pytest.raises(ValueError, match="0×4 pixels"):
        VQGANImageProcessor(8)(Image.new("RGB", (0, 4)))


def test_decode_gives_the_image_itself(tmp_path):
    (tmp_path / "a.png").write_bytes(file(PICTURE, "PNG"))
    for content in (PICTURE, file(PICTURE, "PNG"), str(tmp_path / "a.png")):
        assert np.array_equal(decode(EncodedImage("a", content)), PICTURE)
    with pytest.raises(UndecodableImage, match="truncated"):
        decode(EncodedImage("a", JPEG[:-40]))


def test_every_byte_order_of_16_bits():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.round(values.astype(float) / 257)
    for mode, dtype in [("I;16", "<u2"), ("I;16L", "<u2"), ("I;16B", ">u2"), ("I", "<i4")]:
        image = Image.frombytes(mode, (256, 256), values.astype(dtype).tobytes())
        assert np.array_equal(convert_mode(image, 1), expected)
        assert np.array_equal(convert_mode(image, 3), np.stack([expected] * 3, -1))


def jpegs():
    """JPEGs of several encodings, whole and damaged."""
    for number in range(120):
        image = PICTURE.resize((30 + number % 7, 20 + number % 5)).convert("L" if number % 4 == 0 else "RGB")
        options = {"quality": 40 + number % 60, "progressive": number % 2 == 0, "subsampling": number % 3}
        content = bytearray(file(image, "JPEG", **options))
        if number % 3 == 1:
            content = content[: RNG.integers(20, len(content))]
        if number % 3 == 2:
            content[RNG.integers(2, len(content))] = RNG.integers(256)
        yield bytes(content)
        for _ in range(10):  # damage to the header, which Pillow does not read in a plain JPEG
            place, cut = RNG.integers(2, content.find(b"\xff\xda") + 14), RNG.integers(3)
            yield bytes(content[:place] + RNG.bytes(RNG.integers(1, 3)) + content[place + cut :])


def test_torchvision_and_pillow_agree_on_jpegs():
    """torchvision and Pillow decode to the same pixels, up to one level if their JPEG libraries differ."""
    whole = refused = equal = 0
    for content in jpegs():
        try:
            image = Image.open(io.BytesIO(content))
            image.load()
            expected = np.asarray(image.convert("RGB"))
        except Exception:
            refused += 1
            with pytest.raises(UndecodableImage):
                pixels_of(content)
        else:
            whole += 1
            found = pixels_of(content)
            equal += np.array_equal(found, expected)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1)
    assert whole > 60 and refused > 20 and equal > 0.97 * whole


def test_only_plain_jpegs_go_past_pillow(monkeypatch):
    seen = []

    def spy(data):
        seen.append(len(data))
        return decode_jpeg(data)

    monkeypatch.setattr("stage1_vqgan.data.decoding.decode_jpeg", spy)
    for kind, plain in [("jpeg", True), ("gray jpeg", True), ("cmyk jpeg", False), ("jpeg turned by 1", True),
                        ("jpeg turned by 6", False), ("rgba png", False)]:  # fmt: skip
        seen.clear()
        pixels_of(USED[kind][0])
        assert bool(seen) == plain, kind


def test_a_bomb_is_refused_by_its_header(monkeypatch):
    def load(image):
        raise AssertionError("it is being decoded")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    for sides in [(10_000, 9_000), (60_000, 60_000)]:
        with pytest.raises(UndecodableImage, match="decompression bomb"):
            decode_pixels(EncodedImage("x", png_header(*sides)), 3)
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 1999)
    with pytest.raises(UndecodableImage, match=r"limit of 1,999 "):
        decode_pixels(EncodedImage("x", JPEG), 3)
