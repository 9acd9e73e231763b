"""Condition columns of a code store that are damaged or forged: each is refused, and the message says what is wrong."""

import json

import numpy as np
import pyarrow as pa
import pytest

from configs import ConfigError
from stage2_prior import CodeStore, Segment, TokenLayout
from stage2_prior.code_store import claim_folder, shard_path
from stage2_prior.data import CodeDataset
from stage2_prior.manifest import write_manifest
from stage2_prior.shards import read_notes, write_shard
from tests.code_stores import ORIGIN
from tests.resealing import edit_manifest

SEGMENTS = (
    Segment("style", "class", 3, class_names=("flat", "drawn", "shaded")),
    Segment("text", "text", 20, 3, fingerprint="1" * 16),
    Segment("small", "image", 9, 4, grids=((2, 2, 1),), image_shape=(8, 8), fingerprint="0" * 16),
)
LAYOUT = TokenLayout(9, ("a", "b"), (2, 3), 4, "0" * 16, segments=SEGMENTS)
ROWS, WIDTH = 10, 8
LIMITS = np.array([3, *[20] * 3, *[9] * 4])  # the null tokens
TOLD = {name: {"kind": kind, "column": name} for name, kind in (("style", "class"), ("text", "text"))}
TOLD["small"] = {"kind": "image", "transform": "downscale 2"}


def tables():
    """Codes, labels and condition tokens of a split; the first row has null tokens only."""
    rng = np.random.default_rng(0)
    conditions = rng.integers(LIMITS, size=(ROWS, WIDTH), dtype=np.uint32)
    conditions[0] = LIMITS
    return rng.integers(9, size=(ROWS, 6)).astype(np.uint16), rng.integers(2, size=ROWS), conditions


def write(folder, conditions=None, layout=LAYOUT):
    """A finished store whose checksums are right, whatever the condition tokens are."""
    folder.mkdir(exist_ok=True)
    codes, labels, own = tables()
    conditions = own if conditions is None else conditions
    for split in ("train", "validation"):
        write_shard(shard_path(folder, split, 0), codes, labels, ROWS, conditions=conditions)
    seal(folder, layout)
    return conditions


def seal(folder, layout=LAYOUT):
    notes = {split: [read_notes(shard_path(folder, split, 0))] for split in ("train", "validation")}
    write_manifest(folder, layout, notes, ORIGIN | {"conditions": TOLD}, 1.0)


def refused(folder, message):
    with pytest.raises(ConfigError, match=rf"code_store: .*{message}"):
        CodeStore(folder)


def test_null_tokens_are_allowed(tmp_path):
    conditions = write(tmp_path)
    store = CodeStore(tmp_path)
    assert np.array_equal(store.split("train").read(np.arange(ROWS)).conditions, conditions)
    prompts = CodeDataset(store.split("train"), LAYOUT).read(np.arange(ROWS))[2]
    assert prompts[0, 1:].tolist() == LAYOUT.null_prompt()[1:].tolist()
    assert prompts.max() < LAYOUT.used_tokens


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, 4, "tokens of style from 0 to 4; allowed are 0 to 3"),
        (2, 21, "tokens of text from 0 to 21; allowed are 0 to 20"),
        (7, 10, "tokens of small from 0 to 10; allowed are 0 to 9"),
        (5, 2**32 - 1, "tokens of small from 0 to 4294967295"),  # -1 in 32 bits
    ],
)
def test_ids_behind_the_null_token_are_refused(tmp_path, place, value, message):
    conditions = tables()[2]
    conditions[3, place] = value
    write(tmp_path, conditions)
    refused(tmp_path, message)


@pytest.mark.parametrize("width", [0, 7, 9])
def test_another_width_is_refused(tmp_path, width):
    conditions = np.zeros((ROWS, width), np.uint32) if width else None
    codes, labels, _ = tables()
    write(tmp_path)
    write_shard(shard_path(tmp_path, "train", 0), codes, labels, ROWS, conditions=conditions)
    seal(tmp_path)
    refused(tmp_path, "rows of 6 codes .uint16. with labels.*; the manifest says 10 rows .*, 8 condition tokens")


LIST = pa.list_(pa.uint32(), WIDTH)
COLUMNS = {
    "floats": pa.array([[0.5] * WIDTH] * ROWS, pa.list_(pa.float32(), WIDTH)),
    "NaN": pa.array([[float("nan")] * WIDTH] * ROWS, pa.list_(pa.float64(), WIDTH)),
    "negative": pa.array([[-1] * WIDTH] * ROWS, pa.list_(pa.int32(), WIDTH)),
    "16 bits": pa.array([[1] * WIDTH] * ROWS, pa.list_(pa.uint16(), WIDTH)),
    "lists of any length": pa.array([[1] * WIDTH] * ROWS, pa.list_(pa.uint32())),
    "texts": pa.array(["1"] * ROWS),
    "a missing row": pa.array([None, *[[1] * WIDTH] * (ROWS - 1)], LIST),
    "a missing token": pa.array([[None, *[1] * (WIDTH - 1)], *[[1] * WIDTH] * (ROWS - 1)], LIST),
}


def replace_column(path, edit):
    """Writes a shard with other columns and its own notes."""
    batch = pa.ipc.open_stream(path.read_bytes()).read_next_batch()
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    names, arrays = zip(*edit(columns), strict=True)
    changed = pa.RecordBatch.from_arrays(list(arrays), names=list(names)).replace_schema_metadata(batch.schema.metadata)
    with pa.ipc.new_stream(path, changed.schema) as writer:
        writer.write_batch(changed)


@pytest.mark.parametrize("kind", COLUMNS)
def test_other_values_are_refused(tmp_path, kind):
    write(tmp_path)
    path = shard_path(tmp_path, "train", 0)
    replace_column(path, lambda columns: (columns | {"condition": COLUMNS[kind]}).items())
    refused(tmp_path, r"train-00000\.arrow: (holds the columns .*; allowed are|values are missing)")


@pytest.mark.parametrize(
    "edit",
    [
        lambda columns: [pair for pair in columns.items() if pair[0] != "condition"],
        lambda columns: [*columns.items(), ("condition", columns["condition"])],
        lambda columns: [*columns.items(), ("more", columns["label"])],
        lambda columns: [(name, columns[name]) for name in ("condition", "codes", "label")],
        lambda columns: [(f"{name}s" if name == "condition" else name, values) for name, values in columns.items()],
    ],
    ids=["missing", "twice", "one more", "another order", "renamed"],
)
def test_a_missing_or_additional_column_is_refused(tmp_path, edit):
    write(tmp_path)
    replace_column(shard_path(tmp_path, "train", 0), edit)
    refused(tmp_path, r"train-00000\.arrow: holds .*; (the manifest says|allowed are)")


def test_changed_tokens_and_cut_files_are_refused(tmp_path):
    conditions = write(tmp_path)
    path = shard_path(tmp_path, "validation", 0)
    whole = path.read_bytes()
    place = whole.index(conditions.tobytes())
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    refused(tmp_path, r"validation-00000\.arrow: this is not the shard that the manifest lists, or its contents")
    (tmp_path / "origin.json").write_text(json.dumps(ORIGIN))
    manifest = (tmp_path / "manifest.json").read_bytes()
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(
        ConfigError, match=r"validation-00000\.arrow: the codes, labels or conditions of this file have"
    ):
        claim_folder(tmp_path, ORIGIN)
    (tmp_path / "manifest.json").write_bytes(manifest)
    for end in (0, place, place + conditions.nbytes // 2, len(whole) - 30):
        path.write_bytes(whole[:end])
        refused(tmp_path, r"validation-00000\.arrow: (this file cannot be read|holds 0 record batches)")


def text(**changes):
    return lambda layout, origin: layout["segments"][1].update(changes)


MANIFESTS = {
    "the manifest says 10 rows .*, 9 condition tokens": text(length=4),
    "tokens of text from 0 to 20; allowed are 0 to 10": text(num_tokens=10),
    "segments.text: received 20 tokens and length 3; its class_names say 2 and 1": text(
        kind="class", class_names=["flat", "drawn"]
    ),
    "segments.text: received 20 tokens and length 3; its grids say 20 and 9": text(kind="image", grids=[[3, 3, 1]]),
    "segments: received the name 'style'; must be a new identifier": text(name="style"),
    "segments.1.kind: received 'sound'": text(kind="sound"),
    "segments.num_tokens: received -1": text(num_tokens=-1),
    "segments.1.length: received None": text(length=None),
    "10 rows of 6 codes .uint16. with labels, 8 condition tokens; the manifest says 10 rows": lambda layout, origin: [
        layout.update(segments=[]),
        origin.pop("conditions"),
    ],
    "the conditions style, text, small, but its origin names style, text;": lambda layout, origin: origin[
        "conditions"
    ].pop("small"),
    "the conditions style, text, small, but its origin names none;": lambda layout, origin: origin.pop("conditions"),
    "origin.conditions: Input should be": lambda layout, origin: origin.update(conditions=3),
    "origin.conditions.small: Input should be": lambda layout, origin: origin["conditions"].update(small=[]),
}


@pytest.mark.parametrize("message", MANIFESTS)
def test_a_manifest_of_other_conditions_is_refused(tmp_path, message):
    write(tmp_path)
    edit_manifest(tmp_path, lambda manifest: MANIFESTS[message](manifest["token_layout"], manifest["origin"]))
    refused(tmp_path, message)
