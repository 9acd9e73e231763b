"""DICOM files and NIfTI volumes: values with their rescaling, and words where a library or a form is missing."""

import importlib.util

import numpy as np
import pytest
from PIL import Image

from configs import ConfigError
from stage1_vqgan import DataConfig, EncodedImage, load_images
from stage1_vqgan.data.decoding import UndecodableImage, decode_pixels, decode_values
from stage1_vqgan.data.value_range import training_range

pydicom, nibabel = pytest.importorskip("pydicom"), pytest.importorskip("nibabel")

HOUNSFIELD = np.arange(-1000, 1048, 8, dtype=np.int16).reshape(16, 16)
STORED = (HOUNSFIELD + 1024).astype(np.uint16)


def dicom(path, stored, **tags):
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
    data = pydicom.dataset.FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    data.Rows, data.Columns = 16, 16
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.PixelRepresentation = 8 * stored.itemsize, int(stored.dtype.kind == "i")
    data.BitsStored = min(12, data.BitsAllocated)
    data.HighBit = data.BitsStored - 1
    for name, value in tags.items():
        setattr(data, name, value)
    data.PixelData = stored.tobytes()
    data.save_as(path)
    return path


def values_of(path, channels=1):
    return decode_values(EncodedImage("x", str(path)), channels)


def test_dicom(tmp_path):
    in_units = dicom(tmp_path / "ct.dcm", STORED, RescaleSlope=1, RescaleIntercept=-1024)
    assert values_of(in_units).dtype == np.float32 and np.array_equal(values_of(in_units), HOUNSFIELD)
    assert np.array_equal(values_of(dicom(tmp_path / "mr.dcm", STORED)), STORED)
    inverted = values_of(dicom(tmp_path / "xray.dcm", STORED, PhotometricInterpretation="MONOCHROME1"))
    assert inverted.dtype == np.uint16 and np.array_equal(inverted, 4095 - STORED)
    colours = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    colour = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    assert np.array_equal(values_of(dicom(tmp_path / "photo.dcm", colours, **colour), 3), colours)
    for tags, words in [
        ({"NumberOfFrames": 3}, "holds 3 frames"),
        ({"Rows": 60_000, "Columns": 60_000}, "pixels, more"),
    ]:
        with pytest.raises(UndecodableImage, match=words):
            values_of(dicom(tmp_path / "wrong.dcm", STORED, **tags))


def test_a_folder_of_slices(tmp_path):
    for name in ("air", "bone"):
        (tmp_path / name).mkdir()
        for number in range(3):
            dicom(tmp_path / name / f"{number}.dcm", STORED, RescaleSlope=1, RescaleIntercept=-1024)
    settings = DataConfig(dataset=str(tmp_path), value_range=[-1000, 1040])
    train, validation = load_images(settings)
    assert train.class_names == ["air", "bone"] and len(train) + len(validation) == 6
    found = training_range(settings, train, 1)
    pixels = decode_pixels(train.encoded([0])[0], 1, found)
    assert np.array_equal(pixels[..., 0], np.arange(256).reshape(16, 16))
    with pytest.raises(ConfigError, match="float32 from -1000 to 1040; such numbers have no range"):
        training_range(DataConfig(dataset=str(tmp_path)), train, 1)


@pytest.mark.parametrize("extension", ["nii", "nii.gz"])
def test_slices_of_a_volume(tmp_path, extension):
    volume = np.stack([HOUNSFIELD + 1000 * number for number in range(5)], -1)
    for kind in ("a", "b"):
        (tmp_path / kind).mkdir()
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / kind / f"brain.{extension}")
    train, validation = load_images(DataConfig(dataset=str(tmp_path), value_range="auto", validation_fraction=0.1))
    assert len(train) == 9 and len(validation) == 1 and train.labels.tolist() == [0] * 4 + [1] * 5
    last = train.encoded([8])[0]
    assert last.name.endswith(f"b/brain.{extension}::4")
    assert np.array_equal(decode_values(last, 1), volume[..., 4].T)
    assert training_range(DataConfig(dataset="x", value_range="auto"), train, 1, quiet=True) == (-1000, 5040, False)


def test_volumes_that_are_refused(tmp_path):
    def refusal():
        with pytest.raises(ConfigError) as caught:
            load_images(DataConfig(dataset=str(tmp_path)))
        return str(caught.value)

    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 2, 2), np.int16), np.eye(4)), tmp_path / "a.nii")
    assert "(4, 4, 2, 2); needs a volume of three dimensions" in refusal()
    with pytest.raises(UndecodableImage, match="NIfTI volume, which is read from a folder"):
        values = (tmp_path / "a.nii").read_bytes()
        decode_pixels(EncodedImage("x", values), 1)
    (tmp_path / "a.nii").write_bytes(b"no volume")
    assert "a.nii cannot be read: " in refusal()


@pytest.mark.parametrize(
    "name, command",
    [("a.dcm", "'tessella[medical]'"), ("a.nii.gz", "'tessella[medical]'"), ("a.HEIC", "pillow-heif")],
)
def test_a_missing_library_is_named(tmp_path, name, command, monkeypatch, caplog):
    found = importlib.util.find_spec
    missing = ("pydicom", "nibabel", "pillow_heif")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in missing else found(name, *a))
    dicom(tmp_path / name, STORED)
    with pytest.raises(ConfigError) as caught:
        load_images(DataConfig(dataset=str(tmp_path)))
    assert f"({name}); " in str(caught.value) and f"is read after pip install {command}" in str(caught.value)
    for number in range(2):
        Image.new("L", (4, 4)).save(tmp_path / f"{number}.png")
    load_images(DataConfig(dataset=str(tmp_path)))
    assert f"is read after pip install {command}" in caplog.text
    with pytest.raises(UndecodableImage, match=r"pydicom reads: pip install 'tessella\[medical\]'"):
        values_of(dicom(tmp_path / "b.dcm", STORED))
