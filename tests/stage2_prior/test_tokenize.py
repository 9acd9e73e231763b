"""Making codes: they are the tokenizer's own, and an interrupted or repeated call ends in the same store."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import stage2_prior.code_store
import stage2_prior.tokenize
from configs import ConfigError
from stage1_vqgan import VQGANImageProcessor, VQGANModel, load_images
from stage2_prior import CodeStore
from stage2_prior.tokenize import tokenize

SHARD_ROWS = 700


@pytest.fixture
def small_shards(monkeypatch):
    for module in (stage2_prior.code_store, stage2_prior.tokenize):
        monkeypatch.setattr(module, "SHARD_ROWS", SHARD_ROWS)


@torch.no_grad()
def encode(folder, images):
    model = VQGANModel.from_pretrained(folder)
    return model.encode(VQGANImageProcessor.from_pretrained(folder)(images)["pixel_values"]).codes.flatten(1).numpy()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".arrow"}


def test_first_view_holds_the_codes_of_the_images_themselves(tiny_runs):
    for name, source in zip(("train", "validation"), load_images(tiny_runs.stage1.data), strict=True):
        codes, _ = CodeStore(tiny_runs.codes).split(name).read(np.arange(len(source)))
        np.testing.assert_array_equal(codes, encode(tiny_runs.vqgan, source.read(range(len(source)))))


def test_rows_are_views_of_all_images(tiny_runs):
    split = CodeStore(tiny_runs.codes).split("train")
    targets = load_digits().target[np.arange(1797) % 5 != 0]
    assert len(split) == 2 * len(targets)
    plain, augmented = (split.read(view * len(targets) + np.arange(len(targets))) for view in (0, 1))
    np.testing.assert_array_equal(plain[1], targets)
    np.testing.assert_array_equal(augmented[1], targets)
    changed = (plain[0] != augmented[0]).any(1).mean()
    assert changed > 0.9
    # a view shows its own image: it shares more codes with it than with the next one
    kept, by_chance = ((plain[0] == np.roll(augmented[0], shift, 0)).mean() for shift in (0, 1))
    assert kept > 1.2 * by_chance


def test_manifest_says_what_the_codes_are(tiny_runs):
    manifest = json.loads((tiny_runs.codes / "manifest.json").read_text())
    fingerprint = VQGANModel.from_pretrained(tiny_runs.vqgan).compute_fingerprint()
    assert manifest["splits"] == {"train": {"images": 1437, "rows": 2874}, "validation": {"images": 360, "rows": 360}}
    assert manifest["origin"] == {
        "tokenizer_fingerprint": fingerprint,
        "data": asdict(tiny_runs.stage2.data),
        "num_views": 2,
        "seed": 0,
        "images": [1437, 360],
        "class_names": [str(digit) for digit in range(10)],
    }
    layout = CodeStore(tiny_runs.codes).layout
    assert (layout.num_codes, layout.grid, layout.downsampling_factor) == (32, (4, 4), 4)
    assert layout.class_names == tuple("0123456789")
    assert layout.tokenizer_fingerprint == fingerprint
    assert manifest["seconds"] > 0


def test_a_second_call_does_nothing(tiny_runs):
    before = {path: path.stat().st_mtime_ns for path in tiny_runs.codes.iterdir()}
    tokenize(tiny_runs.stage2)
    assert {path: path.stat().st_mtime_ns for path in tiny_runs.codes.iterdir()} == before


def test_shards_and_batches_change_nothing(tiny_runs, tmp_path, small_shards, monkeypatch):
    store = tokenize(replace(tiny_runs.stage2, code_store=str(tmp_path), tokenize_batch_size=97))
    assert sorted(contents(tmp_path)) == [*(f"train-{n:05d}.arrow" for n in range(5)), "validation-00000.arrow"]
    sharded = store.split("train").read(np.arange(2874))
    monkeypatch.undo()
    whole = CodeStore(tiny_runs.codes).split("train").read(np.arange(2874))
    for one, other in zip(sharded, whole, strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_interrupted_store_is_completed(tiny_runs, tmp_path, small_shards):
    config = replace(tiny_runs.stage2, code_store=str(tmp_path))
    tokenize(config)
    straight = contents(tmp_path)
    for name in ("manifest.json", "train-00002.arrow", "validation-00000.arrow"):
        (tmp_path / name).unlink()
    (tmp_path / "train-00002.partial").write_bytes(b"half a shard")
    kept = (tmp_path / "train-00001.arrow").stat().st_mtime_ns
    tokenize(config)
    assert contents(tmp_path) == straight
    assert (tmp_path / "train-00001.arrow").stat().st_mtime_ns == kept
    assert len(CodeStore(tmp_path).split("train")) == 2874


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("key", ["num_views", "seed", "data", "tokenizer_fingerprint"])
def test_other_settings_are_refused(tiny_runs, tmp_path, key, finished):
    changes = {
        "num_views": {"num_views": 3},
        "seed": {"seed": 1},
        "data": {"data": replace(tiny_runs.stage2.data, use_labels=False)},
        "tokenizer_fingerprint": {"tokenizer": str(tmp_path / "other")},
    }[key]
    other = VQGANModel(VQGANModel.from_pretrained(tiny_runs.vqgan).config)
    other.config.fingerprint = None
    other.save_pretrained(tmp_path / "other")
    store = tmp_path / "codes"
    store.mkdir()
    for name in ("origin.json", "validation-00000.arrow", *(["manifest.json"] if finished else [])):
        (store / name).write_bytes((tiny_runs.codes / name).read_bytes())
    with pytest.raises(ConfigError, match=f"holds codes made with {key}"):
        tokenize(replace(tiny_runs.stage2, code_store=str(store), **changes))
    assert list(contents(store)) == ["validation-00000.arrow"]
