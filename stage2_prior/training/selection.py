"""Selection of the best evaluated weights, and early stopping.

output_dir/best/          the best weights so far, saved by `save_pretrained`; every checkpoint holds a copy
  evaluation.json         step and eval_loss of these weights

Not transformers' EarlyStoppingCallback: it counts evaluations in memory, so its patience does not survive a resume.
Here patience is a function of the log history, which every checkpoint holds.
"""

import math
import os
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from configs.checksums import Damaged
from configs.files import read_json, remove_tree, write_json

FOLDER = "best"
EVALUATION_NAME = "evaluation.json"


def evaluations(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """The evaluations in a `TrainerState.log_history`, oldest first."""
    return [logs for logs in history if "eval_loss" in logs]


def is_exhausted(history: list[dict[str, float]], patience: int) -> bool:
    """Whether none of the last `patience` evaluations had a lower loss than all before; never with patience 0."""
    losses = [logs["eval_loss"] for logs in evaluations(history)]
    return bool(patience and losses) and len(losses) - 1 - losses.index(min(losses)) >= patience


def read_evaluation(path: Path) -> dict[str, Any]:
    """`step` and `eval_loss` of the best weights.

    Raises:
        Damaged: the file is missing or malformed.
    """
    try:
        evaluation = read_json(path)
    except (OSError, ValueError) as error:
        raise Damaged(f"{path}: this file is missing or malformed ({error})") from error
    if [type(evaluation.get(name)) for name in ("step", "eval_loss")] != [int, float]:
        raise Damaged(f"{path}: received {evaluation!r}; needs a step and an eval_loss")
    return evaluation


class BestWeights:
    """The folder of the best evaluated weights of a run."""

    def __init__(self, output_dir: Path):
        self.path = output_dir / FOLDER

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """`step` and `eval_loss` of the weights; None before the first evaluation."""
        file = self.path / EVALUATION_NAME
        return read_evaluation(file) if file.is_file() else None

    def restore(self, checkpoint: Path | None) -> None:
        """Restores the folder from the copy in a checkpoint; None empties it, for a new run."""
        remove_tree(self.path)
        if checkpoint is not None and (checkpoint / FOLDER).is_dir():
            shutil.copytree(checkpoint / FOLDER, self.path)

    def copy_to(self, checkpoint: Path) -> None:
        """Copies the folder into a checkpoint."""
        if self.path.is_dir():
            shutil.copytree(self.path, checkpoint / FOLDER)

    def move_to(self, folder: Path) -> dict[str, Any]:
        """Moves the weights into an empty folder; returns their evaluation."""
        evaluation = self.evaluation
        assert evaluation is not None, "a run evaluates at its last step"
        for file in self.path.iterdir():
            os.replace(file, folder / file.name)
        (folder / EVALUATION_NAME).unlink()
        self.path.rmdir()
        return evaluation


class Selection(TrainerCallback):
    """After every evaluation: saves the weights if they are the best so far, and ends the run if patience is exhausted.

    Args:
        trainer: saves the weights.
        best: the folder of the best weights; None saves no weights.
        patience: number of evaluations without a lower loss that ends the run; 0 never ends it.
    """

    def __init__(self, trainer: Any, best: BestWeights | None, patience: int):
        self.trainer, self.best, self.patience = trainer, best, patience
        self._lowest = math.inf

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.best is not None and self.best.evaluation is not None:
            self._lowest = self.best.evaluation["eval_loss"]

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.best is not None:
            self._save_if_better(self.best, evaluations(state.log_history)[-1])
        if is_exhausted(state.log_history, self.patience):
            control.should_save = control.should_training_stop = True

    def _save_if_better(self, best: BestWeights, evaluation: dict[str, float]) -> None:
        if evaluation["eval_loss"] >= self._lowest:
            return
        self._lowest = evaluation["eval_loss"]
        if self.trainer.is_world_process_zero():
            best.restore(None)
        self.trainer.save_model(str(best.path))  # on all processes, because a sharded model is gathered
        if self.trainer.is_world_process_zero():
            write_json(best.path / EVALUATION_NAME, {name: evaluation[name] for name in ("step", "eval_loss")})
