"""A damaged run is refused or resumes from an undamaged checkpoint: it never ends with other weights."""

import json
import shutil

import pytest

from configs import ConfigError
from configs.checkpoints import checkpoint_folders, find_checkpoint
from tests import kill_runs
from tests.fuzz.harness import cases, damaged, generator, outcome


def started(name, undisturbed, folder):
    """A run that was stopped after its last checkpoint, before its model was saved."""
    made = kill_runs.FOLDERS[name]
    for part in (*kill_runs.NEEDED[name], made):
        shutil.copytree(undisturbed / part, folder / part)
    for file in (folder / made).iterdir():
        if file.is_file() and file.name not in ("config.yaml", "metrics.jsonl", "token_layout.json"):
            file.unlink()
    settings = folder / made / "config.yaml"
    settings.write_text(settings.read_text().replace(str(undisturbed), str(folder)))
    return folder / made


def damage(folder, draw):
    """Damages one file of a run, or exchanges, adds or removes one; returns what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    file, other = draw.choice(files), draw.choice(files)
    kind = draw.choice(["bytes"] * 6 + ["remove", "exchange", "unlist", "rename", "remove folder"])
    if kind == "bytes":
        file.write_bytes(damaged(file.read_bytes(), draw))
    elif kind == "remove":
        file.unlink()
    elif kind == "exchange":
        contents = file.read_bytes()
        file.write_bytes(other.read_bytes())
        other.write_bytes(contents)
    elif kind == "unlist":  # as if the checkpoint had never had the file
        checkpoint = draw.choice(checkpoint_folders(folder))
        marker = json.loads((checkpoint / "complete.json").read_text())
        name = draw.choice(sorted(marker["files"]))
        del marker["files"][name]
        (checkpoint / name).unlink()
        (checkpoint / "complete.json").write_text(json.dumps(marker))
        file = checkpoint / name
    elif kind == "rename":
        file.rename(file.with_name(f"{file.name}.bak"))
    else:
        file = draw.choice(checkpoint_folders(folder))
        shutil.rmtree(file)
    return kind, file.relative_to(folder).as_posix()


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@cases(short=40, long=220)
@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_the_checkpoint_that_is_found_is_as_it_was_saved(name, numbers, undisturbed, tmp_path):
    """Damage in which only the marker was rewritten is found when the checkpoint is loaded, see below."""
    good = {path.name: files(path) for path in checkpoint_folders(undisturbed / kill_runs.FOLDERS[name])}
    found = []
    for number in numbers:
        run = started(name, undisturbed, tmp_path / str(number))
        kind, _ = damage(run, generator(name, number))
        result = outcome(lambda run=run: find_checkpoint(run, "latest", 100), (ConfigError,), tmp_path)
        if not isinstance(result, ConfigError) and kind != "unlist":
            contents, saved = files(result.path), good[result.path.name]
            for each in (contents, saved) if contents != saved else ():
                marker = json.loads(each["complete.json"])  # damage of the seconds changes no weights
                each["complete.json"] = {key: value for key, value in marker.items() if key != "seconds"}
            assert contents == saved, (kind, number)
        found.append(type(result).__name__)
        shutil.rmtree(tmp_path / str(number))
    assert "Checkpoint" in found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_damaged_runs_end_as_undamaged_ones_or_are_refused(name, undisturbed, tmp_path):
    counts = {0: 0, 2: 0}
    for number in range(110):
        folder = tmp_path / str(number)
        run = started(name, undisturbed, folder)
        what = damage(run, generator(name, number))
        code, log = kill_runs.run(name, folder), (folder / "log.txt").read_text()
        assert code in counts and "Traceback" not in log, (number, what, code, log[-3000:])
        counts[code] += 1
        if code == 0:
            assert kill_runs.differences(name, undisturbed, folder) == [], (number, what)
        shutil.rmtree(folder)
    print(f"{name}: {counts[0]} ended as the undamaged run, {counts[2]} were refused")
    assert counts[0] > 55 and counts[2]
