"""Damaged, incomplete and foreign code stores: each is refused in our words, or gives the codes it was written with."""

import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pytest

from configs import ConfigError
from configs.checksums import SEAL, sealed
from stage2_prior import CodeStore
from stage2_prior.code_store import claim_folder
from stage2_prior.shards import NOTES_KEY, map_shard
from tests.code_stores import ORIGIN, write_store
from tests.fuzz.harness import cases, damaged, generator, in_processes, outcome

EXTREME = [0, 1, -1, 2**31 - 1, -(2**31), 2**40, 2**62, 2**63 - 1, -(2**63)]
VALUES = [
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    10**30,
    1e300,
    float("nan"),
    "",
    "x",
    [],
    {},
    [1],
    {"a": 1},
    "train-00000.arrow",
]


def damage_bytes(folder, draw):
    path = draw.choice(sorted(folder.iterdir()))
    path.write_bytes(damaged(path.read_bytes(), draw))


def damage_numbers(folder, draw):
    """Extreme values in place of aligned integers of a shard: lengths, offsets, counts, types."""
    path = draw.choice(sorted(folder.glob("*.arrow")))
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 1, 3])):
        size = draw.choice([2, 4, 8])
        place = draw.randrange(len(content) // 8) * 8 + draw.choice([0, 4])
        content[place : place + size] = (draw.choice(EXTREME) % 2 ** (8 * size)).to_bytes(size, "little")
    path.write_bytes(content)


def edit_json(folder, draw):
    """Another value at a random place, half of the time with a checksum that fits."""
    path = draw.choice(sorted(folder.glob("*.json")))
    values = json.loads(path.read_text())
    seal = values.pop(SEAL, None)
    node, key = values, draw.choice(list(values))
    while isinstance(node[key], dict | list) and node[key] and draw.random() < 0.8:
        node = node[key]
        key = draw.choice(list(node)) if isinstance(node, dict) else draw.randrange(len(node))
    change = draw.choice(["value", "value", "remove", "add"])
    if change == "remove":
        del node[key]
    elif change == "add" and isinstance(node, dict):
        node["more"] = draw.choice(VALUES)
    else:
        node[key] = draw.choice(VALUES)
    values = sealed(values) if seal and draw.random() < 0.5 else values | ({SEAL: seal} if seal else {})
    path.write_text(json.dumps(values))


def move_files(folder, draw):
    one, other = draw.sample(sorted(folder.glob("*.arrow")), 2)
    content = other.read_bytes()
    kind = draw.choice(["missing", "extra", "swap", "copy", "empty", "folder", "link", "pipe"])
    if kind in ("missing", "folder", "link", "pipe"):
        one.unlink()
    if kind == "folder":
        one.mkdir()
    elif kind == "pipe":
        os.mkfifo(one)
    elif kind == "link":
        one.symlink_to(draw.choice([other, folder / "nowhere", "/dev/zero"]))
    elif kind == "extra":
        one.with_name(f"train-0000{draw.randrange(3, 9)}.arrow").write_bytes(content)
    elif kind == "swap":
        other.write_bytes(one.read_bytes())
    if kind in ("swap", "copy"):
        one.write_bytes(content)
    elif kind == "empty":
        one.write_bytes(b"")


def write_columns(folder, draw):
    """A shard of other columns, with the notes of the shard that it replaces."""
    path = draw.choice(sorted(folder.glob("*.arrow")))
    batch = pa.ipc.open_stream(path.read_bytes()).read_next_batch()
    rows, labels = np.array(batch.column(0).to_pylist()), batch.column(1)
    value = draw.choice([pa.uint16(), pa.uint32(), pa.int16(), pa.uint8(), pa.int64(), pa.float32(), pa.string()])
    if draw.random() < 0.3:
        rows = rows[:, : draw.randrange(6)] if draw.random() < 0.5 else np.concatenate([rows, rows], 1)
    if draw.random() < 0.3:
        rows = rows + draw.choice([-1000, 1000, 60_000])
    lists = [[str(code) if value == pa.string() else int(code) % 256 for code in row] for row in rows]
    if value not in (pa.uint8(), pa.string()):
        lists = (rows % (2**15 if value == pa.int16() else 2**16)).tolist()
    if draw.random() < 0.3:
        lists[draw.randrange(len(lists))] = draw.choice([None, [None] * rows.shape[1]])
    codes = pa.array(lists, draw.choice([pa.list_(value, rows.shape[1]), pa.list_(value), pa.large_list(value)]))
    if draw.random() < 0.4:
        labels = draw.choice([
            labels.cast(pa.int32()), labels.dictionary_encode(), labels.cast(pa.string()), pa.nulls(len(labels)),
            pa.array([None, *labels.to_pylist()[1:]], pa.int64()), pa.array([-1] * len(labels)),
            pa.array([99] * len(labels)),
        ])  # fmt: skip
    columns = {"codes": codes, "label": labels}
    kind = draw.choice(["as it is", "as it is", "no label", "more", "renamed", "batches", "file", "compressed"])
    if kind == "no label":
        del columns["label"]
    elif kind == "more":
        columns["more"] = labels
    elif kind == "renamed":
        columns = {"label": labels, "codes": codes}
    metadata = batch.schema.metadata if draw.random() < 0.9 else {NOTES_KEY: b"{}"}
    batch = pa.RecordBatch.from_pydict(columns, metadata=metadata)
    options = pa.ipc.IpcWriteOptions(compression="zstd" if kind == "compressed" else None)
    writer = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with writer(path, batch.schema, options=options) as file:
        for _ in range(draw.choice([0, 2, 9]) if kind == "batches" else 1):
            file.write_batch(batch)


CHANGES = [damage_bytes, damage_bytes, damage_numbers, edit_json, edit_json, move_files, write_columns]


def rows_of(folder):
    """Codes and labels of both splits."""
    store = CodeStore(folder)
    splits = [store.split(name) for name in ("train", "validation")]
    return [array for split in splits for array in split.read(np.arange(len(split)))[:2]]


def continued(folder):
    """Codes and labels of the shards on which an interrupted run would build, by name."""
    (folder / "manifest.json").unlink(missing_ok=True)
    claim_folder(folder, ORIGIN)
    return {path.name: map_shard(path)[0] for path in sorted(folder.glob("*.arrow"))}


def case(number, whole, scratch):
    """The outcome of opening a changed copy of a store, and of continuing it."""
    folder = scratch / str(number)
    shutil.copytree(whole, folder)
    draw = generator("stores", number)
    draw.choice(CHANGES)(folder, draw)
    opened = outcome(lambda: rows_of(folder), (ConfigError,), folder)
    return opened, outcome(lambda: continued(folder), (ConfigError,), folder)


def make_store(folder):
    """Writes a store of five shards and its origin."""
    folder.mkdir()
    write_store(folder, 3)
    (folder / "origin.json").write_text(json.dumps(ORIGIN))
    return folder


def same(one, other):
    """Whether two lists of arrays, or shards without further columns, are equal."""
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if not a is b is None]
    return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def check(numbers, scratch):
    scratch = scratch / str(numbers[0])
    scratch.mkdir()
    whole = make_store(scratch / "whole")
    codes, shards, refused = rows_of(whole), {path.name: map_shard(path)[0] for path in whole.glob("*.arrow")}, 0
    for number in numbers:
        opened, built_on = case(number, whole, scratch)
        refused += isinstance(opened, ConfigError)
        assert isinstance(opened, ConfigError) or same(opened, codes), number
        if not isinstance(built_on, ConfigError):
            assert all(same(shard, shards[name]) for name, shard in built_on.items()), number
        shutil.rmtree(scratch / str(number))
    assert refused > len(numbers) / 2


@cases(short=70, long=250)
def test_a_changed_store_is_refused_or_the_same(tmp_path, numbers):
    in_processes(check, numbers, tmp_path)


@pytest.mark.parametrize("name", ["train-00001.arrow", "manifest.json"])
def test_a_shard_cut_anywhere_is_refused_or_the_same(tmp_path, name):
    folder = make_store(tmp_path / "whole")
    codes, content = rows_of(folder), (folder / name).read_bytes()
    for size in range(0, len(content), 16):
        (folder / name).write_bytes(content[:size])
        opened = outcome(lambda: rows_of(folder), (ConfigError,), folder)
        assert isinstance(opened, ConfigError) or same(opened, codes), size
