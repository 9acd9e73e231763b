"""Checkpoints of a stage 1 run: written beside and renamed, so that what has a checkpoint's name is complete.

output_dir/
  checkpoint-1000/
    model.safetensors, model_1.safetensors       generator, discriminator
    optimizer.bin, optimizer_1.bin
    custom_checkpoint_0.pkl, custom_checkpoint_1.pkl   moving average, codebook statistics
    random_states_{rank}.pkl
"""

import re
import shutil
from pathlib import Path

from accelerate import Accelerator

from configs import ConfigError, Problem


def save(accelerator: Accelerator, output_dir: str | Path, step: int, total_limit: int) -> Path:
    """Saves a checkpoint; all processes must call this. Older ones beyond `total_limit` are removed afterwards."""
    final = Path(output_dir) / f"checkpoint-{step}"
    partial = final.with_name(f"{final.name}.partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        for old in list_checkpoints(output_dir)[:-total_limit]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done when the checkpoint was saved."""
    return int(checkpoint.name.rpartition("-")[2])


def find(output_dir: str | Path, resume_from_checkpoint: str, max_steps: int) -> Path | None:
    """The checkpoint to go on from, or None to start anew.

    Args:
        output_dir: folder of the run.
        resume_from_checkpoint: "latest" (if there is one), "none", or a path.
        max_steps: of the run.

    Raises:
        ConfigError: the path is not a checkpoint, or one from beyond the end of the run; or a fresh start would mix
            with the checkpoints of an earlier run.
    """
    existing = list_checkpoints(output_dir)
    if resume_from_checkpoint == "latest":
        return _within(existing[-1], max_steps) if existing else None
    if resume_from_checkpoint == "none":
        if existing:
            message = f"received 'none', but {output_dir} holds checkpoints; choose another output_dir or remove them"
            raise ConfigError([Problem("resume_from_checkpoint", message)])
        return None
    path = Path(resume_from_checkpoint)
    if not path.is_dir() or not re.fullmatch(r"checkpoint-\d+", path.name):
        message = f"received {resume_from_checkpoint!r}; needs 'latest', 'none' or the path of a checkpoint-N folder"
        raise ConfigError([Problem("resume_from_checkpoint", message)])
    return _within(path, max_steps)


def _within(checkpoint: Path, max_steps: int) -> Path:
    if step_of(checkpoint) > max_steps:
        message = f"received {max_steps}, but {checkpoint} is further on; choose another output_dir"
        raise ConfigError([Problem("max_steps", message)])
    return checkpoint
