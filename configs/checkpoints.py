"""Checkpoints of a run, in both stages: written beside, synced, marked and renamed, so that a crash leaves none half.

output_dir/
  checkpoint-1000/     complete: it has its name only since everything in it, the marker last, is on the disk
    complete.json      optimizer steps done, processes of the run, seconds of training so far
    …                  what the stage saves
  unfinished/          a checkpoint that is being written, or removed; of no use after a crash
"""

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from configs.problems import ConfigError, Problem

MARKER_NAME = "complete.json"
UNFINISHED = "unfinished"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        path: its folder.
        step: optimizer steps done.
        num_processes: of the run that saved it.
        seconds: spent in training until then, over all sessions of the run.
    """

    path: Path
    step: int
    num_processes: int
    seconds: float


def complete_checkpoints(output_dir: str | Path) -> list[Checkpoint]:
    """The complete checkpoints of a run, oldest first."""
    found = [read_checkpoint(path) for path in Path(output_dir).glob("checkpoint-*")]
    return sorted((checkpoint for checkpoint in found if checkpoint is not None), key=lambda found: found.step)


def read_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint in a folder; None unless it is complete."""
    name = re.fullmatch(r"checkpoint-(\d+)", path.name)
    try:
        about = json.loads((path / MARKER_NAME).read_text())
        checkpoint = Checkpoint(path, about["step"], about["num_processes"], about["seconds"])
    except (OSError, ValueError, KeyError):
        return None
    return checkpoint if name is not None and int(name[1]) == checkpoint.step else None


def unfinished_path(output_dir: str | Path, step: int) -> Path:
    """Where a checkpoint is written before it is published."""
    return Path(output_dir) / UNFINISHED / f"checkpoint-{step}"


def publish(output_dir: str | Path, step: int, num_processes: int, seconds: float, total_limit: int) -> Path:
    """Makes the checkpoint at `unfinished_path` a complete one; then the oldest beyond `total_limit` are removed.

    For one process, when all others have written their part.
    """
    partial, final = unfinished_path(output_dir, step), Path(output_dir) / f"checkpoint-{step}"
    about = asdict(Checkpoint(final, step, num_processes, round(seconds, 1)))
    del about["path"]
    (partial / MARKER_NAME).write_text(json.dumps(about) + "\n")
    _sync(partial)
    if final.exists():  # without a marker, else the run would have gone on from it
        shutil.rmtree(final)
    partial.rename(final)
    _sync_folder(final.parent)
    for old in complete_checkpoints(output_dir)[:-total_limit]:
        # moved first: what has a checkpoint's name is never half removed
        old.path.rename(partial.with_name(f"{old.path.name}-removed"))
    remove_unfinished(output_dir)
    return final


def remove_unfinished(output_dir: str | Path) -> None:
    """Removes what an interrupted save or removal left."""
    shutil.rmtree(Path(output_dir) / UNFINISHED, ignore_errors=True)


def find_checkpoint(output_dir: str | Path, resume_from_checkpoint: str, max_steps: int) -> Checkpoint | None:
    """The checkpoint to go on from, or None to start anew.

    Args:
        output_dir: folder of the run.
        resume_from_checkpoint: "latest" (if there is one), "none", or a path: of the newest in the folder, or of one
            elsewhere that the run starts from; when it has checkpoints of its own, those count.
        max_steps: of the run.

    Raises:
        ConfigError: the path is not a complete checkpoint, is older than others in the folder, or is from beyond the
            end of the run; or a fresh start would mix with the checkpoints of an earlier run.
    """
    key, existing = "resume_from_checkpoint", complete_checkpoints(output_dir)
    if resume_from_checkpoint == "none":
        if existing:
            message = f"received 'none', but {output_dir} holds checkpoints; choose another output_dir or remove them"
            raise ConfigError([Problem(key, message)])
        return None
    if resume_from_checkpoint == "latest":
        chosen = existing[-1] if existing else None
    else:
        chosen = read_checkpoint(Path(resume_from_checkpoint).expanduser())
        if chosen is None:
            allowed = "needs 'latest', 'none' or the path of a complete checkpoint-N"
            raise ConfigError([Problem(key, f"received {resume_from_checkpoint!r}; {allowed}")])
        is_inside = chosen.path.parent.resolve() == Path(output_dir).resolve()
        later = [str(other.path) for other in existing if other.step > chosen.step]
        if existing and not is_inside:  # the run has begun there, and has come further since
            chosen = existing[-1]
        elif later:
            message = f"received {resume_from_checkpoint!r}, but the run would mix with later ones"
            advice = f"move or remove {', '.join(later)}, or choose another output_dir"
            raise ConfigError([Problem(key, f"{message}; {advice}")])
    if chosen is not None and chosen.step > max_steps:
        message = f"received {max_steps}, but {chosen.path} is further on; choose another output_dir"
        raise ConfigError([Problem("max_steps", message)])
    return chosen


def _sync(folder: Path) -> None:
    """Waits until a folder with everything in it is on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
