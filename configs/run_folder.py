"""The folder of a training run, in both stages: its configuration, checkpoints and logs, and at the end its results.

The messages that both stages share are here too: the run is finished, it was stopped, it diverged, it was uploaded.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from configs.checkpoints import (
    Checkpoint,
    checkpoint_folders,
    complete_checkpoints,
    find_checkpoint,
    publish,
    remove_unfinished,
    unfinished_path,
)
from configs.disk_space import naming_full_disk, require_space
from configs.files import append_line, read_json, write_json, write_png, write_text
from configs.folder_lock import locked_folder
from configs.hub import check_push, push_run
from configs.interruption import Diverged, Stopped
from configs.loader import save_config
from configs.machine import hardware
from configs.problems import ConfigError, Problem
from configs.resumed_settings import ALLOW, require_same_settings
from configs.sections import NonNegative, launched_processes
from configs.staging import SAVING, finish_interrupted, replaced_files
from configs.values import read_value

CONFIG_NAME = "config.yaml"
RESULTS_NAME = "train_results.json"
LOG_NAME = "metrics.jsonl"


def holds_work(folder: str | Path) -> bool:
    """Whether the folder of a run holds checkpoints or results."""
    return (Path(folder) / RESULTS_NAME).is_file() or bool(checkpoint_folders(folder))


class RunFolder:
    """The folder of a new or a resumed run. While it is open, no other job can open it.

    Every process of the run opens it; only the main process locks and writes.

    Args:
        config: the resolved settings.
        is_main_process: whether this process writes the files.
        export: writes the files to upload from the folder of the run into another, for a repository of this name;
            only a run with `push_to_hub` needs it.

    Raises:
        ConfigError: on entering, if another job has the folder open; if the folder holds a run that was started with
            other settings, unless `config.allow_config_changes`; or if the upload at the end would fail.
    """

    def __init__(
        self, config: Any, is_main_process: bool = True, export: Callable[[Path, Path, str], None] | None = None
    ):
        self.config, self.is_main_process, self._export = config, is_main_process, export
        self.path = Path(config.output_dir)
        self._open = contextlib.ExitStack()
        self._started = time.perf_counter()
        self._resumed_from: Path | None = None

    def __enter__(self) -> "RunFolder":
        with contextlib.ExitStack() as opened:  # closed again after an error
            if self.is_main_process:
                opened.enter_context(locked_folder(self.path, "output_dir"))
                finish_interrupted(self.path)
            opened.enter_context(naming_full_disk(self.path))
            if holds_work(self.path):
                self._require_settings()
                self._require_same_settings(self.path)
            if self.is_main_process and self.config.push_to_hub and self.results is None:
                check_push(self.config.hub_model_id, self.config.hub_private_repo, self.config.license)
            self._open = opened.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._open.__exit__(*exception)

    @property
    def results(self) -> dict[str, Any] | None:
        """The results of a finished run: it has done `max_steps`, or has stopped early with the same patience.

        Raises:
            ConfigError: the file of the results is damaged.
        """
        path = self.path / RESULTS_NAME
        if not path.is_file():
            return None
        try:
            results = read_json(path)
            step = read_value(NonNegative, results.get("global_step"), strict=True)
        except ValueError as error:
            message = f"{path} is damaged ({error}); remove it, and the run resumes from its newest checkpoint"
            raise ConfigError([Problem("output_dir", message)]) from error
        patience = results.get("early_stopping_patience")
        stopped_early = patience is not None and patience == self.config.early_stopping_patience
        return results if stopped_early or step >= self.config.max_steps else None

    @property
    def seconds(self) -> float:
        """Time spent on the run so far, over all of its sessions."""
        return time.perf_counter() - self._started

    def _require_settings(self) -> None:
        if not (self.path / CONFIG_NAME).is_file() and not self.config.allow_config_changes:
            message = f"{self.path} holds a run without its {CONFIG_NAME}, so its settings are unknown; restore it, or"
            raise ConfigError([Problem("output_dir", f"{message} {ALLOW}")])

    @contextlib.contextmanager
    def loading_result(self) -> Iterator[None]:
        """The model of a finished run is loaded inside this context.

        Raises:
            ConfigError: it cannot be loaded; the message says how to save it again.
        """
        try:
            yield
        except (OSError, ValueError) as error:
            advice = (
                f"remove {self.path / RESULTS_NAME}, and the same command saves it again from the newest checkpoint"
            )
            raise ConfigError([Problem("output_dir", f"the finished model is damaged: {error}; {advice}")]) from error

    def report_if_finished(self) -> bool:
        """Whether the run was finished before; if so, reports it, and uploads the model if `push_to_hub` is set."""
        results = self.results
        if results is None:
            return False
        if self.is_main_process:
            print(f"{self.path} holds the finished run ({results['global_step']} steps); nothing to do")
            self._push()
        return True

    def begin(self, num_processes: int) -> Checkpoint | None:
        """Prepares the folder for training, and returns the complete checkpoint to resume from; None for a new run.

        Call it after all other checks, because it is the first call that changes the folder. It saves the settings, and
        removes the log lines of later steps than the checkpoint.

        Raises:
            ConfigError: see `find_checkpoint`; or the checkpoint was saved by another number of processes, or by a
                run with other settings.
        """
        config = self.config
        checkpoint = find_checkpoint(self.path, config.resume_from_checkpoint, config.max_steps)
        if checkpoint is not None:
            self._check_origin(checkpoint, num_processes)
            self._started -= checkpoint.seconds
            self._resumed_from = checkpoint.path
        if self.is_main_process:
            remove_unfinished(self.path)
            (self.path / RESULTS_NAME).unlink(missing_ok=True)
            save_config(config, self.path / CONFIG_NAME)
            self._cut_log(checkpoint.step if checkpoint is not None else 0)
            if checkpoint is not None:
                print(f"resuming from {checkpoint.path}")
        return checkpoint

    def publish(self, step: int, num_processes: int) -> Path:
        """Completes the checkpoint that all processes have written at `unfinished_path`. Main process only."""
        return publish(self.path, step, num_processes, self.seconds, self.config.save_total_limit)

    @contextlib.contextmanager
    def saving_checkpoint(self, step: int, needed: int) -> Iterator[None]:
        """A checkpoint is written inside this context. After an error, the unfinished checkpoint is removed.

        Args:
            step: optimizer steps done.
            needed: bytes of the checkpoint's tensors.

        Raises:
            DiskFull: the disk has too little space.
        """
        folder = unfinished_path(self.path, step)
        try:
            if self.is_main_process:
                require_space(self.path, needed, f"the checkpoint of step {step}")
            with naming_full_disk(folder):
                yield
        except BaseException:
            if self.is_main_process:
                remove_unfinished(self.path)
            raise

    @contextlib.contextmanager
    def replaced_model(self, needed: int = 0) -> Iterator[Path]:
        """Yields the folder in which the trained model is saved; its files then replace those of an older model.

        All processes enter it, because a sharded model is gathered. Only the main process writes.

        Args:
            needed: bytes of the model.

        Raises:
            DiskFull: the disk has too little space.
        """
        if self.is_main_process:
            with replaced_files(self.path, needed) as staged:
                yield staged
        else:
            yield self.path / SAVING

    def log(self, step: int, values: dict[str, float]) -> None:
        """Appends a line to metrics.jsonl. Main process only."""
        append_line(self.path / LOG_NAME, json.dumps({"step": step, **values}))

    def save_image(self, name: str, image: Any, step: int) -> None:
        """Saves a PIL image as `name/step_00001000.png`. Main process only."""
        folder = self.path / name
        folder.mkdir(exist_ok=True)
        write_png(folder / f"step_{step:08d}.png", image)

    def finish(self, step: int, results: dict[str, Any]) -> None:
        """Writes the results, which marks the run as finished; then uploads the model if `push_to_hub` is set.

        Main process only.

        Args:
            step: optimizer steps done.
            results: further entries of train_results.json.
        """
        machine = hardware(launched_processes())
        written = {"global_step": step, "train_runtime": round(self.seconds, 1), "hardware": machine}
        write_json(self.path / RESULTS_NAME, {**written, **results})
        self._push()

    def stopped(self, step: int, signal_number: int) -> Stopped:
        """The exception for a run that a signal has stopped, after its checkpoint was saved."""
        message = f"stopped after step {step} of {self.config.max_steps}, which is saved in {self.path}"
        return Stopped(f"{message}; the same command resumes from there", signal_number)

    def diverged(self, reason: str) -> Diverged:
        """The exception for a run whose numbers are no longer finite.

        Args:
            reason: which numbers, and at which step.
        """
        checkpoints = complete_checkpoints(self.path)
        last = checkpoints[-1].path if checkpoints else self._resumed_from
        saved = f"the last good checkpoint is {last}" if last is not None else "no checkpoint was saved yet"
        advice = "Try a lower learning_rate, more warmup_steps, max_grad_norm 1, or bf16 false"
        return Diverged(f"{reason}; {saved}. {advice}")

    def _push(self) -> None:
        if self.config.push_to_hub:
            print(f"uploaded to {push_run(self.config, self._export)}")

    def _check_origin(self, checkpoint: Checkpoint, num_processes: int) -> None:
        if checkpoint.path.parent.resolve() != self.path.resolve():
            self._require_same_settings(checkpoint.path.parent)
        if checkpoint.num_processes != num_processes and not self.config.allow_config_changes:
            message = f"received {num_processes}, but {checkpoint.path} was saved by {checkpoint.num_processes}"
            advice = f"batches would change; launch the same number of processes, or {ALLOW}"
            raise ConfigError([Problem("number of processes", f"{message}: {advice}")])

    def _require_same_settings(self, folder: Path) -> None:
        require_same_settings(self.config, folder / CONFIG_NAME, warn=self.is_main_process)

    def _cut_log(self, step: int) -> None:
        """Removes the lines logged after a step: the resumed run logs them again."""
        path = self.path / LOG_NAME
        if not path.is_file():
            return
        kept = []
        for line in path.read_text(errors="replace").splitlines(keepends=True):
            with contextlib.suppress(
                ValueError, TypeError, KeyError, RecursionError
            ):  # a crash may have cut the last line off
                if json.loads(line)["step"] <= step:
                    kept.append(line)
        write_text(path, "".join(kept))
