"""Checkpoints: a folder with the name of a checkpoint is complete, the newest one is found, and one always exists."""

import json
import os
import shutil

import pytest

from configs import ConfigError, checkpoints as module
from configs.checkpoints import complete_checkpoints, find_checkpoint, publish, remove_unfinished, unfinished_path
from tests.power_cuts import Crash, crash_after


def save(folder, step, total_limit=9, content="weights"):
    path = unfinished_path(folder, step)
    (path / "part").mkdir(parents=True)
    (path / "part" / "model").write_text(content)
    return publish(folder, step, num_processes=2, seconds=1.25, total_limit=total_limit)


def steps(folder):
    return [checkpoint.step for checkpoint in complete_checkpoints(folder)]


def test_published(tmp_path):
    path = save(tmp_path, 7)
    assert path == tmp_path / "checkpoint-7" and (path / "part" / "model").read_text() == "weights"
    assert complete_checkpoints(tmp_path) == [module.Checkpoint(path, 7, 2, 1.2)]


def test_only_complete_checkpoints_are_found_in_order_of_their_steps(tmp_path):
    for step in (9, 10):
        save(tmp_path, step)
    for name in ("checkpoint-11", "checkpoint-best", "other", "unfinished/checkpoint-12"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copytree(tmp_path / "checkpoint-9", tmp_path / "checkpoint-13")  # its marker states another step
    (tmp_path / "checkpoint-11" / "complete.json").write_text('{"step": 1')
    assert [path.name for path in module.checkpoint_folders(tmp_path)] == [f"checkpoint-{n}" for n in (9, 10, 11, 13)]
    assert steps(tmp_path) == [9, 10]
    assert find_checkpoint(tmp_path, "latest", 20).step == 10
    assert find_checkpoint(tmp_path / "empty", "latest", 20) is find_checkpoint(tmp_path / "empty", "none", 20) is None
    for wrong in (tmp_path / "checkpoint-11", tmp_path / "checkpoint-12", "newest"):
        with pytest.raises(ConfigError, match="complete checkpoint-N"):
            find_checkpoint(tmp_path, str(wrong), 20)


def test_a_path_in_the_folder_must_be_the_newest(tmp_path):
    for step in (9, 10):
        save(tmp_path, step)
    assert find_checkpoint(tmp_path, str(tmp_path / "checkpoint-10"), 20).step == 10
    with pytest.raises(ConfigError, match=r"later ones; move or remove .*checkpoint-10"):
        find_checkpoint(tmp_path, str(tmp_path / "checkpoint-9"), 20)
    assert find_checkpoint(tmp_path / "elsewhere", str(tmp_path / "checkpoint-9"), 20).step == 9


def test_a_run_that_started_from_another_folder_resumes_from_its_own_checkpoint(tmp_path):
    """The same command resumes from the newest checkpoint, although it names the first one."""
    save(tmp_path / "first", 9)
    began = str(tmp_path / "first" / "checkpoint-9")
    assert find_checkpoint(tmp_path / "second", began, 20).path == tmp_path / "first" / "checkpoint-9"
    save(tmp_path / "second", 12)
    assert find_checkpoint(tmp_path / "second", began, 20).path == tmp_path / "second" / "checkpoint-12"


def test_a_new_run_is_refused_in_a_folder_with_checkpoints(tmp_path):
    save(tmp_path, 9)
    with pytest.raises(ConfigError, match=r"'none', but .* holds checkpoints"):
        find_checkpoint(tmp_path, "none", 20)


@pytest.mark.parametrize("wanted", ["latest", "{}/checkpoint-9"])
def test_a_checkpoint_beyond_max_steps_is_refused(tmp_path, wanted):
    save(tmp_path, 9)
    with pytest.raises(ConfigError, match="max_steps: received 8"):
        find_checkpoint(tmp_path, wanted.format(tmp_path), 8)


def test_the_newest_checkpoints_are_not_removed(tmp_path):
    for step in (8, 9, 10, 11):
        save(tmp_path, step, total_limit=2)
    assert steps(tmp_path) == [10, 11]
    assert not (tmp_path / "unfinished").exists()


def remove_file(path):
    (path / "part" / "model").unlink()


def cut_file(path):
    (path / "part" / "model").write_text("weight")


def flip_bit(path):
    (path / "part" / "model").write_text("weighus")


def add_file(path):
    (path / "optimizer.bin").write_text("pickle")


def cut_marker(path):
    (path / "complete.json").write_text((path / "complete.json").read_text()[:-9])


def edit_marker(path):
    marker = json.loads((path / "complete.json").read_text())
    (path / "complete.json").write_text(json.dumps(marker | {"num_processes": "two"}))


def remove_marker(path):
    (path / "complete.json").unlink()


def list_no_files(path):
    (path / "complete.json").write_text('{"step": 10, "num_processes": 2, "seconds": 1.0}')


DAMAGES = {
    remove_file: "part/model: this file is missing",
    cut_file: "part/model: this file has 6 bytes; 7 were saved",
    flip_bit: "part/model: the contents of this file have changed",
    add_file: "optimizer.bin: this file does not belong to the checkpoint",
    cut_marker: "complete.json: this file is not JSON",
    edit_marker: "complete.json: num_processes: received 'two'",
    remove_marker: "complete.json: this file is missing",
    list_no_files: "complete.json: lists no files; an earlier version wrote this checkpoint",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_newest_checkpoint_is_named_and_the_older_one_taken(tmp_path, caplog, damage):
    for step in (9, 10):
        save(tmp_path, step)
    damage(tmp_path / "checkpoint-10")
    assert find_checkpoint(tmp_path, "latest", 20).step == 9
    assert DAMAGES[damage] in caplog.text and "resuming from the older" in caplog.text
    with pytest.raises(ConfigError, match=DAMAGES[damage]):
        find_checkpoint(tmp_path, str(tmp_path / "checkpoint-10"), 20)

    save(tmp_path, 10, total_limit=1)  # the run repeats the step
    assert steps(tmp_path) == [10] and find_checkpoint(tmp_path, "latest", 20).step == 10


def test_a_damaged_later_checkpoint_does_not_count_when_old_ones_are_removed(tmp_path):
    for step in (9, 12):
        save(tmp_path, step)
    flip_bit(tmp_path / "checkpoint-12")
    save(tmp_path, 10, total_limit=1)
    assert steps(tmp_path) == [10] and find_checkpoint(tmp_path, "latest", 20).step == 10


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew_by_itself(tmp_path):
    for step in (9, 10):
        save(tmp_path, step)
        flip_bit(tmp_path / f"checkpoint-{step}")
    with pytest.raises(ConfigError, match=r"(?s)checkpoint-10/part/model.*checkpoint-9/part/model.*start anew"):
        find_checkpoint(tmp_path, "latest", 20)


@pytest.mark.parametrize("calls", range(24))
def test_a_crash_at_any_point_leaves_a_complete_checkpoint(tmp_path, monkeypatch, calls):
    """Crashes a save that also removes a checkpoint, after each number of file operations."""
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        operations = [(os, "fsync"), (module.Path, "rename"), (os, "replace"), (os, "unlink")]
        crash_after(calls, operations, patch)
        try:
            path = unfinished_path(tmp_path, 2)
            path.mkdir(parents=True)
            for name in "ab":
                (path / name).write_bytes(b"weights")
            publish(tmp_path, 2, 1, 0.0, total_limit=1)
        except Crash:
            pass
    found = complete_checkpoints(tmp_path)
    assert found and found[-1].step in (1, 2)
    for checkpoint in found:
        expected = {1: {"part", "complete.json"}, 2: {"a", "b", "complete.json"}}[checkpoint.step]
        assert {path.name for path in checkpoint.path.iterdir()} == expected
        assert json.loads((checkpoint.path / "complete.json").read_text())["step"] == checkpoint.step
    remove_unfinished(tmp_path)
    assert not (tmp_path / "unfinished").exists()
    save(tmp_path, 3, total_limit=1)
    assert steps(tmp_path) == [3]
