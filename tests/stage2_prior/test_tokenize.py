"""Writing the code store: the codes are those of the tokenizer; interrupted or repeated calls give the same store."""

import itertools
import json
import shutil
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import stage2_prior.code_store
import stage2_prior.tokenization
from configs import ConfigError
from stage1_vqgan import DataConfig, VQGANImageProcessor, VQGANModel, decode, fingerprint_of_images, load_images
from stage2_prior import CodeStore
from stage2_prior.shards import check_shard
from stage2_prior.tokenization import tokenize, tokenize_split
from stage2_prior.training.run import check_codes
from tests.devices import DEVICE, assert_same_codes
from tests.image_files import picture, write_folder, write_parquet
from tests.slow import few

SHARD_ROWS = 700


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(stage2_prior.code_store, "SHARD_ROWS", SHARD_ROWS)


@torch.no_grad()
def encode(folder, images):
    model = VQGANModel.from_pretrained(folder).to(DEVICE)
    pixels = VQGANImageProcessor.from_pretrained(folder)(images)["pixel_values"]
    return model.encode(pixels.to(DEVICE)).codes.flatten(1).cpu().numpy()


def pictures(source):
    return [decode(image) for image in source.encoded(range(len(source)))]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".arrow"}


def test_first_view_holds_the_codes_of_the_images_themselves(tiny_runs):
    for name, source in zip(("train", "validation"), load_images(tiny_runs.stage1.data), strict=True):
        codes, _ = CodeStore(tiny_runs.codes).split(name).read(np.arange(len(source)))[:2]
        assert_same_codes(codes, encode(tiny_runs.vqgan, pictures(source)))


def test_rows_are_views_of_all_images(tiny_runs):
    split = CodeStore(tiny_runs.codes).split("train")
    targets = load_digits().target[np.arange(1797) % 5 != 0]
    assert len(split) == 2 * len(targets)
    plain, augmented = (split.read(view * len(targets) + np.arange(len(targets)))[:2] for view in (0, 1))
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
    checksums = {name: manifest["splits"][name].pop("shard_checksums") for name in ("train", "validation")}
    assert checksums == {
        name: [check_shard(tiny_runs.codes / f"{name}-00000.arrow").checksum] for name in ("train", "validation")
    }
    assert manifest["splits"] == {
        "train": {"images": 1437, "rows": 2874, "shard_rows": [2874], "skipped": []},
        "validation": {"images": 360, "rows": 360, "shard_rows": [360], "skipped": []},
    }
    train_labels = load_digits().target[np.arange(1797) % 5 != 0]
    assert manifest["token_layout"]["class_counts"] == np.bincount(train_labels).tolist()
    assert manifest["origin"] == {
        "tokenizer_fingerprint": fingerprint,
        "data": tiny_runs.stage2.data.identity(),
        "num_views": 2,
        "seed": 0,
        "images": [1437, 360],
        "fingerprint_of_images": [fingerprint_of_images(source, 100) for source in load_images(tiny_runs.stage2.data)],
        "class_names": [str(digit) for digit in range(10)],
        "image_size": [16, 16],
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


@pytest.mark.parametrize("recorded", few([[16, 16], None], None))
def test_the_size_of_the_tokenizer_may_be_written_out(tiny_runs, tmp_path, recorded):
    """Stores of earlier versions record null if the size was not given."""
    codes = shutil.copytree(tiny_runs.codes, tmp_path / "codes")
    origin = json.loads((codes / "origin.json").read_text()) | {"image_size": recorded}
    (codes / "origin.json").write_text(json.dumps(origin))
    for size in (None, 16, [16, 16]):
        config = replace(tiny_runs.stage2, code_store=str(codes), image_size=size)
        check_codes(config, tokenize(config))
    other = replace(tiny_runs.stage2, code_store=str(codes), image_size=32)
    with pytest.raises(ConfigError, match=r"holds codes with image_size \[16, 16\], but image_size is now \[32, 32\]"):
        tokenize(other)
    with pytest.raises(ConfigError, match=r"image_size: .* was written with \[16, 16\], but the .* has \[32, 32\]"):
        check_codes(other, CodeStore(codes))


@pytest.mark.slow
def test_shards_and_batches_change_nothing(tiny_runs, tmp_path, small_shards, monkeypatch):
    store = tokenize(replace(tiny_runs.stage2, code_store=str(tmp_path), tokenize_batch_size=97))
    assert sorted(contents(tmp_path)) == [*(f"train-{n:05d}.arrow" for n in range(5)), "validation-00000.arrow"]
    sharded = store.split("train").read(np.arange(2874))[:2]
    whole = CodeStore(tiny_runs.codes).split("train").read(np.arange(2874))[:2]
    # within a shard of 350 images all of view 0, then all of view 1
    firsts = range(0, 1437, SHARD_ROWS // 2)
    images = [np.arange(first, min(first + SHARD_ROWS // 2, 1437)) for first in firsts]
    order = np.concatenate([view * 1437 + numbers for numbers in images for view in (0, 1)])
    for one, other in zip(sharded, whole, strict=True):
        np.testing.assert_array_equal(one, other[order])


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


def test_a_configuration_made_in_python_is_checked(tiny_runs, tmp_path):
    config = replace(tiny_runs.stage2, code_store=str(tmp_path / "codes"), num_views=-4)
    with pytest.raises(ConfigError, match="num_views: received -4"):
        tokenize(config)
    assert not (tmp_path / "codes").exists()


@pytest.mark.parametrize(
    ("key", "finished"),
    few(
        itertools.product(["num_views", "seed", "data", "tokenizer_fingerprint"], [True, False]),
        ("seed", False),
        ("data", True),
        ("tokenizer_fingerprint", False),
    ),
)
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
    with pytest.raises(ConfigError, match=f"holds codes with {key}"):
        tokenize(replace(tiny_runs.stage2, code_store=str(store), **changes))
    assert list(contents(store)) == ["validation-00000.arrow"]


@pytest.mark.parametrize("finished", [True, False])
def test_other_images_in_the_same_files_are_refused(tiny_runs, tmp_path, finished):
    layout = {f"{split}/{number}.png": number for split in ("train", "validation") for number in range(4)}
    data = DataConfig(dataset=write_folder(tmp_path / "images", layout), validation_split="validation")
    config = replace(tiny_runs.stage2, data=data, num_views=1, code_store=str(tmp_path / "codes"))
    before = contents(tokenize(config).folder)
    if not finished:
        (tmp_path / "codes" / "manifest.json").unlink()
    write_folder(tmp_path / "images", {"validation/2.png": 200})
    with pytest.raises(ConfigError, match="holds codes with fingerprint_of_images"):
        tokenize(config)
    origin = json.loads((tmp_path / "codes" / "origin.json").read_text())
    del origin["fingerprint_of_images"]  # stores of earlier versions have none
    (tmp_path / "codes" / "origin.json").write_text(json.dumps(origin))
    assert contents(tokenize(config).folder) == before


IMAGES, BROKEN = 23, (3, 4, 11)


@pytest.fixture
def packed(tiny_runs, tmp_path, monkeypatch, datasets_cache):
    """Settings of a store of a few parquet files with broken images; 2 views, 4 images in a shard."""
    monkeypatch.setattr(stage2_prior.code_store, "SHARD_ROWS", 8)
    rng = np.random.default_rng(0)
    rows = [Image.fromarray(rng.integers(0, 256, (20, 20), dtype=np.uint8)) for _ in range(IMAGES)]
    encoded = [datasets.Image().encode_example(image) for image in rows]
    for number in BROKEN:
        cut_short = encoded[number]["bytes"][:200]
        encoded[number] = {"path": None if number == 11 else f"{number}.png", "bytes": cut_short}
    for file in range(3):
        part = slice(file * 8, (file + 1) * 8)
        labels = [number % 3 for number in range(IMAGES)][part]
        kind = datasets.Value("int64")
        write_parquet(tmp_path / "data" / f"train-{file}.parquet", {"picture": encoded[part], "y": labels}, y=kind)
    write_parquet(tmp_path / "data" / "val.parquet", {"picture": encoded[-2:], "y": [0, 2]}, y=kind)

    def make(name, streaming=False, limit=0.2, **changes):
        data = DataConfig(
            dataset=str(tmp_path / "data"),
            validation_split="val",
            label_column="y",
            streaming=streaming,
            augmentation=tiny_runs.stage2.data.augmentation,
        )
        data.max_skipped_fraction = limit
        settings = {"code_store": str(tmp_path / name), "tokenize_batch_size": 3, **changes}
        return replace(tiny_runs.stage2, data=data, **settings)

    return make


def test_broken_images_have_no_rows_and_are_recorded(packed, tiny_runs):
    config = packed("codes")
    store = tokenize(config)
    train = store.manifest["splits"]["train"]
    assert train["images"] == IMAGES and train["rows"] == 2 * (IMAGES - len(BROKEN)) == sum(train["shard_rows"])
    assert train["shard_rows"] == [6, 6, 6, 8, 8, 6]
    assert [(image["image"], image["name"]) for image in train["skipped"]] == [
        (3, "3.png"),
        (4, "4.png"),
        (11, "image 11"),
    ]
    assert all(image["reason"] for image in train["skipped"])
    # view 0 of every shard's good images, in order
    good = [number for number in range(IMAGES) if number not in BROKEN]
    source, _ = load_images(config.data)
    plain = encode(tiny_runs.vqgan, [decode(image) for image in source.encoded(good)])
    ends = np.cumsum([0, *train["shard_rows"]])
    rows = np.concatenate([np.arange(a, (a + b) // 2) for a, b in pairwise(ends)])
    codes, labels = store.split("train").read(rows)[:2]
    assert_same_codes(codes, plain, resized=True)
    np.testing.assert_array_equal(labels, np.array(good) % 3)
    assert len(store.split("train")) == train["rows"] and store.layout.class_names == ("0", "1", "2")


@pytest.mark.parametrize("streaming", few([False, True], True))
def test_one_store_whoever_makes_it(packed, streaming):
    straight = tokenize(packed("straight"))
    other = packed("other", streaming, dataloader_num_workers=2)
    store = tokenize(other)
    assert contents(store.folder) == contents(straight.folder)
    assert store.manifest["splits"] == straight.manifest["splits"] and store.layout == straight.layout

    # processes 1 and 2 of 3 first, then process 0 alone, which finds their shards
    shared = packed("shared", streaming)
    model = VQGANModel.from_pretrained(shared.tokenizer).to(DEVICE)
    (straight.folder.parent / "shared").mkdir()
    for rank in (2, 1):
        place = SimpleNamespace(process_index=rank, num_processes=3, is_main_process=False, device=DEVICE)
        train, validation = load_images(shared.data)
        assert tokenize_split(shared, place, model, "train", train, 2) == 6
        assert tokenize_split(shared, place, model, "validation", validation, 1) == 1
    made = {f"train-{shard:05d}.arrow" for shard in (1, 2, 4, 5)}
    assert set(contents(straight.folder.parent / "shared")) == made
    origin = json.loads((store.folder / "origin.json").read_text())
    (straight.folder.parent / "shared" / "origin.json").write_text(json.dumps(origin))
    assert contents(tokenize(shared).folder) == contents(straight.folder)


@pytest.mark.slow
def test_a_store_is_finished_after_an_interruption_anywhere(packed, monkeypatch):
    straight = contents(tokenize(packed("straight", streaming=True)).folder)
    write = stage2_prior.tokenization.write_shard
    for stop in range(len(straight)):
        config, written = packed(f"cut{stop}", streaming=True), []

        def cut(path, *args, written=written, stop=stop):
            if len(written) == stop:
                path.with_name(f"{path.name}.partial").write_bytes(b"half a shard")
                raise KeyboardInterrupt
            written.append(path)
            write(path, *args)

        monkeypatch.setattr(stage2_prior.tokenization, "write_shard", cut)
        with pytest.raises(KeyboardInterrupt):
            tokenize(config)
        monkeypatch.setattr(stage2_prior.tokenization, "write_shard", write)
        kept = {path: path.stat().st_mtime_ns for path in written}
        assert contents(tokenize(config).folder) == straight
        assert {path: path.stat().st_mtime_ns for path in written} == kept


@pytest.mark.parametrize("streaming", few([False, True], False))
def test_too_many_broken_images(packed, streaming):
    with pytest.raises(ConfigError) as caught:
        tokenize(packed("codes", streaming, limit=0.1))
    text = str(caught.value)
    assert "data.max_skipped_fraction: received 0.1, but 3 of the 23 train images cannot be used; " in text
    assert "choose a new code_store" in text and all(
        f"      {name}: " in text for name in ("3.png", "4.png", "image 11")
    )
    store = tokenize(packed("codes", streaming, limit=0.5))  # the limit has no influence on the codes
    assert store.manifest["splits"]["train"]["rows"] == 40


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_of_validation_beyond_training(packed, tmp_path, streaming):
    rows = {"picture": [picture(5)], "y": [3]}
    write_parquet(tmp_path / "data" / "val.parquet", rows, y=datasets.Value("int64"))
    told = r"class 3, the training .* 0 to 2" if streaming else r"classes that the training split lacks: 3"
    with pytest.raises(ConfigError, match=f"label_column: the validation split has {told}"):
        tokenize(packed("codes", streaming))


class TestColumns:
    """`data.columns` keeps further columns of the data set beside the codes."""

    STYLES = ("oil", "ink", None)

    @pytest.fixture
    def config(self, tiny_runs, tmp_path, datasets_cache):
        kinds = {
            name: datasets.Value(kind)
            for name, kind in [("style", "string"), ("age", "int64"), ("y", "int64"), ("few", "int64")]
        }
        for split, count in [("train", 11), ("val", 3)]:
            numbers = range(count)
            rows = {
                "picture": [picture(10 * n) for n in numbers],
                "y": [n % 2 for n in numbers],
                "few": [(0, 1, 3)[n % 3] for n in numbers],
            }
            rows |= {"style": [self.STYLES[n % 3] for n in numbers], "age": [n**2 for n in numbers]}
            write_parquet(tmp_path / "data" / f"{split}.parquet", rows, **kinds)

        def make(columns=("style", "age"), **changes):
            data = DataConfig(dataset=str(tmp_path / "data"), validation_split="val", label_column="y", **changes)
            data.columns, data.augmentation.horizontal_flip = list(columns), True
            return replace(tiny_runs.stage2, data=data, code_store=str(tmp_path / "codes"))

        return make

    @pytest.mark.parametrize("streaming", [False, True])
    def test_they_stand_beside_the_codes_of_their_images(self, config, monkeypatch, streaming):
        monkeypatch.setattr(stage2_prior.code_store, "SHARD_ROWS", 8)  # 4 images with 2 views
        split = tokenize(config(streaming=streaming)).split("train")
        labels = split.read(np.arange(22))[1]
        kept = split.read_columns(np.arange(22))
        roots = [round(age**0.5) for age in kept["age"]]
        assert sorted(roots) == sorted([*range(11)] * 2) and len(split.paths) == 3
        assert kept["style"] == [self.STYLES[n % 3] for n in roots] and labels.tolist() == [n % 2 for n in roots]
        assert split.read_columns(np.array([21, 0, 9]))["age"] == [kept["age"][row] for row in (21, 0, 9)]
        assert datasets.Dataset.from_file(str(split.paths[0])).column_names == ["codes", "label", "style", "age"]

    def test_the_classes_of_a_stream_are_counted(self, config, caplog):
        """Class 2 is in no training image; an indexed source would not have made it a class."""
        wanted = config(columns=(), streaming=True)
        wanted.data.label_column = "few"
        assert tokenize(wanted).layout.class_counts == (4, 4, 0, 3)
        assert "1 of the 4 classes have no training images, so a prior cannot learn them: 2" in caplog.text

    def test_a_changed_value_is_damage(self, config):
        store = tokenize(config())
        path = store.split("train").paths[0]
        path.write_bytes(path.read_bytes().replace(b"oilink", b"oilinc", 1))
        with pytest.raises(ConfigError, match="its contents have changed"):
            CodeStore(store.folder)

    def test_a_store_without_them_is_another_one(self, config):
        tokenize(config())
        with pytest.raises(ConfigError, match="code_store"):
            tokenize(config(columns=()))

    @pytest.mark.parametrize(
        ("columns", "words"),
        [
            (["picture"], "'picture' holds Image"),
            (["size"], "received 'size'; the columns are picture, "),
            (["label"], "codes, label, condition are names of the store itself"),
            (["age", "age"], "a name may stand here once"),
        ],
    )
    def test_columns_that_cannot_be_kept(self, config, columns, words):
        with pytest.raises(ConfigError, match=rf"data\.columns: .*{words}"):
            tokenize(config(columns=columns))
