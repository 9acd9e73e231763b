"""One range of pixel values for a data set: that of the type, of the settings, or measured; never that of an image."""

import struct
import zlib

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from configs import ConfigError, load_config
from stage1_vqgan import DataConfig, EncodedImage, ImageSource, VQGANImageProcessor, decode, load_images
from stage1_vqgan.data import value_range
from stage1_vqgan.data.decoding import UndecodableImage, decode_pixels
from stage1_vqgan.data.value_range import measured_once, save_measured, survey, training_range
from stage1_vqgan.image_processing_values import ValueRange, to_levels

GRAY = np.arange(256, dtype=np.uint8).reshape(16, 16)
RGB = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
TWELVE_BITS = GRAY.astype(np.uint16) * 16
HOUNSFIELD = GRAY.astype(np.int16) * 8 - 1000


def config(source, setting=None, **others):
    return DataConfig(dataset=str(source), use_labels=False, value_range=setting, **others)


def parquet(folder, images, kind):
    """A folder with a parquet file of eight equal images; `kind` is an Arrow type or a feature of datasets."""
    if isinstance(kind, pa.DataType):
        pq.write_table(pa.table({"image": pa.array([images] * 8, kind)}), folder / "a.parquet")
    else:
        features = datasets.Features({"image": kind})
        datasets.Dataset.from_dict({"image": [images] * 8}, features=features).to_parquet(folder / "a.parquet")
    return folder


def pixels(source, setting=None, channels=1, **others):
    """The pixels of the first image, as a training sees them, `(H, W, C)`."""
    settings = config(source, setting, **others)
    train = load_images(settings)[0]
    found = training_range(settings, train, channels, quiet=True)
    first = train.encoded([0])[0] if isinstance(train, ImageSource) else next(train.read())[0]
    return decode_pixels(first, channels, found).numpy()


def refusal(*args, **settings):
    with pytest.raises((ConfigError, UndecodableImage)) as caught:
        pixels(*args, **settings)
    return str(caught.value)


def folder(path, arrays):
    path.mkdir(exist_ok=True)
    for number, array in enumerate(arrays):
        Image.fromarray(array).save(path / f"{number}.{'png' if array.dtype.kind == 'u' else 'tif'}")
    return path


def nested(number):
    return pa.list_(pa.list_(number))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "kind",
    [nested(pa.int64()), nested(pa.uint8()), pa.large_list(pa.list_(pa.int32())), datasets.Array2D((16, 16), "uint8")],
)
def test_a_column_of_rows_keeps_its_bytes(tmp_path, kind, streaming):
    assert np.array_equal(pixels(parquet(tmp_path, GRAY.tolist(), kind), streaming=streaming)[..., 0], GRAY)


@pytest.mark.parametrize("shape", [(16, 16, 3), (3, 16, 16)])
def test_channels_of_a_column_come_first_or_last(tmp_path, shape):
    stored = RGB if shape[2] == 3 else RGB.transpose(2, 0, 1)
    source = parquet(tmp_path, stored.tolist(), datasets.Array3D(shape, "uint8"))
    assert np.array_equal(pixels(source, channels=3), RGB)
    assert np.array_equal(pixels(source)[..., 0], np.asarray(Image.fromarray(RGB).convert("L")))
    assert "can be the channels, which are 5" in refusal(source, channels=5)


@pytest.mark.parametrize(
    "images, kind, words",
    [
        (GRAY.flatten().tolist(), pa.list_(pa.int64()), "received 'image', which holds lists of numbers 1 deep"),
        ([[[GRAY.tolist()]]], pa.list_(pa.list_(pa.list_(nested(pa.int64())))), "5 deep"),
        (TWELVE_BITS.tolist(), nested(pa.int64()), "int64 from 0 to 4080; such numbers have no range of their own"),
        (HOUNSFIELD.tolist(), nested(pa.int16()), "int16 from -1000 to 1040; such numbers have no range"),
        ((GRAY / 255).tolist(), nested(pa.float32()), "set data.value_range to [0, 1] or a range you know"),
        ([[1, 2], [3]], nested(pa.int64()), "rows of different lengths"),
        ([[1, None]], nested(pa.int64()), "values that are no numbers"),
        (RGB[:3].tolist(), datasets.Array3D((3, 16, 3), "uint8"), "both its first and its last axis can be"),
    ],
)  # fmt: skip
def test_a_column_is_refused_with_words(tmp_path, images, kind, words):
    assert words in refusal(parquet(tmp_path, images, kind))


def test_a_value_has_one_level_in_all_images(tmp_path):
    images = [np.full((16, 16), 0.5, np.float32) for _ in range(4)]
    for image, top in zip(images, (0.9, 5.0, 0.5, 2.0), strict=True):
        image[0, 0] = top
    source = folder(tmp_path, images)
    for setting, level in [([0, 1], 128), ([0, 5], 26), ([0.5, 9], 0)]:
        levels = {
            int(decode_pixels(EncodedImage("x", str(path)), 1, ValueRange(*setting))[8, 8, 0])
            for path in source.iterdir()
        }
        assert levels == {level}
    assert "data.value_range: received null, but" in refusal(source)


def test_levels():
    for stored in (np.array([-1000, 1040], np.int16), np.array([-5000.0, 2e9]), np.array([-1000, 1040], np.float16)):
        assert to_levels(stored, ValueRange(-1000, 1040)).tolist() == [0, 255]
    assert len(np.unique(to_levels(np.arange(4096, dtype=np.uint16), ValueRange(0, 4095)))) == 256
    assert to_levels(GRAY, ValueRange(0, 10)) is GRAY  # an ordinary picture
    assert to_levels(GRAY, ValueRange(0, 127, of_bytes=True))[7].tolist()[-1] == 255
    assert to_levels(np.array([False, True]), ValueRange(0, 9, of_bytes=True)).tolist() == [0, 255]
    with pytest.raises(ValueError, match="NaN or infinite"):
        to_levels(np.array([0.0, np.nan]), ValueRange(0, 1))


@pytest.mark.parametrize("values, found", [(TWELVE_BITS, (0, 4080, False)), (HOUNSFIELD, (-1000, 1040, False)),
                                           (GRAY // 16, (0, 15, True))])  # fmt: skip
def test_auto_measures_the_training_set_once(tmp_path, values, found, monkeypatch, capsys):
    settings = config(
        folder(tmp_path / "set", [values if values.dtype.kind == "u" else values.astype(np.int32)] * 4), "auto"
    )
    train = load_images(settings)[0]
    measured = training_range(settings, train, 1)
    assert measured == found and "3 images hold" in capsys.readouterr().out
    save_measured(tmp_path, settings, measured)
    assert measured_once(tmp_path, settings) == measured and measured_once(tmp_path, config("x", [0, 1])) is None
    assert len(np.unique(pixels(settings.dataset, "auto"))) == len(np.unique(values))
    monkeypatch.setattr(value_range, "MEASURED", 2)
    training_range(settings, train, 1)
    assert "2 images hold" in (said := capsys.readouterr().out) and "(evenly spread of 3)" in said


def test_a_set_that_uses_little_of_its_range_is_named(tmp_path, caplog):
    cases = {
        "bits": (TWELVE_BITS, None, "use 17 of 256 levels: 3 images hold uint16 from 0 to 4080"),
        "dark": (GRAY // 16, None, "use 16 of 256 levels: 3 images hold uint8 from 0 to 15, and the range is [0, 255]"),
        "wide": (TWELVE_BITS, [0, 60_000], "use 18 of 256 levels"),
        "full": (GRAY, None, ""),
        "window": (TWELVE_BITS, [1000, 1100], ""),
        "mask": ((GRAY > 9), None, ""),
    }
    for name, (values, setting, words) in cases.items():
        caplog.clear()
        settings = config(folder(tmp_path / name, [values] * 4), setting)
        training_range(settings, load_images(settings)[0], 1)
        assert words in caplog.text and bool(words) == bool(caplog.text), name
        assert not words or "set data.value_range to [0, " in caplog.text
    assert "received [0, 1e+31]; needs two numbers" in refusal(tmp_path / "bits", [0, 1e31])
    assert "received [5000, 6000], but" in refusal(tmp_path / "bits", [5000, 6000])


def test_bytes_among_other_images_are_pictures(tmp_path, caplog):
    source = folder(tmp_path, [GRAY, *[HOUNSFIELD.astype(np.int32)] * 3])
    settings = config(source, [-1000, 1040], validation_fraction=0.5)
    train = load_images(settings)[0]
    mixed = ImageSource([Image.open(path) for path in sorted(source.iterdir())], None, None)
    found = training_range(settings, mixed, 1)
    assert not found.of_bytes and "1 of 4 images have 8 bits" in caplog.text and len(train)
    assert np.array_equal(decode_pixels(mixed.encoded([0])[0], 1, found)[..., 0], GRAY)


def test_a_few_images_without_a_range_are_skipped(caplog):
    images = [Image.fromarray(GRAY)] * 9 + [Image.fromarray(GRAY.astype(np.float32))]
    source = ImageSource(images, None, None)
    assert training_range(config("x", max_skipped_fraction=0.1), source, 1) is None and not caplog.text
    with pytest.raises(ConfigError, match="float32, uint8 from 0 to 255; such numbers have no range of their own"):
        training_range(config("x"), source, 1)


def test_a_stream_is_measured_from_its_beginning(tmp_path):
    source = parquet(tmp_path, TWELVE_BITS.tolist(), nested(pa.uint16()))
    settings = config(source, streaming=True)
    values = survey(load_images(settings)[0], 1, 3)
    assert str(values) == "3 images hold uint16 from 0 to 4080"


@pytest.mark.parametrize("setting", [[2, 1], [1, 1], [1], [0, "a"], "all", 5])
def test_a_wrong_setting_is_refused(setting):
    with pytest.raises(ConfigError, match=r"value_range"):
        load_config(DataConfig, overrides={"dataset": "digits", "value_range": setting})


def test_a_trained_tokenizer_keeps_its_range():
    settings, recorded = config("digits"), ValueRange(-1000, 400)
    assert training_range(settings, ImageSource([Image.fromarray(GRAY)], None, None), 1, recorded) is recorded


def test_colours_of_16_bits():
    values = RGB.astype(np.uint16) * 16
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    content = EncodedImage("x", b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    assert np.array_equal(decode_pixels(content, 3), RGB >> 4)
    assert torch.equal(decode_pixels(content, 3, ValueRange(0, 4080)), torch.from_numpy(RGB))
    with pytest.raises(ValueError, match="16-bit colours, which Pillow reads as 8 bits"):
        VQGANImageProcessor(16, 3, value_range=[0, 4080])(decode(content))  # it was read as a picture of 8 bits
    assert torch.equal(VQGANImageProcessor(16, 3)(decode(content))["pixel_values"] * 127.5 + 127.5, levels_of(RGB >> 4))


def levels_of(pixels):
    """Pixels `(H, W, C)` as float32 `(1, C, H, W)`."""
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
