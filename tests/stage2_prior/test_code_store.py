"""The code store returns the codes that were written, in any order, across shards and processes."""

import errno
import json
import pickle
import stat

import datasets
import numpy as np
import pyarrow as pa
import pytest

from configs import ConfigError
from configs.checksums import SEAL, Damaged
from configs.disk_space import DiskFull
from stage1_vqgan import SkippedImage
from stage2_prior import CodeStore, TokenLayout
from stage2_prior.code_store import CodeSplit, claim_folder, images_per_shard, shard_path
from stage2_prior.shards import NOTES_KEY, ShardNotes, check_shard, code_dtype, read_notes, write_shard
from tests.code_stores import LENGTH, ORIGIN, ROWS, write_shards, write_store
from tests.resealing import edit_manifest


@pytest.fixture(params=[4, 5, 10, 100], ids="{} rows in a shard".format)
def shard_rows(request):
    return request.param


@pytest.mark.parametrize("with_labels", [True, False])
def test_rows_are_read_back_in_any_order(tmp_path, shard_rows, with_labels):
    codes, labels, layout = write_store(tmp_path, shard_rows, with_labels=with_labels)
    store = CodeStore(tmp_path)
    split = store.split("train")
    assert store.layout == layout and len(split) == ROWS
    for rows in ([3], [0, 1, 2], [9, 0, 4, 4, 5, 2], list(range(ROWS))):
        read_codes, read_labels, _ = split.read(np.array(rows))
        np.testing.assert_array_equal(read_codes, codes[rows])
        if with_labels:
            np.testing.assert_array_equal(read_labels, labels[rows])
        else:
            assert read_labels is None


@pytest.mark.parametrize(("num_codes", "dtype"), [(2, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_the_smallest_type_that_holds_every_code(tmp_path, num_codes, dtype):
    highest = np.full((1, 3), num_codes - 1, dtype=code_dtype(num_codes))
    assert code_dtype(num_codes) == dtype and highest[0, 0] == num_codes - 1
    write_shard(shard_path(tmp_path, "train", 0), highest, None, 1)
    shard = datasets.Dataset.from_file(str(shard_path(tmp_path, "train", 0)))
    assert shard.features["codes"].feature.dtype == dtype
    assert shard["codes"][:] == highest.tolist()


def test_datasets_opens_a_shard(tmp_path):
    codes, labels, _ = write_store(tmp_path, ROWS)
    shard = datasets.Dataset.from_file(str(shard_path(tmp_path, "train", 0)))
    assert shard["codes"][:] == codes.tolist() and shard["label"][:] == labels.tolist()


def test_a_split_travels_to_other_processes(tmp_path, shard_rows):
    codes, _, _ = write_store(tmp_path, shard_rows)
    split = CodeStore(tmp_path).split("train")
    everything = np.arange(ROWS)
    split.read(everything)
    sent = pickle.dumps(split)
    np.testing.assert_array_equal(pickle.loads(sent).read(everything)[0], codes)
    np.testing.assert_array_equal(split.read(everything)[0], codes)


def test_an_unfinished_store_is_refused(tmp_path):
    write_store(tmp_path, ROWS)
    (tmp_path / "manifest.json").unlink()
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match=r"code_store: received .*; .*stage2_prior\.tokenize"):
            CodeStore(folder)


def test_shards_of_uneven_sizes_and_without_rows(tmp_path):
    codes = np.arange(27, dtype=np.uint16).reshape(9, 3)
    sizes = [0, 3, 0, 0, 4, 2, 0]
    write_shards(tmp_path, "train", codes, None, sizes)
    split = CodeSplit(tmp_path, "train", sizes, TokenLayout(27, (), (1, 3), 1, ""))
    assert len(split) == 9
    for rows in (np.arange(9), np.array([8, 0, 2, 3, 6, 7]), np.array([3])):
        np.testing.assert_array_equal(split.read(rows)[0], codes[rows])


def test_a_shard_carries_what_it_was_made_from(tmp_path):
    path = shard_path(tmp_path, "train", 0)
    skipped = [SkippedImage(7, "a/7.png", "broken ☹"), SkippedImage(9, "9.png", "empty")]
    for codes, labels, images, num_classes in (
        (np.zeros((4, 3), dtype=np.uint16), np.array([0, 6, 2, 0]), 6, 7),
        (np.zeros((0, 3), dtype=np.uint16), np.array([], dtype=np.int64), 1, 0),
    ):
        write_shard(path, codes, labels, images, skipped)
        notes = read_notes(path)
        assert notes == check_shard(path)
        assert notes == ShardNotes(path.name, images, skipped, num_classes, len(codes), notes.checksum)


@pytest.mark.parametrize(("num_views", "images"), [(1, 65536), (16, 4096), (10, 6553), (100_000, 1)])
def test_images_in_a_shard(num_views, images):
    assert images_per_shard(num_views) == images


def test_a_store_of_an_earlier_version_is_refused(tmp_path):
    write_store(tmp_path, ROWS)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != SEAL}))
    with pytest.raises(ConfigError, match=r"code_store: .*manifest\.json: its checksum is missing; .* earlier version"):
        CodeStore(tmp_path)


MANIFESTS = {
    "token_layout.num_codes: received '9'": lambda manifest: manifest["token_layout"].update(num_codes="9"),
    "token_layout: Field required": lambda manifest: manifest.pop("token_layout"),
    "splits.validation: Field required": lambda manifest: manifest["splits"].pop("validation"),
    "splits.train.shard_rows.1: .*than or equal to 0": lambda manifest: manifest["splits"]["train"].update(
        shard_rows=[5, -1]
    ),
    "splits.train.shard_rows.0: .*less than": lambda manifest: manifest["splits"]["train"].update(shard_rows=[10**30]),
    "origin.num_views: Field required": lambda manifest: manifest["origin"].pop("num_views"),
    "3 checksums for 2 shards": lambda manifest: manifest["splits"]["train"]["shard_checksums"].append(""),
    "5 rows of 6 codes .uint16. with labels; the manifest says 4 rows": lambda manifest: manifest["splits"][
        "train"
    ].update(shard_rows=[4, 6]),
    "lacks train-00002.arrow": lambda manifest: manifest["splits"]["train"]["shard_rows"].append(1),
    "holds train-00001.arrow, which the manifest does not list": lambda manifest: manifest["splits"]["train"].update(
        shard_rows=[5]
    ),
    "the manifest says 5 rows of 1,000,000,000,000 codes": lambda manifest: manifest["token_layout"].update(
        grid=[10**6, 10**6]
    ),
    "codes .uint16. with labels; .*codes .uint32.": lambda manifest: manifest["token_layout"].update(num_codes=10**9),
    "with labels; .* without labels": lambda manifest: manifest["token_layout"].update(class_names=[]),
    "holds codes from .* allowed are 0 to 99": lambda manifest: manifest["token_layout"].update(num_codes=100),
    "holds labels from 1 to 4; allowed are 0 to 0": lambda manifest: manifest["token_layout"].update(class_names=["a"]),
    "not the shard that the manifest lists": lambda manifest: manifest["splits"]["train"]["shard_checksums"].reverse(),
}


@pytest.mark.parametrize("message", MANIFESTS)
def test_a_manifest_that_does_not_fit_is_refused(tmp_path, message):
    write_store(tmp_path, 5)
    CodeStore(tmp_path)
    edit_manifest(tmp_path, MANIFESTS[message])
    with pytest.raises(ConfigError, match=rf"code_store: .*{message}"):
        CodeStore(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": ' * 100_000, "\udcff"], ids=len)
def test_json_that_is_none_names_its_file(tmp_path, content):
    write_store(tmp_path, ROWS)
    for name in ("manifest.json", "origin.json"):
        (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=r"code_store: .*manifest\.json: "):
        CodeStore(tmp_path)
    with pytest.raises(ConfigError, match=r"code_store: .*origin\.json: "):
        claim_folder(tmp_path, ORIGIN)


def test_an_edited_manifest_is_refused(tmp_path):
    write_store(tmp_path, ROWS)
    text = (tmp_path / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(text.replace('"b"', '"c"', 1))
    with pytest.raises(ConfigError, match=r"manifest\.json: the contents of this file have changed"):
        CodeStore(tmp_path)


def test_shards_that_are_missing_exchanged_or_damaged(tmp_path):
    write_store(tmp_path, 5)
    one, other, last = (tmp_path / f"{name}.arrow" for name in ("train-00000", "train-00001", "validation-00000"))
    whole, codes = {path: path.read_bytes() for path in (one, other, last)}, code_bytes(tmp_path)
    for changed, message in (
        ({other: None}, "lacks train-00001.arrow"),
        ({one: whole[other], other: whole[one]}, "train-00000.arrow: this is the shard train-00001.arrow, renamed"),
        ({last: whole[one]}, "validation-00000.arrow: this is the shard train-00000.arrow"),
        ({other: whole[other][:-200]}, "train-00001.arrow: this file cannot be read"),
        ({other: b""}, "train-00001.arrow: this file cannot be read"),
        (
            {other: flipped(whole[other], whole[other].index(codes))},
            "train-00001.arrow: this is not the",
        ),
        ({other: whole[other].replace(b"skipped", b"skippod")}, "train-00001.arrow: the contents of this file"),
    ):
        for path, content in changed.items():
            path.write_bytes(content) if content is not None else path.unlink()
        with pytest.raises(ConfigError, match=f"code_store: .*{message}.*copy the store again"):
            CodeStore(tmp_path)
        for path, content in whole.items():
            path.write_bytes(content)
    assert len(CodeStore(tmp_path).split("train")) == ROWS


def code_bytes(folder):
    """The codes of the second shard, as they stand in its file."""
    return CodeStore(folder).split("train").read(np.arange(5, ROWS))[0].tobytes()


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_an_interrupted_store_with_a_damaged_shard_is_not_continued(tmp_path):
    write_store(tmp_path, 5)
    (tmp_path / "origin.json").write_text(json.dumps(ORIGIN))
    codes = code_bytes(tmp_path)
    (tmp_path / "manifest.json").unlink()
    assert claim_folder(tmp_path, ORIGIN) == ROWS + 3
    path = shard_path(tmp_path, "train", 1)
    path.write_bytes(flipped(whole := path.read_bytes(), whole.index(codes)))
    with pytest.raises(
        ConfigError, match=r"train-00001\.arrow: the codes, labels or conditions of this file .*; remove it and run"
    ):
        claim_folder(tmp_path, ORIGIN)


SIX = pa.list_(pa.uint16(), LENGTH)
CODES = [[1] * LENGTH] * 5
LABELS = pa.array([0] * 5)
COLUMNS = {
    "uint32": {"codes": pa.array(CODES, pa.list_(pa.uint32(), LENGTH)), "label": LABELS},
    "int16": {"codes": pa.array(CODES, pa.list_(pa.int16(), LENGTH)), "label": LABELS},
    "7 codes": {"codes": pa.array([[1] * 7] * 5, pa.list_(pa.uint16(), 7)), "label": LABELS},
    "lists": {"codes": pa.array(CODES, pa.list_(pa.uint16())), "label": LABELS},
    "missing code": {"codes": pa.array([[1] * 5 + [None]] * 5, SIX), "label": LABELS},
    "missing list": {"codes": pa.array([*CODES[1:], None], SIX), "label": LABELS},
    "missing label": {"codes": pa.array(CODES, SIX), "label": pa.array([0, 1, None, 2, 3])},
    "no labels": {"codes": pa.array(CODES, SIX)},
    "int32 labels": {"codes": pa.array(CODES, SIX), "label": LABELS.cast(pa.int32())},
    "dictionary": {"codes": pa.array(CODES, SIX), "label": LABELS.dictionary_encode()},
    "other order": {"label": LABELS, "codes": pa.array(CODES, SIX)},
    "another column": {"codes": pa.array(CODES, SIX), "label": LABELS, "more": LABELS},
    "fewer rows": {"codes": pa.array(CODES[:4], SIX), "label": LABELS[:4]},
    "high codes": {"codes": pa.array([[1000] * LENGTH] * 5, SIX), "label": LABELS},
    "negative labels": {"codes": pa.array(CODES, SIX), "label": pa.array([-1] * 5)},
    "no columns": {},
    "compressed": {"codes": pa.array(CODES, SIX), "label": LABELS},
    "two batches": {"codes": pa.array(CODES, SIX), "label": LABELS},
    "no batch": {"codes": pa.array(CODES, SIX), "label": LABELS},
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_columns_of_another_form_are_refused(tmp_path, kind):
    write_store(tmp_path, 5)
    path = shard_path(tmp_path, "train", 1)
    metadata = {NOTES_KEY: pa.ipc.open_stream(path.read_bytes()).schema.metadata[NOTES_KEY]}
    batch = pa.RecordBatch.from_pydict(COLUMNS[kind], metadata=metadata)
    options = pa.ipc.IpcWriteOptions(compression="lz4" if kind == "compressed" else None)
    with pa.ipc.new_stream(path, batch.schema, options=options) as writer:
        for _ in range({"two batches": 2, "no batch": 0}.get(kind, 1)):
            writer.write_batch(batch)
    with pytest.raises(ConfigError, match=r"code_store: .*train-00001\.arrow: "):
        CodeStore(tmp_path)


def test_a_shard_of_another_form_is_refused_in_a_worker_too(tmp_path):
    codes, labels, _ = write_store(tmp_path, ROWS)
    split = pickle.dumps(CodeStore(tmp_path).split("train"))
    write_shard(shard_path(tmp_path, "train", 0), codes[:5], labels[:5], 5)
    with pytest.raises(Damaged, match=r"train-00000\.arrow: holds 5 rows .*; the manifest says 10 rows"):
        pickle.loads(split).read(np.array([9]))


def test_a_full_disk_leaves_nothing_and_names_the_file(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = shard_path(tmp_path, "train", 0)
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(DiskFull, match=r"train-00000\.arrow could not be written: .* are free"):
        write_shard(path, np.zeros((4, 3), dtype=np.uint16), None, 4)
    assert not list(tmp_path.iterdir())


def test_others_may_read_a_shard_as_the_umask_says(tmp_path):
    path = shard_path(tmp_path, "train", 0)
    write_shard(path, np.zeros((4, 3), dtype=np.uint16), None, 4)
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
