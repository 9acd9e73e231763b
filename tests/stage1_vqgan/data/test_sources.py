"""Sources of images: every kind of source, its splits, columns and classes, and errors of sources."""

import io
import logging
import tarfile

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from configs import ConfigError
from stage1_vqgan import DataConfig, ImageSource, ImageStream, decode, load_images
from tests.image_files import picture, read, values, write_folder, write_parquet, write_tar

pytestmark = pytest.mark.usefixtures("datasets_cache")

AB = datasets.ClassLabel(names=["a", "b"])


def problem(**settings):
    with pytest.raises(ConfigError) as caught:
        load_images(DataConfig(**settings))
    (found,) = caught.value.problems
    return found.key, found.message


def test_digits():
    train, validation = load_images(DataConfig(dataset="digits"))
    bunch = load_digits()
    held_out = np.arange(len(bunch.target)) % 5 == 0
    for source, mask, count in [(train, ~held_out, 1437), (validation, held_out, 360)]:
        assert len(source) == count
        assert np.array_equal(source.labels, bunch.target[mask]) and source.labels.dtype == np.int64
        assert source.class_names == list("0123456789")
        pixels = np.stack([np.asarray(decode(image)) for image in source.encoded(range(count))])
        assert np.abs(pixels / 255 - bunch.images[mask] / 16).max() <= 0.5 / 255 + 1e-9
    unlabelled, _ = load_images(DataConfig(dataset="digits", use_labels=False))
    assert unlabelled.labels is None and unlabelled.class_names is None


class TestFolder:
    @pytest.mark.parametrize("streaming", [False, True])
    def test_subfolders_are_classes(self, tmp_path, streaming):
        bases = {"cat": 10, "ant": 50, "bee": 90}
        layout = {f"{name}/{n}.png": base + n for name, base in bases.items() for n in range(4)}
        config = DataConfig(dataset=write_folder(tmp_path / "a", layout), validation_fraction=0.25, streaming=streaming)
        train, validation = load_images(config)
        assert isinstance(train, ImageSource) and train.class_names == validation.class_names == ["ant", "bee", "cat"]
        for source in (train, validation):
            expected = [next(name for name, base in bases.items() if base <= v < base + 4) for v in values(source)]
            assert [source.class_names[label] for label in source.labels] == expected
        assert sorted(values(train) + values(validation)) == sorted(layout.values())
        assert len(validation) == 3

    def test_flat_holds_out_every_nth(self, tmp_path):
        folder = write_folder(tmp_path / "a", {f"{n:02}.png": n for n in range(20)})
        train, validation = load_images(DataConfig(dataset=folder, validation_fraction=0.25))
        assert train.labels is None and train.class_names is None
        assert values(validation) == [0, 4, 8, 12, 16]
        assert values(train) == [n for n in range(20) if n % 4]

    def test_a_single_subfolder_is_no_class(self, tmp_path):
        train, _ = load_images(DataConfig(dataset=write_folder(tmp_path, {f"all/{n}.png": n for n in range(4)})))
        assert train.labels is None and len(train) == 3

    def test_splits(self, tmp_path):
        layout = {f"train/a/{n}.png": n for n in range(4)} | {f"test/a/{n}.png": 100 + n for n in range(3)}
        layout |= {"train/b/9.png": 9, "test/b/9.png": 109}
        folder = write_folder(tmp_path / "a", layout)
        train, validation = load_images(DataConfig(dataset=folder, validation_split="test"))
        assert read(train) == [(0, 0), (1, 0), (2, 0), (3, 0), (9, 1)]
        assert read(validation) == [(100, 0), (101, 0), (102, 0), (109, 1)]
        train, validation = load_images(DataConfig(dataset=folder, validation_fraction=0.5))
        assert sorted(values(train) + values(validation)) == [0, 1, 2, 3, 9]  # the test split is not used
        assert problem(dataset=folder, validation_split="dev") == (
            "data.validation_split",
            "received 'dev'; the dataset has ['test', 'train']",
        )
        assert problem(dataset=folder, train_split="all")[0] == "data.train_split"

    def test_words_in_the_path_are_no_splits(self, tmp_path):
        layout = {f"{kind}/{n}.png": n for kind in ("train", "tram") for n in range(4)}  # vehicles
        train, validation = load_images(DataConfig(dataset=write_folder(tmp_path / "test" / "validation", layout)))
        assert train.class_names == ["train", "tram"] and len(train) + len(validation) == 8

    def test_what_pillow_reads_and_nothing_else(self, tmp_path, caplog):
        folder = write_folder(tmp_path / "a", dict.fromkeys(("1.PPM", "2.tif", "3.webp", "4.tga", "5.png"), 7))
        Image.new("F", (8, 6)).save(tmp_path / "a" / "6.pfm")
        for name in ("index.csv", "notes.doc", "scan.pdf", ".hidden.png"):
            (tmp_path / "a" / name).write_text("no image")
        with caplog.at_level(logging.WARNING):
            train, validation = load_images(DataConfig(dataset=folder, validation_fraction=0.5))
        assert len(train) + len(validation) == 6
        assert "3 files (index.csv, notes.doc, scan.pdf)" in caplog.text and ".hidden" not in caplog.text

    def test_links_are_followed_but_not_round(self, tmp_path):
        folder = write_folder(tmp_path / "a", {"cat/0.png": 0, "cat/1.png": 1})
        write_folder(tmp_path / "elsewhere", {"2.png": 2, "3.png": 3})
        (tmp_path / "a" / "dog").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "a" / "all").symlink_to(tmp_path / "a")
        train, validation = load_images(DataConfig(dataset=folder, validation_fraction=0.5))
        assert train.class_names == ["cat", "dog"] and sorted(values(train) + values(validation)) == [0, 1, 2, 3]

    def test_validation_classes_go_by_name(self, tmp_path):
        layout = {f"train/{kind}/{n}.png": n for kind in "abc" for n in range(2)} | {"val/c/5.png": 5}
        folder = write_folder(tmp_path / "x", layout)
        _, validation = load_images(DataConfig(dataset=folder, validation_split="val"))
        assert read(validation) == [(5, 2)] and validation.class_names == ["a", "b", "c"]
        write_folder(tmp_path / "x", {"val/d/6.png": 6})
        key, message = problem(dataset=folder, validation_split="val")
        assert key == "data.label_column" and message.endswith("lacks: d")

    @pytest.mark.parametrize(
        ("layout", "message"),
        [
            ({"a/1.png": 1, "b/1.png": 1, "2.png": 2}, "1 image (2.png) beside them"),
            (
                {"train/1.png": 1, "test/1.png": 1, "2.png": 2},
                "holds the splits ['test', 'train'], and 1 image (2.png)",
            ),
            ({"1.png": 1}, "holds a single image"),
        ],
    )
    def test_layouts_that_cannot_be_right(self, tmp_path, layout, message):
        key, found = problem(dataset=write_folder(tmp_path, layout))
        assert key == "data.dataset" and message in found

    def test_without_images(self, tmp_path):
        (tmp_path / "empty").mkdir()
        key, message = problem(dataset=str(tmp_path / "empty"))
        assert key == "data.dataset" and "this folder holds no images (give" in message
        (tmp_path / "empty" / "notes.txt").write_text("")
        assert "1 other file (notes.txt)" in problem(dataset=str(tmp_path / "empty"))[1]

    def test_several_kinds(self, tmp_path):
        write_parquet(tmp_path / "a" / "x.parquet", {"picture": [picture(1)]})
        folder = write_folder(tmp_path / "a", {"1.png": 1})
        message = problem(dataset=folder)[1]
        assert "parquet: 1 file (x.parquet); images: 1 file (1.png)" in message


@pytest.mark.parametrize("streaming", [False, True])
class TestPacked:
    """Parquet and tars, by number and as streams."""

    @pytest.mark.parametrize("form", ["file", "folder", "pattern"])
    def test_parquet(self, tmp_path, streaming, form):
        rows = {"picture": [picture(n) for n in range(6)], "kind": [0, 1, 2, 0, 1, 2]}
        root = tmp_path / "test"  # this word must not name a split
        path = write_parquet(root / "x.parquet", rows, kind=datasets.ClassLabel(names=["x", "y", "z"]))
        name = {"file": path, "folder": str(root), "pattern": str(root / "*.parquet")}[form]
        train, validation = load_images(DataConfig(dataset=name, validation_fraction=0.5, streaming=streaming))
        assert train.class_names == ["x", "y", "z"]
        everything = list(enumerate([0, 1, 2, 0, 1, 2]))
        held_out = everything[:3] if streaming else everything[::2]
        assert read(validation) == held_out and read(train) == [row for row in everything if row not in held_out]
        assert isinstance(train, ImageStream if streaming else ImageSource)
        assert not load_images(DataConfig(dataset=name, use_labels=False, streaming=streaming))[0].has_labels

    def test_splits_are_words_of_file_names(self, tmp_path, streaming):
        for name, value in [("train-00000-of-00002", 0), ("train-00001-of-00002", 1), ("data/x_test.3", 5)]:
            write_parquet(tmp_path / f"{name}.parquet", {"picture": [picture(value)] * 2})
        config = {"dataset": str(tmp_path), "validation_split": "test", "streaming": streaming}
        train, validation = load_images(DataConfig(**config))
        assert values(train) == [0, 0, 1, 1] and values(validation) == [5, 5]
        assert problem(**config | {"validation_split": "dev"}) == (
            "data.validation_split",
            "received 'dev'; the dataset has ['test', 'train']",
        )
        write_parquet(tmp_path / "more.parquet", {"picture": [picture(9)]})
        key, message = problem(**config)
        assert key == "data.dataset" and "1 file (more.parquet)" in message and "no split" in message

    @pytest.mark.parametrize("form", ["file", "folder", "pattern"])
    @pytest.mark.parametrize("kind", ["png", "webp"])
    def test_tars(self, tmp_path, streaming, form, kind):
        names = [
            write_tar(tmp_path / "a" / f"{split}-{n}.tar", range(v, v + 3), kind, cls=[2, 0, 1])
            for n, split, v in [(0, "train", 10), (1, "train", 20), (0, "val", 40)]
        ]
        name = {"file": names[0], "folder": str(tmp_path / "a"), "pattern": str(tmp_path / "a" / "*.tar")}[form]
        if form == "file":
            if streaming:
                assert "unknown length" in problem(dataset=name, streaming=True)[1]
                return
            train, validation = load_images(DataConfig(dataset=name, validation_fraction=0.5))
            assert [label for _, label in read(validation) + read(train)] == [2, 1, 0]
            return
        train, validation = load_images(DataConfig(dataset=name, validation_split="val", streaming=streaming))
        assert [label for _, label in read(train)] == [2, 0, 1, 2, 0, 1]
        if kind == "png":
            assert values(train) == [10, 11, 12, 20, 21, 22] and values(validation) == [40, 41, 42]
        assert train.class_names == (None if streaming else ["0", "1", "2"])

    def test_tars_that_are_none(self, tmp_path, streaming):
        for name, content in [("empty", []), ("words", ["a", "b"])]:
            with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
                for word in content:
                    tar.addfile(tarfile.TarInfo(f"{word}.txt"), io.BytesIO())
        (tmp_path / "text.tar").write_text("no tar")
        for name in ("empty", "text"):
            key, message = problem(dataset=str(tmp_path / f"{name}.tar"), streaming=streaming)
            assert key == "data.dataset" and "cannot be loaded (for every image, a tar holds" in message
        assert problem(dataset=str(tmp_path / "words.tar"), streaming=streaming) == (
            "data.image_column",
            "no column holds images; the columns are txt, __key__, __url__",
        )

    def test_columns(self, tmp_path, streaming):
        rows = {"picture": [picture(n) for n in range(4)], "mask": [picture(100 + n) for n in range(4)]}
        rows |= {"number": [3, 1, 0, 3], "ratio": [0.5] * 4}
        kinds = {"mask": datasets.Image(), "number": datasets.Value("int32"), "ratio": datasets.Value("float32")}
        path = write_parquet(tmp_path / "a.parquet", rows, **kinds)
        config = {"dataset": path, "streaming": streaming}
        assert problem(**config) == (
            "data.image_column",
            "several columns hold images; name one: picture, mask",
        )
        key, message = problem(**config, image_column="img")
        assert key == "data.image_column" and "'img'" in message and "picture, mask, number, ratio" in message
        key, message = problem(**config, image_column="number")
        assert key == "data.image_column" and "not images but Value('int32')" in message
        train, validation = load_images(DataConfig(**config, image_column="mask", label_column="number"))
        ids = {0: 0, 1: 1, 3: 3 if streaming else 2}  # a stream does not know which numbers occur
        assert sorted(read(train) + read(validation)) == [(100 + n, ids[label]) for n, label in enumerate([3, 1, 0, 3])]
        for column in ("no_such", "ratio"):
            key, message = problem(**config, image_column="mask", label_column=column)
            assert key == "data.label_column" and f"{column!r}" in message

    def test_several_columns_of_class_labels_ask_for_a_choice(self, tmp_path, streaming):
        rows = {"picture": [picture(1)] * 4, "fine": [0, 1, 0, 1], "coarse": [0, 0, 1, 1]}
        config = {"dataset": write_parquet(tmp_path / "a.parquet", rows, fine=AB, coarse=AB)}
        config |= {"streaming": streaming, "validation_fraction": 0.5}
        assert problem(**config)[1].endswith("name one: fine, coarse")
        train, _ = load_images(DataConfig(**config, label_column="coarse"))
        assert [label for _, label in read(train)] == ([1, 1] if streaming else [0, 1])

    def test_broken_and_empty_files(self, tmp_path, streaming):
        (tmp_path / "a.parquet").write_text("no parquet")
        key, message = problem(dataset=str(tmp_path / "a.parquet"), streaming=streaming)
        assert key == "data.dataset" and "a.parquet is not a parquet file" in message
        path = write_parquet(tmp_path / "b.parquet", {"picture": []})
        assert "a split without images" in problem(dataset=path, streaming=streaming)[1]


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "notes.doc").write_text("no images")
    key, message = problem(dataset=str(tmp_path / "notes.doc"))
    assert key == "data.dataset" and "all .tar or all lists of images (.csv" in message and "not .doc" in message


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", "nowhere.parquet", "nowhere/*.tar"])
def test_no_such_source(name):
    key, message = problem(dataset=name)
    assert key == "data.dataset" and f"received {name!r}; " in message


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_dataset_out_of_reach(streaming):
    key, message = problem(dataset="no-such-user/no-such-dataset", streaming=streaming)
    assert key == "data.dataset" and "there is no file or folder 'no-such-user/no-such-dataset', and" in message
    assert "cannot be loaded" in message and "a Hub dataset id" in message


def test_a_folder_is_opened_without_a_progress_bar(tmp_path, capsys):
    folder = write_folder(tmp_path, {f"{'ab'[n % 2]}/{n}.png": n for n in range(8)})
    datasets.enable_progress_bars()
    try:
        load_images(DataConfig(dataset=folder))
    finally:
        datasets.disable_progress_bars()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("streaming", [False, True])
def test_the_hub_way(tmp_path, monkeypatch, streaming):
    """Repositories that `datasets` opens; a local copy replaces the Hub."""
    monkeypatch.setattr("stage1_vqgan.data.sources.find_files", lambda config: None)
    for split, first in [("train", 0), ("test", 50)]:
        rows = {"picture": [picture(first + n) for n in range(8)], "y": [0, 1] * 4}
        write_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet", rows, y=AB)
    sizes = [{"name": split, "num_examples": 8, "num_bytes": 1} for split in ("train", "test")]
    card = yaml.safe_dump({"dataset_info": {"splits": sizes}})
    (tmp_path / "README.md").write_text(f"---\n{card}---\n")
    for validation_split, held_out in [("test", list(range(50, 58))), (None, [0, 1] if streaming else [0, 4])]:
        config = DataConfig(
            dataset=str(tmp_path), validation_split=validation_split, streaming=streaming, validation_fraction=0.25
        )
        train, validation = load_images(config)
        assert isinstance(train, ImageStream if streaming else ImageSource)
        assert values(validation) == held_out and sorted(values(train) + values(validation))[:8] == list(range(8))
        assert train.class_names == validation.class_names == ["a", "b"]
        if streaming:
            assert train.num_images == (8 if validation_split else 6)
    assert problem(dataset=str(tmp_path), train_split="all", streaming=streaming) == (
        "data.train_split",
        "received 'all'; the dataset has ['test', 'train']",
    )


class TestLabels:
    """Checks of label values, and of the validation labels against the training labels."""

    def write(self, folder, train, validation=None, kind=None):
        for name, labels in [("train", train), ("val", validation)]:
            if labels is not None:
                rows = {"picture": [picture(n) for n in range(len(labels))], "y": labels}
                write_parquet(folder / f"{name}.parquet", rows, y=kind or datasets.Value("int64"))
        return {"dataset": str(folder), "label_column": "y"}

    def test_plain_numbers_are_counted_before_the_split(self, tmp_path):
        config = self.write(tmp_path, [3] + [0] * 19)  # class 3 is only in the held-out images
        train, validation = load_images(DataConfig(**config, validation_fraction=0.1))
        assert train.class_names == validation.class_names == ["0", "3"]
        assert validation.labels.tolist() == [1, 0]

    def test_words_become_classes(self, tmp_path):
        config = self.write(tmp_path, ["dog", "ant", "dog", "cat"], ["cat", "dog"], datasets.Value("string"))
        train, validation = load_images(DataConfig(**config, validation_split="val"))
        assert train.class_names == validation.class_names == ["ant", "cat", "dog"]
        assert train.labels.tolist() == [2, 0, 2, 1] and validation.labels.tolist() == [1, 2]
        key, message = problem(**config, validation_split="val", streaming=True)
        assert key == "data.label_column" and "must be class numbers" in message

    @pytest.mark.parametrize(
        ("labels", "kind", "message"),
        [
            ([0, -1], None, "'y' holds -1; its values must be class numbers from 0 up"),
            (
                [0, 5],
                datasets.ClassLabel(names=["a", "b"]),
                "'y' holds 5; its values must be class numbers from 0 to 1",
            ),
            ([0, None], None, "1 of 2 rows of 'y' have no label; set data.use_labels to false"),
        ],
    )
    def test_wrong_values(self, tmp_path, monkeypatch, labels, kind, message):
        # ClassLabel refuses to write wrong numbers, so it is declared for a column of plain numbers
        config = self.write(tmp_path, labels)
        if kind is not None:
            file = tmp_path / "train.parquet"
            dataset = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "c"))
            dataset.info.features["y"] = kind
            dataset.to_parquet(file)
        key, found = problem(**config)
        assert key == "data.label_column" and message in found
        streamed = DataConfig(**config, streaming=True, validation_fraction=0.5)
        with pytest.raises(ConfigError, match="the stream holds the label"):
            for source in load_images(streamed):
                read(source)

    def test_validation_beyond_training(self, tmp_path):
        config = self.write(tmp_path, [0, 1, 1], [0, 2])
        assert problem(**config, validation_split="val")[1] == (
            "the validation split has classes that the training split lacks: 2"
        )

    def test_validation_without_labels(self, tmp_path):
        config = self.write(tmp_path, [0, 1], None, AB) | {"label_column": None}
        write_parquet(tmp_path / "val.parquet", {"picture": [picture(1)]})
        assert problem(**config, validation_split="val")[1] == (
            "'val' has no labels, but 'train' has; set data.use_labels to false to train without labels"
        )
        assert problem(**config, validation_split="val", streaming=True)[0] == "data.validation_split"
        train, validation = load_images(DataConfig(**config, validation_split="val", use_labels=False))
        assert train.labels is validation.labels is None
