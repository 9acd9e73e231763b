"""Checkpoints of a run, in both stages. A checkpoint is complete or absent, even after a crash.

It is written to another folder and synced to disk, the marker file last. Then the folder is renamed.

output_dir/
  checkpoint-1000/     a complete checkpoint: it gets this name only when all of its files are on disk
    complete.json      the marker: optimizer steps done, number of processes, seconds of training so far, and the size
                       and checksum of every other file
    …                  files of the stage
  unfinished/          a checkpoint that is being written or removed; useless after a crash
"""

import logging
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.checksums import Damaged, listing, verify_listing
from configs.files import new_file_mode, read_json, remove_tree, sync_folder, sync_tree, write_json
from configs.problems import ConfigError, Problem, one_line

MARKER_NAME = "complete.json"
UNFINISHED = "unfinished"
START_ANEW = "remove it to start anew, or choose another output_dir"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        path: its folder.
        step: optimizer steps done.
        num_processes: number of processes that saved it.
        seconds: training time until this step, over all sessions of the run.
    """

    path: Path
    step: int
    num_processes: int
    seconds: float


def checkpoint_folders(output_dir: str | Path) -> list[Path]:
    """The folders of all checkpoints of a run, damaged ones too, oldest first."""
    names = (re.fullmatch(r"checkpoint-(\d{1,18})", path.name) for path in Path(output_dir).glob("checkpoint-*"))
    return [Path(output_dir, name[0]) for name in sorted(filter(None, names), key=lambda name: int(name[1]))]


def complete_checkpoints(output_dir: str | Path) -> list[Checkpoint]:
    """The checkpoints of a run whose marker can be read, oldest first. Other files are not read."""
    found = []
    for path in checkpoint_folders(output_dir):
        with suppress(Damaged):
            found.append(_read_marker(path)[0])
    return found


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder. Compares all of its files with their checksums.

    Raises:
        Damaged: a file is missing, has changed or does not belong to the checkpoint. The message names the file.
    """
    checkpoint, files = _read_marker(path)
    try:
        verify_listing(files, path)
    except OSError as error:
        raise Damaged(f"{error.filename}: this file cannot be read ({error.strerror})") from error
    unknown = {file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir()}
    if unknown := unknown - {*files, MARKER_NAME}:
        raise Damaged(f"{path / min(unknown)}: this file does not belong to the checkpoint")
    return checkpoint


def _read_marker(path: Path) -> tuple[Checkpoint, dict[str, Any]]:
    marker = path / MARKER_NAME
    try:
        values = read_json(marker)
    except FileNotFoundError:
        raise Damaged(f"{marker}: this file is missing") from None
    except (OSError, ValueError) as error:
        raise Damaged(f"{marker}: {str(error).removeprefix(f'{marker}: ')}") from error
    if "files" not in values:
        raise Damaged(f"{marker}: lists no files; an earlier version wrote this checkpoint, finish the run with it")
    kinds = {"step": int, "num_processes": int, "seconds": int | float, "files": dict}
    for key, kind in kinds.items():
        if not isinstance(values.get(key), kind) or values[key] is True:
            raise Damaged(f"{marker}: {key}: received {values.get(key)!r}")
    if path.name != f"checkpoint-{values['step']}":
        raise Damaged(f"{marker}: step: received {values['step']}, which the name of the folder contradicts")
    return Checkpoint(path, values["step"], values["num_processes"], values["seconds"]), values["files"]


def unfinished_path(output_dir: str | Path, step: int) -> Path:
    """The folder in which a checkpoint is written before it is published."""
    return Path(output_dir) / UNFINISHED / f"checkpoint-{step}"


def publish(output_dir: str | Path, step: int, num_processes: int, seconds: float, total_limit: int) -> Path:
    """Completes the checkpoint at `unfinished_path`, then removes the oldest checkpoints beyond `total_limit`.

    One process calls this, after all processes have written their files.

    Returns:
        Folder of the complete checkpoint.
    """
    partial, final = unfinished_path(output_dir, step), Path(output_dir) / f"checkpoint-{step}"
    files = listing((path for path in partial.rglob("*") if path.is_file()), partial)
    marker = {"step": step, "num_processes": num_processes, "seconds": round(seconds, 1), "files": files}
    write_json(partial / MARKER_NAME, marker)
    new_file_mode(partial)
    sync_tree(partial)
    # Later checkpoints are damaged: the run would have resumed from them. An equal step is damaged too.
    for path in checkpoint_folders(output_dir):
        if int(path.name.rpartition("-")[2]) > step:
            path.rename(partial.with_name(f"{path.name}-damaged"))
    if final.exists():
        final.rename(partial.with_name(f"{final.name}-damaged"))
    partial.rename(final)
    sync_folder(final.parent)
    for old in complete_checkpoints(output_dir)[:-total_limit]:
        # Rename first: a folder named checkpoint-N must never be half removed.
        old.path.rename(partial.with_name(f"{old.path.name}-removed"))
    remove_unfinished(output_dir)
    return final


def remove_unfinished(output_dir: str | Path) -> None:
    """Removes the remains of an interrupted save or removal."""
    remove_tree(Path(output_dir) / UNFINISHED)


def find_checkpoint(output_dir: str | Path, resume_from_checkpoint: str, max_steps: int) -> Checkpoint | None:
    """The checkpoint to resume from, or None to start a new run.

    Args:
        output_dir: folder of the run.
        resume_from_checkpoint: "latest" for the newest checkpoint in the folder, if any; "none"; or a path. The path is
            that of the newest checkpoint in the folder, or of a checkpoint in another folder. The latter starts the
            run; once the run has checkpoints of its own, it resumes from its newest one.
        max_steps: optimizer steps of the whole run.

    Raises:
        ConfigError: the path is not a complete checkpoint, the folder holds later ones, or the checkpoint lies beyond
            `max_steps`; or with "none" the folder already holds checkpoints.
    """
    key = "resume_from_checkpoint"
    if resume_from_checkpoint == "none":
        if checkpoint_folders(output_dir):
            message = f"received 'none', but {output_dir} holds checkpoints; choose another output_dir or remove them"
            raise ConfigError([Problem(key, message)])
        return None
    if resume_from_checkpoint == "latest":
        chosen = _newest_intact(output_dir)
    else:
        try:
            chosen = read_checkpoint(Path(resume_from_checkpoint).expanduser())
        except Damaged as error:
            allowed = "needs 'latest', 'none' or the path of a complete checkpoint-N"
            raise ConfigError([Problem(key, f"received {resume_from_checkpoint!r}; {allowed} ({error})")]) from error
        is_inside = chosen.path.parent.resolve() == Path(output_dir).resolve()
        existing = complete_checkpoints(output_dir)
        later = [str(other.path) for other in existing if other.step > chosen.step]
        if existing and not is_inside:  # the run started from that path, and has saved checkpoints since then
            chosen = _newest_intact(output_dir)
        elif later:
            message = f"received {resume_from_checkpoint!r}, but the run would mix with later ones"
            advice = f"move or remove {', '.join(later)}, or choose another output_dir"
            raise ConfigError([Problem(key, f"{message}; {advice}")])
    if chosen is not None and chosen.step > max_steps:
        message = f"received {max_steps}, but {chosen.path} has more steps; raise it, or choose another output_dir"
        raise ConfigError([Problem("max_steps", message)])
    return chosen


def _newest_intact(output_dir: str | Path) -> Checkpoint | None:
    """The newest checkpoint whose files are as they were saved; None if the folder has no checkpoint.

    A damaged newer one is reported. The run then repeats the steps since the older one.

    Raises:
        ConfigError: all checkpoints are damaged.
    """
    damaged: list[Damaged] = []
    for path in reversed(checkpoint_folders(output_dir)):
        try:
            checkpoint = read_checkpoint(path)
        except Damaged as error:
            damaged.append(error)
            continue
        for problem in damaged if os.environ.get("RANK", "0") == "0" else []:
            logger.warning("%s; resuming from the older %s", one_line(problem), checkpoint.path)
        return checkpoint
    if damaged:
        problems = [Problem("resume_from_checkpoint", str(error)) for error in damaged]
        raise ConfigError([*problems, Problem("output_dir", START_ANEW)], f"{output_dir}: no checkpoint is intact")
    return None
