"""The code store: what is read back is what was written, in any order, across shards and processes."""

import json
import pickle

import datasets
import numpy as np
import pytest

from configs import ConfigError
from stage2_prior import CodeStore, TokenLayout, code_store
from stage2_prior.code_store import code_dtype, shard_path, write_shard

ROWS, LENGTH = 10, 6


@pytest.fixture(params=[4, 5, 10, 100], ids="{} rows in a shard".format)
def shard_rows(request, monkeypatch):
    monkeypatch.setattr(code_store, "SHARD_ROWS", request.param)
    return request.param


def write_store(folder, shard_rows, num_codes=1000, with_labels=True):
    """A finished store of random codes; returns them and their labels."""
    rng = np.random.default_rng(0)
    codes = rng.integers(num_codes, size=(ROWS, LENGTH)).astype(code_dtype(num_codes))
    labels = rng.integers(5, size=ROWS) if with_labels else None
    for shard, start in enumerate(range(0, ROWS, shard_rows)):
        rows = slice(start, start + shard_rows)
        write_shard(shard_path(folder, "train", shard), codes[rows], labels[rows] if with_labels else None)
    layout = TokenLayout(num_codes, tuple("abcde"[: 5 * with_labels]), (2, 3), 4, "0123456789abcdef")
    manifest = {"token_layout": layout.to_dict(), "splits": {"train": {"images": ROWS, "rows": ROWS}}}
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
    write_shard(shard_path(tmp_path, "train", 0), highest, None)
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
