"""Replaces the files of a saved model together: after a crash, the folder holds all of the old or all of the new files.

folder/
  .saving/     the new files, while they are written; useless after a crash
  .saved/      the same folder, renamed when all of its files are on disk; from then on, the new files count
    files.json     their names

The new files then move from `.saved` to their places, and weights of the old model that the new one lacks are removed.
If a crash interrupts this, the next reader or writer of the folder goes on with it.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import rename, replace
from pathlib import Path

from configs.checksums import Damaged, is_inside, write_checksums
from configs.disk_space import naming_full_disk, require_space
from configs.files import (
    NO_WRITING,
    make_folder,
    new_file_mode,
    read_json,
    remove_tree,
    sync_folder,
    sync_tree,
    write_json,
)
from configs.problems import shown

SAVING, SAVED, NAMES = ".saving", ".saved", "files.json"

# Every folder of a model has one of these files.
MARKS = ("config.json", "adapter_config.json", "model_index.json")

# Files that a loader would mix with the new model, if they stayed from an older one.
WEIGHTS = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "discriminator.safetensors",
    "adapter_model.safetensors",
    "adapter_config.json",
    "checksums.json",
)


@contextmanager
def replaced_files(folder: str | Path, needed: int = 0) -> Iterator[Path]:
    """Yields an empty folder. At the end of the context, its files replace those of the same names in `folder`.

    Every folder in it with a config.json or model_index.json gets a checksums.json. After an error, `folder` has not
    changed.

    Args:
        folder: created if it does not exist.
        needed: bytes that the new files need at least.

    Raises:
        DiskFull: the disk has too little space.
    """
    staged = new_staging(folder)
    try:
        require_space(staged, needed, "the model")
        with naming_full_disk(folder):
            yield staged
            publish(folder)
    except BaseException:
        remove_tree(staged)
        raise


def new_staging(folder: str | Path) -> Path:
    """Creates `folder` and an empty `.saving` in it, and returns the latter. Completes an interrupted replacement."""
    folder = Path(folder)
    finish_interrupted(folder)
    staged = folder / SAVING
    remove_tree(staged)
    make_folder(staged)
    return staged


def publish(folder: str | Path) -> None:
    """Replaces the files of `folder` by those in its `.saving`."""
    folder = Path(folder)
    staged = folder / SAVING
    parents = {path.parent for path in staged.rglob("*") if path.name in MARKS}
    for parent in sorted(parents, reverse=True):  # a folder after its subfolders, whose checksums it lists
        write_checksums(parent)
    names = [path.relative_to(staged).as_posix() for path in sorted(staged.rglob("*")) if path.is_file()]
    _require_one_disk(folder, names)
    write_json(staged / NAMES, {"files": names})
    new_file_mode(staged)
    sync_tree(staged)
    remove_tree(folder / SAVED)  # remains of a replacement that has moved all files
    rename(staged, folder / SAVED)
    sync_folder(folder)
    finish_interrupted(folder)


def finish_interrupted(folder: str | Path) -> None:
    """Moves the files in `.saved` to their places, if the folder has one. Does nothing otherwise.

    Raises:
        Damaged: files.json is malformed or names files outside the folder, which may come from a stranger.
        OSError: the files cannot be moved, for instance because the folder is read-only.
    """
    folder = Path(folder)
    saved = folder / SAVED
    if saved.is_symlink() or not (saved / NAMES).is_file():
        return
    try:
        _move_all(saved, folder)
    except OSError as error:
        if error.errno not in NO_WRITING:
            raise
        advice = "make it writable, or copy it to a place that is"
        reason = f"holds a model whose saving was interrupted, and is not writable, so the saving cannot end; {advice}"
        raise OSError(error.errno, reason, str(folder)) from error


def _move_all(saved: Path, folder: Path) -> None:
    names = _names(saved / NAMES, folder)
    parents = {(folder / name).parent for name in names}
    for parent in parents:
        parent.mkdir(parents=True, exist_ok=True)
        for path in _replaced_weights(parent, folder, names):
            path.unlink(missing_ok=True)
    for name in names:
        with suppress(FileNotFoundError):  # moved before the crash, or by another process right now
            replace(saved / name, folder / name)
    for parent in parents:
        sync_folder(parent)
    remove_tree(saved)


def _replaced_weights(parent: Path, folder: Path, names: list[str]) -> set[Path]:
    """The weights of an older model in a folder for which `names` has a new model."""
    new = {folder / name for name in names}
    if parent / "model_index.json" in new:  # a pipeline, whose weights are in its subfolders
        return set()
    if not new & {parent / mark for mark in ("config.json", "adapter_config.json")}:
        return set()
    return {path for pattern in WEIGHTS for path in parent.glob(pattern)} - new


def _require_one_disk(folder: Path, names: list[str]) -> None:
    for parent in {(folder / name).parent for name in names}:
        if parent.exists() and parent.stat().st_dev != folder.stat().st_dev:
            reason = f"is on another disk than {folder}, so its files cannot be replaced at once; move it there"
            raise OSError(errno.EXDEV, reason, str(parent))


def _names(path: Path, folder: Path) -> list[str]:
    names = read_json(path).get("files")
    if not isinstance(names, list):
        raise Damaged(f"{path}: received {shown(names)}; must list the names of files; remove {path.parent}")
    for name in names:
        if not isinstance(name, str) or not (is_inside(name, folder) and is_inside(name, path.parent)):
            raise Damaged(f"{path}: received {shown(name)}; may name only files inside; remove {path.parent}")
    return names
