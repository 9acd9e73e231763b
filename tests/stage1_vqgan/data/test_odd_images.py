"""Every file of a collection of odd images is used as its kind demands, or skipped with the reason.

The collection lies beside the repository, in `shared/data/odd_images`; `test_decoding.py` makes such images itself.
"""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stage1_vqgan import EncodedImage, ImageDataset, ImageKey, ImageSource
from stage1_vqgan.data.decoding import UndecodableImage, decode_pixels

FOLDER = Path(__file__).resolve().parents[4] / "shared" / "data" / "odd_images"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="../shared/data/odd_images is not there")

SKIPPED = {
    "truncated_jpeg.jpg": "OSError: image file is truncated (8 bytes not processed)",
    "truncated_image.png": "OSError: image file is truncated",
    "broken.png": "no image format that Pillow knows",
    "broken_data_stream.png": "OSError: unrecognized data stream contents",
    "decompression_bomb.gif": "decompression bomb: the file declares more pixels than the limit of",
    "zero_width.gif": "no image format that Pillow knows",
    "test-ole-file.doc": "no image format that Pillow knows",
    "made_empty.png": "the file is empty",
    "made_text.jpg": "no image format that Pillow knows",
    "made_wrong_header.jpg": "no image format that Pillow knows",
    "hopper.pfm": "float32 from 1 to 255; such numbers have no range of their own",
}
# width and height (upright), and what was done
USED = {
    "pil_sample_cmyk.jpg": (100, 100, "CMYK to RGB"),
    "hopper_gray.jpg": (128, 128, "gray"),
    "hopper_orientation_6.jpg": (128, 128, "turned by 90° clockwise"),
    "invalid-exif.jpg": (200, 200, "EXIF ignored"),
    "hopper.gif": (128, 128, "palette"),
    "dispose_bgnd.gif": (100, 100, "first frame"),
    "iss634.gif": (245, 245, "first frame"),
    "no_palette.gif": (1, 1, "first frame"),
    "transparent.png": (200, 150, "alpha on white"),
    "p_16.png": (128, 128, "alpha on white"),
    "p_trns_single.png": (64, 64, "palette, transparent colour on white"),
    "l_trns.png": (64, 64, "gray, transparent level on white"),
    "tRNS_null_1x1.png": (1, 1, "palette, transparent colour on white"),
    "apng_mode_16bit.png": (128, 64, "first frame, 16 bits to 8"),
    "apng_dispose_op_background.png": (128, 64, "first frame"),
    "16bit.cropped.tif": (64, 64, "16-bit gray, 65535 is white"),
    "tiff_16bit_RGB.tiff": (100, 40, "16 bits to 8"),
    "hopper.Lab.tif": (128, 128, "LAB to RGB"),
    "tiff_strip_cmyk_jpeg.tif": (100, 100, "CMYK to RGB"),
    "multipage.tiff": (10, 10, "first page"),
    "hopper_g4.tif": (128, 128, "1 bit"),
    "hopper_16bit.pgm": (128, 128, "16-bit gray, 65535 is white"),
    "hopper_1bit.pbm": (128, 128, "1 bit"),
    "la.tga": (64, 64, "gray, alpha on white"),
    "transparent.webp": (200, 150, "alpha on white"),
    "avif_hopper.avif": (128, 128, "as it is"),
    "Landscape_6.jpg": (1800, 1200, "turned by 90° clockwise"),
    "made_1x64.png": (1, 64, "as it is"),
    "made_1000x2.jpg": (1000, 2, "as it is"),
    "made_jpeg_named.png": (128, 128, "read by its content: a gray JPEG"),
}


def encoded(name):
    return EncodedImage(name, (FOLDER / name).read_bytes())


def reference(name):
    """RGB in float64 by the definitions: no code of the project's, and of Pillow's only the decoders and RGBA."""
    image = Image.open(FOLDER / name)
    if image.mode == "CMYK":
        ink = np.asarray(image, dtype=float)
        return (255 - ink[..., :3]) * (255 - ink[..., 3:]) / 255
    if image.mode in ("I", "I;16", "F"):
        values = np.asarray(image, dtype=float)
        return np.stack([values if image.mode == "F" else values / 257] * 3, axis=-1)
    if "LAB" in image.mode:
        return lab_to_rgb(np.asarray(image))
    pixels = np.asarray(image.convert("RGBA"), dtype=float)
    opacity = pixels[..., 3:] / 255
    pixels = pixels[..., :3] * opacity + 255 * (1 - opacity)
    return np.rot90(pixels, -1) if name in ("hopper_orientation_6.jpg", "Landscape_6.jpg") else pixels


def lab_to_rgb(pixels):
    """CIE L*a*b* (white point D50, a and b as signed bytes) → sRGB, by way of XYZ and Bradford's adaptation to D65."""
    light = pixels[..., 0] / 255 * 100
    a, b = (pixels[..., channel].astype(np.int8).astype(float) for channel in (1, 2))
    y = (light + 16) / 116
    f = np.stack([y + a / 500, y, y - b / 200], axis=-1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.9642, 1.0, 0.8251]
    to_linear = np.array(
        [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540], [0.0719453, -0.2289914, 1.4052427]]
    )
    linear = np.clip(xyz @ to_linear.T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def test_the_table_is_complete():
    with open(FOLDER / "index.csv") as file:
        index = {row["file"]: row for row in csv.DictReader(file)}
    assert SKIPPED.keys() | USED.keys() == index.keys() and len(index) == 41
    assert {name for name, row in index.items() if row["converts_to_rgb"] == "yes"} == USED.keys() | {"hopper.pfm"}
    for name, (width, height, _) in USED.items():
        sides = (int(index[name]["width"]), int(index[name]["height"]))
        assert (width, height) == (sides[::-1] if index[name]["exif_orientation"] == "6" else sides)


@pytest.mark.parametrize("name", SKIPPED)
def test_skipped(name):
    for channels in (1, 3):
        with pytest.raises(UndecodableImage) as caught:
            decode_pixels(encoded(name), channels)
        reason = str(caught.value)
        assert SKIPPED[name] in reason and "\n" not in reason and "object at 0x" not in reason


@pytest.mark.parametrize("name", USED)
def test_used(name, recwarn):
    width, height, _ = USED[name]
    expected = reference(name)
    recwarn.clear()
    pixels = decode_pixels(encoded(name), 3).numpy()
    assert pixels.shape == expected.shape == (height, width, 3) and pixels.dtype == np.uint8
    tolerance = 12 if name == "hopper.Lab.tif" else 1  # profiles differ in the saturated colours
    assert np.abs(pixels - expected).max() <= tolerance
    gray = decode_pixels(encoded(name), 1).numpy()[..., 0]
    assert gray.shape == (height, width) and np.abs(gray - pixels @ [0.299, 0.587, 0.114]).max() <= 1.01
    assert not recwarn.list


def test_the_same_portrait_in_every_encoding():
    portrait = decode_pixels(encoded("avif_hopper.avif"), 1).numpy().astype(float)
    for name in USED:
        if name.startswith("hopper") or name == "made_jpeg_named.png":
            pixels = decode_pixels(encoded(name), 1).numpy().astype(float)
            one_bit = "g4" in name or "1bit" in name
            assert np.corrcoef(pixels.flatten(), portrait.flatten())[0, 1] > (0.8 if one_bit else 0.99), name


@pytest.mark.parametrize("aspect_ratio", ["crop", "pad"])
def test_as_one_batch(aspect_ratio):
    names = sorted(path.name for path in FOLDER.iterdir() if path.name != "index.csv")

    class Files(ImageSource):
        def encoded(self, indices):
            return [EncodedImage(names[index], str(FOLDER / names[index])) for index in indices]

    dataset = ImageDataset(Files(names, None, None), (32, 32), 3, aspect_ratio=aspect_ratio)
    batch = dataset.__getitems__([ImageKey(0, index) for index in range(len(names))])
    assert {image.name for image in batch.skipped} == SKIPPED.keys()
    assert {names[index] for index in batch.indices} == USED.keys()
    assert batch.images().shape == (len(USED), 3, 32, 32)
