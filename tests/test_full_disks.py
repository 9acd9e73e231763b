"""A command that finds no space says so, leaves what was saved before, and goes on when there is space."""

import os
import shutil
import subprocess

import pytest
from PIL import Image

from configs.disk_space import DiskFull, is_disk_full, naming_full_disk, require_space
from configs.files import write_png
from tests import kill_runs
from tests.slow import few

GO_ON = "What was saved before is intact. Make space, then start the same command again: it goes on from there"


def used(folder):
    """Bytes of a folder's files, in whole pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


def refusal(folder, log):
    """The message of a command that found no space, the last line of its output."""
    text = log.read_text()
    assert "Traceback" not in text and "terminate" not in text, text[-3000:]
    lines = text.strip().splitlines()
    assert lines[-1].startswith("the disk is full: ") and lines[-1].endswith(GO_ON), text[-3000:]
    assert not list(folder.rglob("*.partial")) and not list(folder.rglob("unfinished/*"))
    return lines[-1]


# The largest file that the disk can hold: too small for the states of a checkpoint, and for a shard.
@pytest.mark.parametrize(("name", "largest"), few([("stage1", 20_000), ("tokenize", 4_000)], ("stage1", 20_000)))
def test_a_run_without_space_goes_on_when_there_is_space(name, largest, undisturbed, tmp_path):
    kill_runs.prepare(name, undisturbed, tmp_path)
    assert kill_runs.run(name, tmp_path, largest_file=largest) == 4, (tmp_path / "log.txt").read_text()[-3000:]
    refusal(tmp_path / kill_runs.FOLDERS[name], tmp_path / "log.txt")
    assert kill_runs.run(name, tmp_path) == 0
    assert kill_runs.differences(name, undisturbed, tmp_path) == []


def test_needed_and_free_space_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 3_000_000))
    require_space(tmp_path, 3_000_000, "the checkpoint of step 7")
    with pytest.raises(DiskFull, match=rf"the checkpoint of step 7 needs 3\.1 MB in {tmp_path}, and only 3\.0 MB are"):
        require_space(tmp_path, 3_100_000, "the checkpoint of step 7")


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError(122, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_errors_of_all_libraries_are_recognised(tmp_path, error):
    wanted = pytest.raises(DiskFull, match=r"model\.safetensors could not be written: .* are free")
    with wanted, naming_full_disk(tmp_path / "model.safetensors"):
        raise error
    wrapped = ValueError("saving failed")
    wrapped.__cause__ = error
    assert is_disk_full(wrapped) and not is_disk_full(OSError(2, "No such file"))


def test_a_picture_is_whole_or_absent(tmp_path):
    path = tmp_path / "samples.png"
    write_png(path, Image.new("L", (2, 2), 7))
    before = path.read_bytes()

    class Growing:
        def save(self, file, format):
            file.write(before[:9])
            raise OSError(28, "No space left on device")

    with pytest.raises(DiskFull, match=r"samples\.png could not be written"):
        write_png(path, Growing())
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_full_shared_memory_is_no_full_disk(tmp_path):
    """Containers have 64 MB of shared memory by default."""
    wanted = pytest.raises(DiskFull, match=r"shared memory.*dataloader_num_workers 0")
    with wanted, naming_full_disk(tmp_path):
        raise RuntimeError("unable to resize file </torch_5_1_0> to the right size: No space left on device (28)")


class SmallDisk:
    """A file system of a given size in memory, mounted at a folder."""

    def __init__(self, folder, size):
        self.folder = folder
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size // 4096 * 4096}", "tmpfs", str(folder)]
        if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting a file system needs root")

    def resize(self, size):
        subprocess.run(["mount", "-o", f"remount,size={size // 4096 * 4096}", str(self.folder)], check=True)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        subprocess.run(["umount", "-l", str(self.folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [6])
@pytest.mark.parametrize("name", kill_runs.RUNS)
def test_every_write_may_find_the_disk_full(name, steps, undisturbed, tmp_path):
    """Repeats a run on disks of growing size, so that the writes fail one after the other."""
    (tmp_path / "earlier").mkdir()
    kill_runs.prepare(name, undisturbed, tmp_path / "earlier")
    start, whole = used(tmp_path / "earlier"), used(undisturbed / kill_runs.FOLDERS[name])
    refused = set()
    for step in range(steps):
        folder, log = tmp_path / str(step), tmp_path / f"log_{step}.txt"
        with SmallDisk(folder, start + 2**14 + whole * step // steps) as disk:
            shutil.copytree(tmp_path / "earlier", folder, dirs_exist_ok=True)
            code = kill_runs.run(name, folder, log=log)
            assert code in (0, 4), log.read_text()[-3000:]
            if code == 4:
                refused.add(refusal(folder / kill_runs.FOLDERS[name], log))
            disk.resize(start + 4 * whole + 2**20)
            assert kill_runs.run(name, folder, log=log) == 0, log.read_text()[-3000:]
            assert kill_runs.differences(name, undisturbed, folder) == []
    print(name, *sorted(refused), sep="\n")
    assert refused


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stage1", "stage2", "build"])
def test_a_model_is_the_old_or_the_new_one_when_the_disk_is_full(name, undisturbed, tmp_path):
    """A finished run is lengthened, or a pipeline rebuilt from other models, on disks of growing size."""
    longer = tmp_path / "longer"
    shutil.copytree(undisturbed, longer)
    changed = f"{name}/changed"
    assert kill_runs.run(changed, longer) == 0, (longer / "log.txt").read_text()[-3000:]
    old, new = kill_runs.weights(name, undisturbed), kill_runs.weights(name, longer)
    assert old != new
    start, whole = used(undisturbed), used(longer / kill_runs.FOLDERS[name])
    codes = []
    for step in range(4):
        folder, log = tmp_path / str(step), tmp_path / f"log_{step}.txt"
        with SmallDisk(folder, start + 2**14 + whole * step // 4) as disk:
            shutil.copytree(undisturbed, folder, dirs_exist_ok=True)
            codes.append(kill_runs.run(changed, folder, log=log))
            assert codes[-1] in (0, 4), log.read_text()[-3000:]
            assert kill_runs.weights(name, folder) == (new if codes[-1] == 0 else old)
            disk.resize(start + 4 * whole + 2**20)
            assert kill_runs.run(changed, folder, log=log) == 0, log.read_text()[-3000:]
            assert kill_runs.weights(name, folder) == new
    assert 4 in codes
