"""Images in .npz files: written as numpy reads them, read as numpy writes them, and refused if they are damaged."""

import io
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from configs import ConfigError
from pipelines.evaluation.metrics import frechet_distances
from pipelines.evaluation.npz import alternating, export_npz, import_images, read_labels
from pipelines.evaluation.reading import PixelImages
from pipelines.evaluation.run import evaluate, read_splits
from pipelines.evaluation.shards import ImageShards, pixels_of_levels
from tests.pipelines.evaluation.sampling_runs import config_of, make_pipeline, small_shards

RNG = np.random.default_rng(0)
LEVELS = RNG.integers(0, 256, (20, 8, 6, 3), dtype=np.uint8)
CLASSES = np.repeat(range(4), 5)


def saved(path: Path, *arrays: np.ndarray, compressed: bool = False, **named: np.ndarray) -> Path:
    (np.savez_compressed if compressed else np.savez)(path, *arrays, **named)
    return path


def imported(path: Path, folder: Path) -> ImageShards:
    folder.mkdir()
    with small_shards():
        import_images(path, folder)
    return ImageShards(folder, read_labels(path, len(ImageShards(folder))))


@pytest.mark.parametrize("compressed", [False, True])
def test_a_file_of_numpy_is_read(tmp_path, compressed):
    path = saved(tmp_path / "a.npz", LEVELS, CLASSES.astype(np.int32), compressed=compressed)
    found = imported(path, tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.npy"))) == 3
    assert np.array_equal(found.stored(range(20)), LEVELS) and np.array_equal(found.labels, CLASSES)
    assert torch.equal(found.read(range(6, 18)), torch.from_numpy(LEVELS[6:18]).permute(0, 3, 1, 2) / 127.5 - 1)


def test_numpy_reads_an_exported_file_and_so_do_we(tmp_path):
    export_npz(tmp_path / "new" / "a.npz", PixelImages(pixels_of_levels(LEVELS), CLASSES))
    with np.load(tmp_path / "new" / "a.npz", allow_pickle=False) as file:
        images, labels = file["arr_0"], file["arr_1"]
        assert set(file.files) == {"arr_0", "arr_1"}
    assert labels.dtype == np.int64 and labels.tolist() == [0, 1, 2, 3] * 5  # balanced, also in each part
    order = alternating(CLASSES)
    assert images.dtype == np.uint8 and np.array_equal(images, LEVELS[order])
    found = imported(tmp_path / "new" / "a.npz", tmp_path / "shards")
    assert np.array_equal(found.stored(range(20)), images) and np.array_equal(found.labels, labels)


def test_gray_images_become_rgb_and_others_are_refused(tmp_path, capsys):
    export_npz(tmp_path / "a.npz", PixelImages(pixels_of_levels(LEVELS[..., :1])))
    assert "20 images; the gray images are RGB there" in capsys.readouterr().out
    with np.load(tmp_path / "a.npz") as file:
        assert file.files == ["arr_0"] and np.array_equal(file["arr_0"], LEVELS[..., :1].repeat(3, -1))
    with pytest.raises(ConfigError, match=r"export: received .*a\.npz', but these images have 2 channels"):
        export_npz(tmp_path / "a.npz", PixelImages(pixels_of_levels(LEVELS[..., :2])))


def lying(path: Path, count: int) -> Path:
    """A file whose header promises another number of images than follow."""
    array = io.BytesIO()
    np.lib.format.write_array_header_1_0(array, {"descr": "|u1", "fortran_order": False, "shape": (count, 8, 6, 3)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", array.getvalue() + LEVELS.tobytes())
    return path


def changed(path: Path) -> Path:
    """A file in which a byte of an image has changed."""
    content = bytearray(saved(path, LEVELS).read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def cut(path: Path) -> Path:
    path.write_bytes(saved(path, LEVELS).read_bytes()[:-500])
    return path


def no_zip(path: Path) -> Path:
    np.save(path.with_suffix(".npy"), LEVELS)
    return path.with_suffix(".npy").rename(path)


WRONG = {
    "pickle": (lambda path: saved(path, np.array([{}, 1], object)), "holds Python objects, which could run code"),
    "dtype": (lambda path: saved(path, LEVELS.astype(np.float32)), r"arr_0 is float32 \(20, 8, 6, 3\); needs arr_0"),
    "shape": (lambda path: saved(path, LEVELS[0]), r"arr_0 is uint8 \(8, 6, 3\); needs arr_0"),
    "channels first": (
        lambda path: saved(path, LEVELS.transpose(0, 3, 1, 2).copy()),
        r"arr_0 is uint8 \(20, 3, 8, 6\)",
    ),
    "Fortran order": (lambda path: saved(path, np.asfortranarray(LEVELS)), "its array is in Fortran order"),
    "other names": (lambda path: saved(path, images=LEVELS), "it holds images; needs arr_0"),
    "no images": (lambda path: saved(path, LEVELS[:0]), r"arr_0 is uint8 \(0, 8, 6, 3\)"),
    "more labels": (lambda path: saved(path, LEVELS, np.arange(21)), r"arr_1 is int64 \(21,\) beside 20 images"),
    "labels in words": (lambda path: saved(path, LEVELS, np.array(["a"] * 20)), r"arr_1 is <U1 \(20,\) beside"),
    "pickled labels": (lambda path: saved(path, LEVELS, np.array([None] * 20)), "holds Python objects"),
    "negative labels": (lambda path: saved(path, LEVELS, CLASSES - 1), "arr_1 is cut or has negative classes"),
    "fewer images": (lambda path: lying(path, 10), "arr_0 is longer than its header says; copy the file again"),
    "more images": (lambda path: lying(path, 30), "arr_0 ends before image 24 of 30; copy the file again"),
    "changed byte": (changed, r"no whole \.npz file \(Bad CRC-32"),
    "cut": (cut, r"no whole \.npz file \(File is not a zip file\)"),
    "no zip": (no_zip, r"no whole \.npz file \(File is not a zip file\)"),
    "no file": (lambda path: path, "there is no such file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_has_another_form_is_refused(name, tmp_path):
    make, message = WRONG[name]
    with pytest.raises(ConfigError, match=f"samples: received '.*a.npz'; .*{message}"):
        imported(make(tmp_path / "a.npz"), tmp_path / "shards")


def test_a_damaged_file_is_refused_again(tmp_path):
    """The shards before the damage do not make the second import complete."""
    path = changed(tmp_path / "a.npz")
    for _ in range(2):
        with pytest.raises(ConfigError, match="Bad CRC-32"), small_shards():
            (tmp_path / "shards").mkdir(exist_ok=True)
            import_images(path, tmp_path / "shards")


def test_images_of_a_file_are_evaluated(tmp_path, capsys):
    """The file holds the training images: their distance is that of the training images, and they have all classes."""
    pipeline = make_pipeline()
    train, validation = read_splits(config_of(tmp_path, "none"), pipeline)
    levels = (((train.pixels() + 1) * 127.5).round().byte()).permute(0, 2, 3, 1).numpy()
    path = saved(tmp_path / "digits.npz", levels, train.labels)
    values = {"pipeline": None, "samples": str(path), "export": str(tmp_path / "again.npz")}
    metrics = evaluate(config_of(tmp_path, "evaluation", **values))
    assert metrics["frechet_distance"] == pytest.approx(metrics["frechet_distance_real"], abs=1e-9)
    features = [
        set.pixels().reshape(-1, 1, 4, 4, 4, 4).mean((3, 5)).flatten(1).double().numpy() for set in (train, validation)
    ]
    assert metrics["frechet_distance"] == pytest.approx(frechet_distances(*features, features[:1], 8)[0], rel=1e-5)
    assert metrics["classification_accuracy_score"] == metrics["classification_accuracy_score_real"]
    assert metrics["nearest_neighbour_ratio"] < 1e-3 and metrics["num_samples"] == 60
    assert not metrics.keys() & {"codebook_usage", "psnr"}
    assert "left out: codebook_usage, reconstruction_l1, psnr, ssim (it needs a pipeline" in capsys.readouterr().out
    assert (tmp_path / "evaluation" / "samples.png").is_file()
    with np.load(tmp_path / "again.npz") as file:
        assert Counter(file["arr_1"].tolist()) == Counter(train.labels.tolist())
    saved(path, 255 - levels, train.labels)  # another file of the same name is measured anew
    assert evaluate(config_of(tmp_path, "evaluation", **values))["frechet_distance"] > 2 * metrics["frechet_distance"]


def test_classes_that_the_data_lack_are_refused(tmp_path):
    path = saved(tmp_path / "a.npz", LEVELS, CLASSES + 7)
    with pytest.raises(ConfigError, match=r"data\.dataset: its training images have the classes 0 to 9, .* images 10"):
        evaluate(config_of(tmp_path, "evaluation", pipeline=None, samples=str(path)))


def test_one_of_pipeline_and_samples(tmp_path):
    for values in ({"samples": "a.npz"}, {"pipeline": None}):
        with pytest.raises(ConfigError, match=r"pipeline: .*give either this, or samples"):
            config_of(tmp_path, "evaluation", **values)
    with pytest.raises(ConfigError, match=r"export: received 'a\.png'; must be the name of an \.npz file"):
        config_of(tmp_path, "evaluation", export="a.png")
