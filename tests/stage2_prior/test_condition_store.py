"""Code stores with conditions, against codes and tokens that are computed one by one."""

import io
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import stage2_prior.code_store
from configs import ConfigError
from stage1_vqgan import VQGANImageProcessor, VQGANModel, load_images
from stage2_prior.condition_images import apply_transform
from stage2_prior.condition_opening import open_conditions
from stage2_prior.condition_sources import load_condition_images, load_with_conditions
from stage2_prior.condition_text import load_text_tokenizer
from stage2_prior.condition_tokenizers import image_tokenizers
from stage2_prior.tokenization import open_tokenizer, tokenize, tokenize_split
from tests import conditioned
from tests.conditioned import ALL, AUGMENTATION, STYLES, TRAIN, VALIDATION, settings
from tests.devices import DEVICE, assert_same_codes
from tests.slow import few

PLACES = {
    "style": slice(0, 1),
    "text": slice(1, 5),
    "gray": slice(5, 21),
    "small": slice(21, 25),
    "twin": slice(25, 41),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with data and tokenizers."""
    with conditioned.prepared(tmp_path_factory.mktemp("conditioned")) as folder:
        yield folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The columns of both splits, as `root` has them."""
    return conditioned.write_data(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def store(root):
    return tokenize(settings(root, "all", ALL, num_views=2, **{"data.augmentation": AUGMENTATION}))


@pytest.fixture
def files(root, tmp_path):
    """A copy of the tokenizer, for data of another kind."""
    shutil.copytree(root / "vqgan", tmp_path / "vqgan")
    return tmp_path


def read(store, split):
    return store.split(split).read(np.arange(len(store.split(split))))


def opened(image):
    return Image.open(io.BytesIO(image["bytes"]))


def test_the_layout_has_a_segment_for_each_condition(store):
    layout = store.layout
    found = [(s.name, s.kind, s.num_tokens, s.length, s.transform) for s in layout.segments]
    text = layout.segments[1].num_tokens
    assert found == [
        ("style", "class", 3, 1, ""),
        ("text", "text", text, 4, ""),
        ("gray", "image", 32, 16, "gray"),
        ("small", "image", 32, 4, "downscale 2"),
        ("twin", "image", 32, 16, ""),
    ]
    assert layout.segments[0].class_names == STYLES and 256 < text <= 270
    assert [s.image_shape for s in layout.segments[2:]] == [(16, 16), (8, 8), (16, 16)]
    assert {s.fingerprint for s in layout.segments[2:]} == {layout.tokenizer_fingerprint}
    assert layout.class_names == ("left", "right") and len(store.split("train")) == 2 * TRAIN


@torch.no_grad()
def test_the_tokens_are_those_of_each_image(root, store, rows):
    """The first view of every image, computed without the code of the store."""
    model = VQGANModel.from_pretrained(root / "vqgan")
    process, tokenizer = (
        VQGANImageProcessor.from_pretrained(root / "vqgan"),
        load_text_tokenizer(store.folder / "conditions/text"),
    )
    for split, count in (("train", TRAIN), ("validation", VALIDATION)):
        found = read(store, split)
        conditions, columns = found.conditions[:count], rows[split]
        pixels = process([opened(image) for image in columns["image"]])["pixel_values"]
        assert conditions[:, PLACES["style"]].ravel().tolist() == columns["style"]
        for ids, text in zip(conditions[:, PLACES["text"]].tolist(), columns["text"], strict=True):
            tokens = tokenizer.encode(text or "").ids[:4]
            assert ids == [*tokens, *[store.layout.segments[1].num_tokens] * (4 - len(tokens))]
        for name, transform in (("gray", "gray"), ("small", "downscale 2")):
            codes = model.encode(apply_transform(transform, pixels)).codes.flatten(1).numpy()
            assert_same_codes(conditions[:, PLACES[name]].astype(np.int64), codes)
        assert_same_codes(found.codes[:count].astype(np.int64), model.encode(pixels).codes.flatten(1).numpy())


def test_a_condition_image_is_augmented_like_its_image(store):
    """The second image is the same as the first, so all views have the same codes."""
    found = read(store, "train")
    twin = found.conditions[:, PLACES["twin"]]
    assert_same_codes(twin.astype(np.int64), found.codes.astype(np.int64))
    assert (twin[:TRAIN] != twin[TRAIN:]).any(1).all()  # the second views are augmented
    rest = found.conditions[:, :5]  # classes and texts do not depend on the view
    np.testing.assert_array_equal(rest[:TRAIN], rest[TRAIN:])
    gray = found.conditions[:, PLACES["gray"]]
    assert (gray[:TRAIN] != gray[TRAIN:]).any(1).all()


def test_another_call_does_nothing_and_other_tokens_are_refused(root, store):
    config = settings(root, "all", ALL, num_views=2, **{"data.augmentation": AUGMENTATION})
    before = {path: path.stat().st_mtime_ns for path in store.folder.rglob("*") if path.is_file()}
    tokenize(config)
    assert {path: path.stat().st_mtime_ns for path in store.folder.rglob("*") if path.is_file()} == before
    for key, value in (("text.max_tokens", 5), ("gray.transform", "edges"), ("style.column", "word")):
        other = settings(
            root, "all", {**ALL}, num_views=2, **{"data.augmentation": AUGMENTATION, f"conditions.{key}": value}
        )
        with pytest.raises(ConfigError, match="holds codes with conditions"):
            tokenize(other)


@pytest.mark.parametrize("streaming", few([False, True], True))
def test_one_store_whoever_makes_it(root, store, monkeypatch, streaming):
    """Other batches, two processes and a stream give the same rows. A stream needs a given text tokenizer."""
    monkeypatch.setattr(stage2_prior.code_store, "SHARD_ROWS", 20)
    given = {
        **ALL,
        "text": {"kind": "text", "column": "text", "max_tokens": 4, "tokenizer": str(store.folder / "conditions/text")},
    }
    changes = {"num_views": 2, "data.augmentation": AUGMENTATION, "data.streaming": streaming}
    config = settings(root, f"shards{streaming}", given, tokenize_batch_size=7, **changes)
    made = tokenize(config)
    assert len(made.split("train").paths) == 3 and made.layout == store.layout
    whole, parts = read(store, "train"), read(made, "train")
    order = np.concatenate([view * TRAIN + np.arange(first, first + 10) for first in (0, 10, 20) for view in (0, 1)])
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(one[order], other)

    written = {path.name: path.read_bytes() for path in made.folder.glob("train-*")}
    for path in made.folder.glob("*.arrow"):
        path.unlink()
    model = open_tokenizer(config).to(DEVICE)
    tokenizers = image_tokenizers(config, model)
    for rank in (1, 0):
        train, validation = load_with_conditions(config)
        conditions = open_conditions(config, tokenizers, load_condition_images(config), train, validation)
        place = SimpleNamespace(process_index=rank, num_processes=2, is_main_process=False, device=DEVICE)
        tokenize_split(config, place, model, "train", train, 2, conditions["train"])
    assert {path.name: path.read_bytes() for path in made.folder.glob("train-*")} == written


def test_an_interrupted_store_keeps_its_text_tokenizer(root, monkeypatch):
    """Other library versions might train another one, with other tokens than those of the finished shards."""
    monkeypatch.setattr(stage2_prior.code_store, "SHARD_ROWS", 10)
    config = settings(root, "interrupted", {"text": ALL["text"]})
    store = tokenize(config)
    before = {path.name: path.read_bytes() for path in store.folder.glob("*.arrow")}
    (store.folder / "manifest.json").unlink()
    (store.folder / "train-00001.arrow").unlink()
    monkeypatch.setattr("stage2_prior.condition_tokenizers.train_text_tokenizer", None)
    tokenize(config)
    assert {path.name: path.read_bytes() for path in store.folder.glob("*.arrow")} == before


def test_conditions_in_another_order_do_not_continue_a_store(root):
    """The tokens of the conditions stand in this order in every shard."""
    names = {"style": ALL["style"], "word": {"kind": "class", "column": "word"}}
    other = dict(reversed(names.items()))
    store = tokenize(settings(root, "ordered", names))
    assert tokenize(settings(root, "ordered", other)).layout == store.layout  # finished: its layout tells the order
    (store.folder / "manifest.json").unlink()
    (store.folder / "validation-00000.arrow").unlink()
    with pytest.raises(ConfigError, match="the conditions style, word, but their order is now word, style; restore"):
        tokenize(settings(root, "ordered", other))
    assert tokenize(settings(root, "ordered", names)).layout == store.layout


def test_a_condition_image_with_a_tokenizer_of_its_own(root, rows):
    own = conditioned.save_tokenizer(root / "own", 8, seed=1, num_embeddings=16)
    store = tokenize(settings(root, "other", {"twin": {"kind": "image", "column": "twin", "tokenizer": own}}))
    (segment,) = store.layout.segments
    model = VQGANModel.from_pretrained(store.folder / "conditions/twin")
    process = VQGANImageProcessor.from_pretrained(store.folder / "conditions/twin")
    assert (segment.num_tokens, segment.length, segment.image_shape) == (16, 4, (8, 8))
    assert segment.fingerprint == model.config.fingerprint != store.layout.tokenizer_fingerprint
    assert model.config.image_shape == (8, 8) and process.size == {"height": 8, "width": 8}
    with torch.no_grad():
        pixels = process([opened(image) for image in rows["validation"]["twin"]])["pixel_values"]
        codes = model.encode(pixels).codes.flatten(1).numpy()
    assert_same_codes(read(store, "validation").conditions.astype(np.int64), codes)


def test_a_row_without_its_condition_image_is_skipped(files):
    broken = {"bytes": b"not an image", "path": None}
    conditioned.write_data(files / "data", lambda number, image: broken if number == 4 else image)
    config = settings(files, "run", {"twin": ALL["twin"], "style": ALL["style"]}, **{"data.max_skipped_fraction": 0.2})
    store = tokenize(config)
    skipped = store.manifest["splits"]["train"]["skipped"]
    assert [image["image"] for image in skipped] == [4] and skipped[0]["reason"].startswith("twin: ")
    found = read(store, "train")
    np.testing.assert_array_equal(found.conditions[:, :16], found.codes)
    assert found.conditions[:, 16].tolist() == [number % 3 for number in range(TRAIN) if number != 4]
    with pytest.raises(ConfigError, match=r"data\.max_skipped_fraction: received 0\.01"):
        tokenize(settings(files, "strict", {"twin": ALL["twin"]}))


def test_labels_in_words_are_classes_and_kept_columns_are_those_of_the_settings(root):
    conditions = {"text": ALL["text"], "word": {"kind": "class", "column": "word"}}
    store = tokenize(settings(root, "kept", conditions, **{"data.columns": ["word", "text"]}))
    assert store.layout.segments[1].class_names == STYLES
    assert list(store.split("train").read_columns(np.arange(2))) == ["word", "text"]
    assert read(store, "train").conditions.shape == (TRAIN, 5)


def test_classes_of_the_validation_split_are_those_of_the_training(files):
    conditioned.write_data(files / "data", word={"train": ["flat"] * TRAIN})
    with pytest.raises(
        ConfigError, match=r"conditions\.word\.column: the validation split has classes .* drawn, shaded"
    ):
        tokenize(settings(files, "run", {"word": {"kind": "class", "column": "word"}}))
    assert not (files / "run" / "codes" / "origin.json").exists()


@pytest.mark.parametrize(
    "condition, changes, message",
    [
        ({"kind": "text", "column": "caption"}, {}, r"conditions\.c\.column: received 'caption'; the columns are"),
        ({"kind": "image", "column": "caption"}, {}, r"conditions\.c\.column: received 'caption'; the columns are"),
        ({"kind": "image", "column": "style"}, {}, r"conditions\.c\.column: received 'style'; its values are not"),
        ({"kind": "text", "column": "style"}, {}, r"conditions\.c\.column: received 'style', which holds ClassLabel"),
        ({"kind": "text", "column": "twin"}, {}, r"conditions\.c\.column: 'twin' holds .* only text and numbers"),
        ({"kind": "text", "column": "text"}, {"data.streaming": True}, r"c\.tokenizer: a stream is not read"),
        ({"kind": "class", "column": "word"}, {"data.streaming": True}, r"conditions\.c\.column: .*must declare them"),
        ({"kind": "text", "column": "text", "tokenizer": "no/where/"}, {}, r"c\.tokenizer: received 'no/where/'"),
        ({"kind": "image", "column": "twin", "image_size": 10}, {}, r"conditions\.c\.image_size: received \[10, 10\]"),
        ({"transform": "downscale 3"}, {}, r"conditions\.c\.transform: received 'downscale 3'; 3 must divide"),
        ({"transform": "downscale 8"}, {}, r"conditions\.c\.transform: received"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_condition_is_refused(root, condition, changes, message):
    with pytest.raises(ConfigError, match=message):
        tokenize(settings(root, "refused", {"c": condition}, **changes))
    assert not (root / "refused" / "codes" / "origin.json").exists()


def test_the_sources_stay_those_of_the_images(root):
    """A condition adds no column to the images themselves."""
    config = settings(root, "sources", ALL)
    plain, with_columns = load_images(config.data)[0], load_with_conditions(config)[0]
    assert plain.columns is None and with_columns.columns.column_names == ["style", "text"]
