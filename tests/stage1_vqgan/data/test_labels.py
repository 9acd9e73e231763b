"""Class names and ids: their order and form, where labels come from, and what is said about them."""

import io
import json
import logging
import tarfile
import unicodedata

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs import ConfigError
from stage1_vqgan import DataConfig, load_images
from stage1_vqgan.data.labels import in_order, numbered
from tests.image_files import picture, read, write_folder, write_parquet

pytestmark = pytest.mark.usefixtures("datasets_cache")

COMPOSED = "caf\u00e9"
DECOMPOSED = unicodedata.normalize("NFD", COMPOSED)


def problem(**settings):
    with pytest.raises(ConfigError) as caught:
        load_images(DataConfig(**settings))
    (found,) = caught.value.problems
    return found.key, found.message


def named(dataset, **settings):
    """{value of an image: its class name} over both splits, and the class names."""
    pair = load_images(DataConfig(dataset=str(dataset), validation_fraction=0.25, **settings))
    names = pair[0].class_names
    assert pair[1].class_names == names
    rows = [row for source in pair for row in read(source)]
    return {value: label if label is None or names is None else names[label] for value, label in rows}, names


def encoded(value):
    buffer = io.BytesIO()
    picture(value).save(buffer, "PNG")
    return buffer.getvalue()


class TestNames:
    def test_whole_numbers_go_by_value_before_words(self):
        assert in_order(["10", "b", "9", "-1", "007", "a", "1.5", "10"]) == ["-1", "007", "9", "10", "1.5", "a", "b"]

    @pytest.mark.parametrize("labels", [[70, 3, 900, 3], ["70", "3", "900", "3"], np.array([70, 3, 900, 3], np.uint16)])
    def test_ids_count_the_labels_that_occur(self, labels):
        ids, names = numbered(labels)
        assert ids.tolist() == [1, 0, 2, 0] and ids.dtype == np.int64 and names == ["3", "70", "900"]

    def test_one_class_in_two_unicode_forms(self):
        ids, names = numbered([DECOMPOSED, "tea", COMPOSED])
        assert ids.tolist() == [0, 1, 0] and names == [COMPOSED, "tea"]

    def test_folders(self, tmp_path):
        layout = {f"train/{name}/{n}.png": 20 * n + i for i, name in enumerate(["2", "10", "9"]) for n in range(3)}
        layout |= {f"train/{form}/{n}.png": 200 + n for n, form in enumerate([COMPOSED, DECOMPOSED])}
        found, names = named(write_folder(tmp_path, layout | {f"val/{DECOMPOSED}/1.png": 99}))
        assert names == ["2", "9", "10", COMPOSED] and found[0] == "2" and found[21] == "10"
        assert found[200] == found[201] == COMPOSED
        _, validation = load_images(DataConfig(dataset=str(tmp_path), validation_split="val"))
        assert read(validation) == [(99, 3)]

    @pytest.mark.parametrize("streaming", [False, True])
    def test_declared_names(self, tmp_path, streaming):
        kind = datasets.ClassLabel(names=["10", "9", DECOMPOSED])
        path = write_parquet(
            tmp_path / "a.parquet", {"picture": [picture(n) for n in range(8)], "y": [0, 2] * 4}, y=kind
        )
        found, names = named(path, streaming=streaming)
        assert names == ["10", "9", COMPOSED] and found[0] == "10" and found[1] == COMPOSED  # their ids are kept

    def test_declared_names_that_are_one(self, tmp_path):
        kind = datasets.ClassLabel(names=[COMPOSED, DECOMPOSED])
        path = write_parquet(tmp_path / "a.parquet", {"picture": [picture(1)] * 4, "y": [0, 1] * 2}, y=kind)
        assert "differ only in their Unicode form" in problem(dataset=path)[1]


class TestWarnings:
    def test_classes_without_images(self, tmp_path, caplog):
        kind = datasets.ClassLabel(names=["ant", "bee", "cat"])
        path = write_parquet(tmp_path / "a.parquet", {"picture": [picture(1)] * 8, "y": [0, 2] * 4}, y=kind)
        load_images(DataConfig(dataset=path))
        assert "1 of the 3 classes have no training images, so a prior cannot learn them: bee" in caplog.text

    def test_numbers_that_are_not_their_ids(self, tmp_path, caplog):
        rows = {"picture": [picture(1)] * 9, "label": [3, 70, 900] * 3}
        load_images(DataConfig(dataset=write_parquet(tmp_path / "a.parquet", rows, label=datasets.Value("int64"))))
        assert "ask for them by name: 3 (id 0), 70 (id 1), 900 (id 2)" in caplog.text

    def test_captions(self, tmp_path, caplog):
        rows = {"picture": [picture(n) for n in range(20)], "label": [f"a picture of {n}" for n in range(20)]}
        load_images(DataConfig(dataset=write_parquet(tmp_path / "a.parquet", rows, label=datasets.Value("string"))))
        assert (
            "19 training images have 19 different labels; if they are captions, set data.use_labels to false"
            in caplog.text
        )

    def test_nothing_is_said_of_usual_classes(self, tmp_path, caplog):
        folder = write_folder(tmp_path, {f"{kind}/{n}.png": n for kind in range(12) for n in range(3)})
        with caplog.at_level(logging.WARNING):
            load_images(DataConfig(dataset=folder))
        assert not caplog.records


class TestFolderWords:
    """What is said of folders that may mean something else."""

    @pytest.mark.parametrize(
        ("layout", "words"),
        [
            (["cat/siamese/1", "cat/2", "dog/3"], "a class is a whole folder, with the folders in it (cat/siamese)"),
            (["all/cat/1", "all/dog/2"], "if its folders are classes (all/cat, all/dog), set data.dataset to "),
            (["cat/1", "dog/2", "val/3"], "val counts as a class, because other folders there are no splits"),
            (["train/cat/1", "train/dog/2", "val/cat/3"], "the splits val are not used; data.validation_split names"),
            (["Train/cat/1", "Train/dog/2", "VAL/cat/3"], "the splits val are not used; data.validation_split names"),
        ],
    )
    def test_layouts(self, tmp_path, caplog, layout, words):
        load_images(DataConfig(dataset=write_folder(tmp_path, {f"{name}.png": 1 for name in layout})))
        assert words in caplog.text

    def test_a_list_with_another_name(self, tmp_path, caplog):
        folder = write_folder(tmp_path, {f"{n}.png": n for n in range(4)})
        (tmp_path / "labels.csv").write_text("file_name,label\n")
        load_images(DataConfig(dataset=folder))
        assert (
            "a list of labels among these files is read only if its name is metadata.csv or metadata.jsonl"
            in caplog.text
        )


class TestColumns:
    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("kind", ["int8", "uint64", "int64"])
    def test_plain_numbers(self, tmp_path, kind, streaming):
        rows = {"picture": [picture(n) for n in range(12)], "label": [n % 3 for n in range(12)]}
        path = write_parquet(tmp_path / "a.parquet", rows, label=datasets.Value(kind))
        found, _ = named(path, streaming=streaming)
        assert {value: int(label) for value, label in found.items()} == {n: n % 3 for n in range(12)}

    @pytest.mark.parametrize("form", ["string", "large_string", "string_view", "dictionary"])
    def test_words_and_bytes_in_every_arrow_type(self, tmp_path, form):
        words = pa.array(["bee", "ant"] * 4)
        kinds = {"large_string": pa.large_binary(), "string_view": pa.binary_view()}
        words = words.dictionary_encode() if form == "dictionary" else words.cast(getattr(pa, form)())
        images = pa.array([encoded(n) for n in range(8)], kinds.get(form, pa.binary()))
        pq.write_table(pa.table({"image": images, "label": words}), tmp_path / "a.parquet")
        found, names = named(tmp_path / "a.parquet")
        assert names == ["ant", "bee"] and found == {n: ["bee", "ant"][n % 2] for n in range(8)}
        streamed = load_images(DataConfig(dataset=str(tmp_path / "a.parquet"), use_labels=False, streaming=True))
        assert sorted(value for source in streamed for value, _ in read(source)) == list(range(8))

    def test_columns_that_may_be_labels_are_named(self, tmp_path, caplog):
        rows = {"picture": [picture(1)] * 4, "kind": [1, 2] * 2, "size": [0.5] * 4, "text": ["a"] * 4}
        kinds = {"kind": "int64", "size": "float32", "text": "string"}
        path = write_parquet(
            tmp_path / "a.parquet", rows, **{name: datasets.Value(kind) for name, kind in kinds.items()}
        )
        assert not load_images(DataConfig(dataset=path))[0].has_labels
        assert "if one of the columns kind, text holds classes, name it: data.label_column" in caplog.text

    def test_other_types_are_refused_by_name(self, tmp_path):
        rows = {"picture": [picture(1)] * 4, "label": [0.5] * 4}
        path = write_parquet(tmp_path / "a.parquet", rows, label=datasets.Value("float32"))
        key, message = problem(dataset=path)
        assert key == "data.label_column" and "'label' holds Value('float32')" in message
        assert "data.use_labels" in message


def write_list(path, rows):
    """A list as CSV, TSV, JSON lines or lines of text."""
    head = list(rows[0])
    lines = {
        ".csv": lambda: [",".join(map(str, values)) for values in [head, *(row.values() for row in rows)]],
        ".tsv": lambda: ["\t".join(map(str, values)) for values in [head, *(row.values() for row in rows)]],
        ".jsonl": lambda: [json.dumps(row) for row in rows],
        ".txt": lambda: [" ".join(map(str, row.values())) for row in rows],
    }[path.suffix]()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


class TestLists:
    @pytest.mark.parametrize("kind", ["csv", "jsonl"])
    def test_metadata_beside_the_images(self, tmp_path, kind, caplog):
        folder = write_folder(tmp_path, {f"images/{n}.png": n for n in range(9)})
        rows = [{"file_name": f"images/{n}.png", "label": [20, 3][n % 2]} for n in range(8)]
        write_list(tmp_path / f"metadata.{kind}", rows)
        found, names = named(folder)
        assert names == ["3", "20"] and found == {n: ["20", "3"][n % 2] for n in range(8)}
        assert "left out, because no metadata file lists them: 1 image" in caplog.text

    def test_metadata_of_splits(self, tmp_path):
        layout = {f"{split}/{n}.png": n + 50 * (split == "test") for split in ("train", "test") for n in range(4)}
        folder = write_folder(tmp_path, layout)
        for split in ("train", "test"):
            rows = [{"file_name": f"{n}.png", "kind": "ab"[n % 2], "text": "x"} for n in range(4)]
            write_list(tmp_path / split / "metadata.csv", rows)
        pair = load_images(DataConfig(dataset=folder, label_column="kind", validation_split="test"))
        assert [read(source) for source in pair] == [[(n + m, n % 2) for n in range(4)] for m in (0, 50)]
        assert not load_images(DataConfig(dataset=folder))[0].has_labels
        assert "the columns are image, kind, text" in problem(dataset=folder, label_column="style")[1]

    def test_metadata_of_files_that_are_missing(self, tmp_path):
        folder = write_folder(tmp_path, {f"{n}.png": n for n in range(4)})
        write_list(tmp_path / "metadata.csv", [{"file_name": "../secret.png", "label": 1}])
        key, message = problem(dataset=folder)
        assert key == "data.dataset" and "names 1 images that the folder does not hold" in message

    @pytest.mark.parametrize("kind", ["txt", "tsv", "csv", "jsonl"])
    def test_a_list_as_the_data_set(self, tmp_path, kind):
        write_folder(tmp_path / "my images", {f"{n}.png": n for n in range(8)})
        rows = [{"file_name": f"my images/{n}.png", "label": ["dog", "cat"][n % 2]} for n in range(8)]
        found, names = named(write_list(tmp_path / f"list.{kind}", rows))
        assert names == ["cat", "dog"] and found == {n: ["dog", "cat"][n % 2] for n in range(8)}

    def test_lists_of_splits_and_of_paths_alone(self, tmp_path):
        write_folder(tmp_path / "my images", {f"{n}.png": n for n in range(8)})
        for split, numbers in [("train", range(5)), ("val", range(5, 8))]:
            write_list(tmp_path / f"{split}.txt", [{"file_name": f"my images/{n}.png"} for n in numbers])
        pair = load_images(DataConfig(dataset=str(tmp_path / "*.txt"), validation_split="val"))
        assert [read(source) for source in pair] == [[(n, None) for n in range(5)], [(n, None) for n in range(5, 8)]]

    @pytest.mark.parametrize(
        ("name", "text", "words"),
        [
            ("a.txt", "", "lists no images"),
            ("a.txt", "x.png 0\ny.png\n", "line 2: holds 'y.png'; a line must be 'path label'"),
            ("a.txt", "x.png 0\nnot_here.png 0\n", "files that do not exist, 1 of the first 2: "),
            ("a.txt", "x.png 0\nx.png 1\n", "line 2: x.png is in the list twice"),
            ("a.csv", "path,label\nx.png,0\n", "line 2: names no image; it needs a column file_name, not"),
            ("a.csv", "file_name,label\nx.png,0,1\n", "line 2: has more values than there are columns"),
            ("a.jsonl", '{"file_name": "x.png"}\n{"file\n', "line 2: is not JSON"),
            ("a.jsonl", "[1]\n", "line 1: is not a JSON object"),
        ],
    )
    def test_malformed_lists(self, tmp_path, name, text, words):
        write_folder(tmp_path, {"x.png": 1, "z.png": 1})
        (tmp_path / name).write_text(text)
        key, message = problem(dataset=str(tmp_path / name))
        assert key == "data.dataset" and words in message and name in message


class TestSaved:
    """Folders of `save_to_disk`."""

    def rows(self, *numbers):
        kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
        columns = {"image": [picture(n) for n in numbers], "label": [n % 2 for n in numbers]}
        return datasets.Dataset.from_dict(columns, features=kinds)

    def test_one_split(self, tmp_path):
        self.rows(*range(8)).save_to_disk(tmp_path / "data")
        found, names = named(tmp_path / "data")
        assert names == ["x", "y"] and found == {n: "xy"[n % 2] for n in range(8)}

    def test_several_splits(self, tmp_path):
        splits = {"train": self.rows(1, 2, 3), "test": self.rows(50, 51)}
        datasets.DatasetDict(splits).save_to_disk(tmp_path / "data")
        pair = load_images(DataConfig(dataset=str(tmp_path / "data"), validation_split="test"))
        assert [read(source) for source in pair] == [[(1, 1), (2, 0), (3, 1)], [(50, 0), (51, 1)]]
        assert "the dataset has ['test', 'train']" in problem(dataset=str(tmp_path / "data"), train_split="all")[1]

    def test_a_damaged_folder(self, tmp_path):
        self.rows(*range(8)).save_to_disk(tmp_path / "data")
        next((tmp_path / "data").glob("*.arrow")).write_bytes(b"")
        key, message = problem(dataset=str(tmp_path / "data"))
        assert key == "data.dataset" and "cannot be loaded" in message


def write_members(path, samples):
    """A tar of files, given as lists of (name, content)."""
    with tarfile.open(path, "w") as tar:
        for name, content in [member for sample in samples for member in sample]:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return str(path)


class TestTars:
    WORDS = ["dog", "cat"]

    @pytest.mark.parametrize(
        "name",
        ["{:03}.{}", "img.v1.{:03}.{}", "./v1.0/{:03}.{}", "2024.01.{:03}.{}", "a{:03}.front.{}", "x.{:03}/scan.v2.{}"],
    )
    def test_dots_in_names(self, tmp_path, name):
        samples = [[(name.format(n, "png"), encoded(n)), (name.format(n, "cls"), b" %d\n" % (n % 3))] for n in range(9)]
        for split in ("train", "val"):
            write_members(tmp_path / f"{split}.tar", samples)
        streams = load_images(DataConfig(dataset=str(tmp_path), validation_split="val", streaming=True))
        assert read(streams[0]) == read(streams[1]) == [(n, n % 3) for n in range(9)]
        assert named(tmp_path / "train.tar")[0] == {n: str(n % 3) for n in range(9)}

    def test_class_words(self, tmp_path):
        path = write_members(
            tmp_path / "a.tar",
            [[(f"{n}.png", encoded(n)), (f"{n}.cls", self.WORDS[n % 2].encode())] for n in range(8)],
        )
        found, names = named(path)
        assert names == ["cat", "dog"] and found == {n: self.WORDS[n % 2] for n in range(8)}
        key, message = problem(dataset=path, streaming=True)
        assert key == "data.label_column" and "'cls', which holds 'dog'" in message and "data.streaming" in message

    def test_labels_in_json(self, tmp_path, caplog):
        def member(n):
            return json.dumps({"label": n % 3, "kind": self.WORDS[n % 2]}).encode()

        path = write_members(
            tmp_path / "a.tar", [[(f"{n}.png", encoded(n)), (f"{n}.json", member(n))] for n in range(9)]
        )
        assert named(path)[0] == {n: str(n % 3) for n in range(9)}
        assert named(path, label_column="json.kind")[0] == {n: self.WORDS[n % 2] for n in range(9)}
        assert "9 of 9 rows of 'json.size' have no label" in problem(dataset=path, label_column="json.size")[1]

    def test_json_without_labels(self, tmp_path, caplog):
        path = write_members(
            tmp_path / "a.tar", [[(f"{n}.png", encoded(n)), (f"{n}.json", b'{"y": 1}')] for n in range(9)]
        )
        assert not load_images(DataConfig(dataset=path))[0].has_labels
        assert "no key of the JSON files is named label; one of y may be: data.label_column json.KEY" in caplog.text

    def test_images_of_several_extensions(self, tmp_path):
        samples = [[(f"{n}.{'png' if n % 2 else 'PPM'}", encoded(n)), (f"{n}.cls", b"%d" % (n % 2))] for n in range(8)]
        assert named(write_members(tmp_path / "a.tar", samples))[0] == {n: str(n % 2) for n in range(8)}

    def test_a_field_that_is_there_twice(self, tmp_path):
        path = write_members(tmp_path / "a.tar", [[("1.png", encoded(1)), ("1.png", encoded(2))]])
        assert "holds two files 1.png" in problem(dataset=path)[1]
