"""The code store returns the codes that were written, in any order, across shards and processes."""

import json
import pickle

import datasets
import numpy as np
import pytest

from configs import ConfigError
from stage1_vqgan import SkippedImage
from stage2_prior import CodeStore, TokenLayout
from stage2_prior.code_store import (
    CodeSplit,
    ShardNotes,
    code_dtype,
    images_per_shard,
    read_notes,
    shard_path,
    write_shard,
)

ROWS, LENGTH = 10, 6


@pytest.fixture(params=[4, 5, 10, 100], ids="{} rows in a shard".format)
def shard_rows(request):
    return request.param


def write_store(folder, shard_rows, num_codes=1000, with_labels=True):
    """A finished store of random codes; returns them and their labels."""
    rng = np.random.default_rng(0)
    codes = rng.integers(num_codes, size=(ROWS, LENGTH)).astype(code_dtype(num_codes))
    labels = rng.integers(5, size=ROWS) if with_labels else None
    sizes = []
    for shard, start in enumerate(range(0, ROWS, shard_rows)):
        rows = slice(start, start + shard_rows)
        shown = codes[rows]
        write_shard(shard_path(folder, "train", shard), shown, labels[rows] if with_labels else None, len(shown))
        sizes.append(len(shown))
    layout = TokenLayout(num_codes, tuple("abcde"[: 5 * with_labels]), (2, 3), 4, "0123456789abcdef")
    manifest = {"token_layout": layout.to_dict(), "splits": {"train": {"shard_rows": sizes}}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return codes, labels, layout


@pytest.mark.parametrize("with_labels", [True, False])
def test_rows_are_read_back_in_any_order(tmp_path, shard_rows, with_labels):
    codes, labels, layout = write_store(tmp_path, shard_rows, with_labels=with_labels)
    store = CodeStore(tmp_path)
    split = store.split("train")
    assert store.layout == layout and len(split) == ROWS
    for rows in ([3], [0, 1, 2], [9, 0, 4, 4, 5, 2], list(range(ROWS))):
        read_codes, read_labels = split.read(np.array(rows))
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
    for shard, (size, end) in enumerate(zip(sizes, np.cumsum(sizes), strict=True)):
        write_shard(shard_path(tmp_path, "train", shard), codes[end - size : end], None, 5)
    split = CodeSplit(tmp_path, "train", sizes)
    assert len(split) == 9
    for rows in (np.arange(9), np.array([8, 0, 2, 3, 6, 7]), np.array([3])):
        np.testing.assert_array_equal(split.read(rows)[0], codes[rows])


def test_a_shard_carries_what_it_was_made_from(tmp_path):
    path = shard_path(tmp_path, "train", 0)
    skipped = [SkippedImage(7, "a/7.png", "broken ☹"), SkippedImage(9, "9.png", "empty")]
    write_shard(path, np.zeros((4, 3), dtype=np.uint16), np.array([0, 6, 2, 0]), 6, skipped)
    assert read_notes(path) == ShardNotes(images=6, skipped=skipped, num_classes=7, rows=4)
    write_shard(path, np.zeros((0, 3), dtype=np.uint16), np.array([], dtype=np.int64), 1, skipped[:1])
    assert read_notes(path) == ShardNotes(images=1, skipped=skipped[:1], num_classes=0, rows=0)


@pytest.mark.parametrize(("num_views", "images"), [(1, 65536), (16, 4096), (10, 6553), (100_000, 1)])
def test_images_in_a_shard(num_views, images):
    assert images_per_shard(num_views) == images


def test_a_store_of_an_earlier_version_is_refused(tmp_path):
    write_store(tmp_path, ROWS)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["splits"]["train"]["shard_rows"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"code_store: .* earlier version; remove it"):
        CodeStore(tmp_path)
