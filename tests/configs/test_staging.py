"""The files of a saved model are replaced together, whatever interrupts the replacement."""

import errno
import json
import os
import stat
from unittest.mock import Mock

import pytest

from configs import staging
from configs.checkpoints import complete_checkpoints, publish, read_checkpoint, unfinished_path
from configs.checksums import Damaged, verify_checksums
from configs.files import write_json, write_text
from configs.staging import finish_interrupted, replaced_files
from tests.power_cuts import Crash, Disk, crash_after


def save(folder, version, shards=("model.safetensors",)):
    """Saves a model of a tokenizer and a prior; its files hold its version."""
    with replaced_files(folder) as staged:
        (staged / "README.md").write_text(version)
        for part in ("vqgan", "prior"):
            (staged / part).mkdir()
            (staged / part / "config.json").write_text(json.dumps({"version": version}))
            for shard in shards:
                (staged / part / shard).write_text(version)


def contents(folder):
    """The version that all files of a folder have, and their names."""
    finish_interrupted(folder)
    hidden = (folder / staging.SAVING, folder / staging.SAVED)
    files = [path for path in folder.rglob("*") if path.is_file() and not set(hidden) & set(path.parents)]
    versions = {path.read_text() for path in files if path.suffix != ".json"}
    versions |= {json.loads(path.read_text())["version"] for path in files if path.name == "config.json"}
    for part in ("vqgan", "prior"):
        verify_checksums(folder / part)
    (version,) = versions
    return version, {path.relative_to(folder).as_posix() for path in files}


OLD_SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NAMES = {
    version: {"README.md"}
    | {f"{part}/{name}" for part in ("vqgan", "prior") for name in ("config.json", "checksums.json", *shards)}
    for version, shards in (("old", OLD_SHARDS), ("new", ("model.safetensors",)))
}


def test_new_files_replace_old_ones_and_other_files_stay(tmp_path):
    save(tmp_path, "old", OLD_SHARDS)
    assert contents(tmp_path) == ("old", NAMES["old"])
    for name in ("notes.txt", "vqgan/thumbnails.safetensors"):
        (tmp_path / name).write_text("new")
    save(tmp_path, "new")
    assert contents(tmp_path) == ("new", NAMES["new"] | {"notes.txt", "vqgan/thumbnails.safetensors"})


def test_an_error_changes_nothing(tmp_path):
    save(tmp_path, "old", OLD_SHARDS)
    with pytest.raises(OSError, match="disk full"), replaced_files(tmp_path) as staged:
        (staged / "README.md").write_text("new")
        raise OSError("disk full")
    assert contents(tmp_path) == ("old", NAMES["old"]) and not (tmp_path / ".saving").exists()


OPERATIONS = [(os, "fsync"), (staging, "rename"), (staging, "replace"), (os, "replace"), (os, "unlink"), (os, "rmdir")]


@pytest.mark.parametrize("calls", range(0, 43, 2))
def test_a_crash_at_any_point_leaves_the_old_or_the_new_files(tmp_path, monkeypatch, calls):
    save(tmp_path, "old", OLD_SHARDS)
    with monkeypatch.context() as patch:
        crash_after(calls, OPERATIONS, patch)
        try:
            save(tmp_path, "new")
        except Crash:
            pass
        else:
            pytest.fail("all operations are counted")
    version, names = contents(tmp_path)
    assert names == NAMES[version]
    save(tmp_path, "new")
    assert contents(tmp_path) == ("new", NAMES["new"])


def test_a_power_cut_at_any_point_leaves_the_old_or_the_new_files(tmp_path, monkeypatch):
    run, restored = tmp_path / "run", tmp_path / "restored"
    save(run, "old", OLD_SHARDS)
    found = []

    def look(disk):
        version, names = contents(disk.restore(restored))
        assert names == NAMES[version]
        found.append(version)

    with monkeypatch.context() as patch:
        disk = Disk(run, patch)
        save(run, "new")
        disk.after_sync = look
        save(run, "old", OLD_SHARDS)
    assert contents(disk.restore(restored)) == ("old", NAMES["old"])
    assert set(found) == {"old", "new"} and sorted(found) == found


def test_a_power_cut_at_any_point_of_a_save_leaves_a_complete_checkpoint(tmp_path, monkeypatch):
    run, restored = tmp_path / "run", tmp_path / "restored"
    run.mkdir()

    def write(step):
        (unfinished_path(run, step) / "best").mkdir(parents=True)
        for name in ("model.safetensors", "best/model.safetensors"):
            (unfinished_path(run, step) / name).write_text(f"weights {step}")
        publish(run, step, 1, 0.0, total_limit=1)

    def look(disk):
        disk.restore(restored)
        checkpoints = complete_checkpoints(restored)
        assert checkpoints and [read_checkpoint(found.path) for found in checkpoints] == checkpoints

    with monkeypatch.context() as patch:
        disk = Disk(run, patch)
        write(1)
        assert [found.step for found in complete_checkpoints(disk.restore(restored))] == [1]
        disk.after_sync = look
        write(2)
    assert [found.step for found in complete_checkpoints(disk.restore(restored))][-1] == 2


@pytest.mark.parametrize("forgotten", ["sync_tree", "sync_folder"])
def test_the_model_of_a_power_cut_finds_a_missing_sync(tmp_path, monkeypatch, forgotten):
    monkeypatch.setattr(staging, forgotten, lambda folder: None)
    disk = Disk(tmp_path, monkeypatch)
    save(tmp_path / "run", "new")
    with pytest.raises((FileNotFoundError, ValueError)):
        contents(disk.restore(tmp_path / "restored") / "run")


def test_a_text_file_survives_a_power_cut(tmp_path, monkeypatch):
    write_text(tmp_path / "a.json", "old")
    disk = Disk(tmp_path, monkeypatch)
    found = []
    disk.after_sync = lambda disk: found.append((disk.restore(tmp_path / "restored") / "a.json").read_text())
    write_json(tmp_path / "a.json", {"new": 1})
    assert found == ["old", '{\n  "new": 1\n}\n']


def test_an_interrupted_save_in_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_after(0, [(staging, "replace")], patch)
        save(tmp_path, "new")
    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"interrupted, and is not writable.*copy it"):
        patch.setattr(staging, "replace", Mock(side_effect=OSError(errno.EROFS, "Read-only file system")))
        finish_interrupted(tmp_path)
    assert contents(tmp_path)[0] == "new"


def test_files_have_the_permissions_of_a_new_file(tmp_path):
    previous = os.umask(0o027)
    try:
        save(tmp_path, "new")
        with replaced_files(tmp_path) as staged:
            os.close(os.open(staged / "model.safetensors", os.O_CREAT, 0o600))
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == 0o640
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "prior").iterdir()} == {0o640}


def test_changed_and_missing_files_are_named(tmp_path):
    save(tmp_path, "old")
    (tmp_path / "prior" / "model.safetensors").write_text("odd")
    with pytest.raises(Damaged, match=r"model\.safetensors: the contents of this file have changed.*checksums\.json"):
        verify_checksums(tmp_path / "prior")
    (tmp_path / "prior" / "model.safetensors").unlink()
    with pytest.raises(Damaged, match="this file is missing"):
        verify_checksums(tmp_path / "prior")
    (tmp_path / "prior" / "checksums.json").unlink()
    verify_checksums(tmp_path / "prior")


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside", "linked/outside", 5, "a\\b"])
def test_a_strangers_folder_moves_no_file_outside(tmp_path, name):
    """Loading completes an interrupted replacement, and the folder may come from a stranger."""
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    (folder / staging.SAVED).mkdir(parents=True)
    (folder / "linked").symlink_to(tmp_path)
    outside.write_text("mine")
    (folder / staging.SAVED / "outside").write_text("stranger's")
    named = str(outside) if name == "/outside" else name
    write_json(folder / staging.SAVED / staging.NAMES, {"files": ["outside", named]})
    with pytest.raises(Damaged, match=r"files\.json: received .*; may name only files inside; remove .*\.saved"):
        finish_interrupted(folder)
    assert outside.read_text() == "mine" and (folder / staging.SAVED / "outside").exists()
