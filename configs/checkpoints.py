"""Checkpoints of a run, in both stages. A checkpoint is complete or absent, even after a crash.

It is written to another folder and synced to disk, the marker file last. Then the folder is renamed.

output_dir/
  checkpoint-1000/     a complete checkpoint: it gets this name only when all of its files are on disk
    complete.json      the marker: optimizer steps done, number of processes, seconds of training so far
    …                  files of the stage
  unfinished/          a checkpoint that is being written or removed; useless after a crash
"""

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from configs.files import sync_folder, sync_tree
from configs.problems import ConfigError, Problem

MARKER_NAME = "complete.json"
UNFINISHED = "unfinished"


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


def complete_checkpoints(output_dir: str | Path) -> list[Checkpoint]:
    """The complete checkpoints of a run, oldest first."""
    found = map(read_checkpoint, Path(output_dir).glob("checkpoint-*"))
    return sorted((one for one in found if one is not None), key=lambda checkpoint: checkpoint.step)


def read_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint in a folder, or None if it is not complete."""
    name = re.fullmatch(r"checkpoint-(\d+)", path.name)
    try:
        marker = json.loads((path / MARKER_NAME).read_text())
        checkpoint = Checkpoint(path, marker["step"], marker["num_processes"], marker["seconds"])
    except (OSError, ValueError, KeyError):
        return None
    return checkpoint if name is not None and int(name[1]) == checkpoint.step else None


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
    marker = asdict(Checkpoint(final, step, num_processes, round(seconds, 1)))
    del marker["path"]
    (partial / MARKER_NAME).write_text(json.dumps(marker) + "\n")
    sync_tree(partial)
    if final.exists():  # it is incomplete, because the run would have resumed from a complete one
        shutil.rmtree(final)
    partial.rename(final)
    sync_folder(final.parent)
    for old in complete_checkpoints(output_dir)[:-total_limit]:
        # Rename first: a folder named checkpoint-N must never be half removed.
        old.path.rename(partial.with_name(f"{old.path.name}-removed"))
    remove_unfinished(output_dir)
    return final


def remove_unfinished(output_dir: str | Path) -> None:
    """Removes the remains of an interrupted save or removal."""
    shutil.rmtree(Path(output_dir) / UNFINISHED, ignore_errors=True)


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
        if existing and not is_inside:  # the run started from that path, and has saved checkpoints since then
            chosen = existing[-1]
        elif later:
            message = f"received {resume_from_checkpoint!r}, but the run would mix with later ones"
            advice = f"move or remove {', '.join(later)}, or choose another output_dir"
            raise ConfigError([Problem(key, f"{message}; {advice}")])
    if chosen is not None and chosen.step > max_steps:
        message = f"received {max_steps}, but {chosen.path} has more steps; raise it, or choose another output_dir"
        raise ConfigError([Problem("max_steps", message)])
    return chosen
