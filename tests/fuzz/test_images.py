"""Odd and damaged image files: each decodes as Pillow decodes it, or is skipped with a reason in our words."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, features

from stage1_vqgan import EncodedImage, ImageDataset, ImageKey, ImageSource
from stage1_vqgan.data.decoding import UndecodableImage, decode_pixels
from stage1_vqgan.image_processing_pixels import convert_mode
from tests.fuzz.harness import cases, damaged, generator, in_processes, outcome

MODES = {
    "PNG": ["1", "L", "LA", "RGB", "RGBA", "P", "I;16"],
    "JPEG": ["L", "RGB", "CMYK"],
    "WEBP": ["RGB", "RGBA"],
    "GIF": ["L", "P"],
    "BMP": ["1", "L", "RGB", "RGBA", "P"],
    "TIFF": ["1", "L", "RGB", "RGBA", "CMYK", "P", "I;16", "F"],
    "PPM": ["1", "L", "RGB", "I;16"],
    "TGA": ["L", "RGB", "RGBA"],
    "ICO": ["RGBA"],
    "PCX": ["L", "RGB", "P"],
    "SGI": ["L", "RGB"],
    "JPEG2000": ["L", "RGB"],
    "DDS": ["RGB", "RGBA"],
    "AVIF": ["RGB"],
}
FORMATS = [name for name in MODES if features.check({"JPEG2000": "jpg_2000", "AVIF": "avif"}.get(name, "pil"))]
COMMON = ["PNG", "JPEG", "JPEG", "JPEG", "WEBP", "GIF", "TIFF"]
SIZES = [0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1]


def picture(draw, mode):
    size = draw.choice([(1, 1), (1, 40), (40, 1), (16, 16), (33, 17), (50, 40)])
    noise = Image.frombytes("RGB", (4, 4), draw.randbytes(48)).resize(size, Image.Resampling.BICUBIC)
    if mode == "I;16":
        return Image.fromarray(np.asarray(noise.convert("L"), np.uint16) * 257)
    return noise.quantize(16) if mode == "P" else noise.convert(mode)


def options(draw, name, image):
    """Options of Pillow's writer: animations, orientation, text, progressive scans, compression."""
    chosen = {}
    if name in ("PNG", "JPEG", "TIFF", "WEBP") and draw.random() < 0.3:
        exif = Image.Exif()
        exif[0x0112] = draw.choice([1, 3, 6, 8] if name == "TIFF" else [0, 1, 3, 6, 8, 99])
        chosen["exif"] = exif
    if name == "JPEG":
        chosen |= {"quality": draw.randrange(30, 96), "progressive": draw.random() < 0.5, "comment": b"x" * 40}
    if name == "PNG" and draw.random() < 0.3:
        chosen["pnginfo"] = PngImagePlugin.PngInfo()
        chosen["pnginfo"].add_text("comment", "x" * draw.choice([0, 100, 200_000]), zip=True)
    if name in ("GIF", "PNG", "WEBP", "TIFF") and draw.random() < 0.3:
        chosen |= {"save_all": True, "append_images": [image.transpose(Image.Transpose.ROTATE_180)]}
    if name == "TIFF" and image.mode != "F":
        chosen["compression"] = draw.choice([None, "tiff_lzw", "tiff_deflate", "packbits"])
    return chosen


def written(draw):
    """The bytes of a whole image file."""
    name = draw.choice(draw.choice([COMMON, FORMATS]))
    image, buffer = picture(draw, draw.choice(MODES[name])), io.BytesIO()
    image.save(buffer, name, **options(draw, name, image))
    return buffer.getvalue()


def with_other_size(content, draw):
    """A header that declares another size: extreme numbers in place of bytes of the first kilobyte."""
    content = bytearray(content)
    place, size = draw.randrange(min(len(content), 1000)), draw.choice([2, 4])
    number = draw.choice(SIZES) % 2 ** (8 * size)
    content[place : place + size] = number.to_bytes(size, draw.choice(["little", "big"]))
    return bytes(content)


def case(number):
    """The file of a case."""
    draw = generator("images", number)
    content = written(draw)
    kind = draw.choice(["whole", "damaged", "damaged", "twice", "size", "joined", "tail"])
    if kind in ("damaged", "twice"):
        content = damaged(content, draw)
    if kind == "twice":
        content = damaged(content, draw)
    elif kind == "size":
        content = with_other_size(content, draw)
    elif kind == "joined":
        content = content[: draw.randrange(len(content))] + written(draw)
    elif kind == "tail":
        content += draw.randbytes(100)
    return kind, content, draw.choice([1, 3])


def reference(content, channels):
    """What Pillow alone decodes, or None if it cannot."""
    try:
        image = convert_mode(Image.open(io.BytesIO(content)), channels)
    except Exception:
        return None
    return np.asarray(image, dtype=int).reshape(image.height, image.width, channels)


def check(numbers):
    used = 0
    for number in numbers:
        kind, content, channels = case(number)
        found = outcome(lambda: decode_pixels(EncodedImage("x", content), channels), (UndecodableImage,))  # noqa: B023
        if isinstance(found, UndecodableImage):
            reason = str(found)
            assert reason and len(reason) < 300 and "\n" not in reason and "object at 0x" not in reason, number
            assert kind not in ("whole", "tail") or "float32" in reason, (number, reason)  # floats need a range
        else:
            used += 1
            expected = reference(content, channels)
            assert expected is not None and np.abs(found.numpy() - expected).max() <= 1, number
    assert 0.2 * len(numbers) < used < 0.9 * len(numbers)


@pytest.mark.filterwarnings("ignore")  # of Pillow, when it makes the reference
@cases(short=80, long=840)
def test_an_image_is_decoded_or_skipped(numbers, capsys):
    in_processes(check, numbers)
    if len(numbers) <= 100:
        assert capsys.readouterr() == ("", "")


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, *chunks):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join([chunk(b"IHDR", header), *chunks, chunk(b"IEND", b"")])


def jpeg(width, height):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    content = buffer.getvalue()
    place = content.index(b"\xff\xc0") + 5
    return content[:place] + struct.pack(">HH", height, width) + content[place + 4 :]


def bmp(width, height):
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


ZEROS = zlib.compress(bytes(2**26))  # 64 kB that unpack to 64 MB
BOMBS = {
    "png": png(2**31 - 1, 2**31 - 1, chunk(b"IDAT", ZEROS)),
    "png of 80 million pixels and no data": png(8900, 9000),
    "png with packed text": png(1, 1, *[chunk(b"zTXt", b"a\0\0" + ZEROS)] * 20),
    "png with a packed profile": png(1, 1, chunk(b"iCCP", b"a\0\0" + ZEROS), chunk(b"IDAT", b"")),
    "jpeg": jpeg(65500, 65500),
    "bmp": bmp(2**31 - 1, 2**31 - 1),
    "bmp upside down": bmp(30_000, -30_000),
    "gif": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b",\0\0\0\0\xff\xff\xff\xff\0\2\0;",
    "ppm": b"P6 999999999 999999999 255\n",
    "ppm of endless digits": b"P6 " + b"9" * 5_000_000,
    "webp": b"RIFF\x1e\0\0\0WEBPVP8L\x11\0\0\0/\xff\xff\xff\x0f" + bytes(20),
    "tiff": b"II*\0\x08\0\0\0\x02\0"
    + struct.pack("<HHII", 256, 4, 1, 2**32 - 1)
    + struct.pack("<HHII", 257, 4, 1, 2**32 - 1)
    + bytes(4),
    "tiff that names itself as the next page": b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
    "xpm": b"/* XPM */\nstatic char *x[] = {\n\"999999999 999999999 2 1\",\n",
}  # fmt: skip


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_skipped(kind, capsys):
    found = outcome(lambda: decode_pixels(EncodedImage("x", BOMBS[kind]), 3), (UndecodableImage,))
    assert isinstance(found, UndecodableImage)
    assert capsys.readouterr() == ("", "")


def test_no_image_starts_a_program(tmp_path, monkeypatch):
    """Pillow calls Ghostscript for EPS files, whatever their names are."""
    canary, program = tmp_path / "canary", tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {canary}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    eps = io.BytesIO()
    Image.new("RGB", (8, 8)).save(eps, "EPS")
    found = outcome(lambda: decode_pixels(EncodedImage("a.png", eps.getvalue()), 3), (UndecodableImage,))
    assert "never read (EPS)" in str(found) and not canary.exists()


def test_every_skipped_image_is_named():
    files = [case(number)[1] for number in range(40)]

    class Files(ImageSource):
        def encoded(self, indices):
            return [EncodedImage(f"{index}.png", files[index]) for index in indices]

    batch = ImageDataset(Files(files, None, None), (16, 16), 3).__getitems__(
        [ImageKey(0, index) for index in range(40)]
    )
    skipped = {image.image: image for image in batch.skipped}
    assert skipped and all(image.name == f"{number}.png" and image.reason for number, image in skipped.items())
    assert sorted([*skipped, *batch.indices.tolist()]) == list(range(40))
