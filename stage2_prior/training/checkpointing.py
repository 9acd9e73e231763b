"""What a checkpoint of stage 2 holds besides the weights. configs/checkpoints.py describes how it is completed.

checkpoint-1000/
  model.safetensors, or adapter_model.safetensors   the weights, with the JSON files of `save_pretrained`
  optimizer.safetensors, optimizer.json             optimizer, scheduler of the learning rate, scaler of the gradients
  trainer_state.json                                Trainer's counters and logs
  average.safetensors                               see averaging.py
  best/                                             see selection.py

The seed and the step determine all random numbers, so a checkpoint holds no state of a generator.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerState

from configs import ConfigError, Problem
from configs.checkpoints import Checkpoint
from configs.checksums import Damaged
from configs.files import read_json
from configs.optimizer_states import load_optimizer_state, optimizer_state
from configs.resumed_settings import ALLOW
from configs.states import (
    fill,
    read_state,
    read_tensors,
    refuse_pickles,
    require_like,
    require_values_like,
    write_state,
)
from stage2_prior.training.averaging import FILE_NAME as AVERAGE_NAME
from stage2_prior.training.config import Stage2Config
from stage2_prior.training.selection import EVALUATION_NAME, FOLDER as BEST_FOLDER, evaluations

logger = logging.getLogger(__name__)

TRAINER_STATE_NAME = "trainer_state.json"
STATES = "optimizer"


@contextmanager
def refusing_damage() -> Iterator[None]:
    """Turns `Damaged` inside the context, which names a file of the checkpoint, into a `ConfigError`."""
    try:
        yield
    except Damaged as error:
        raise ConfigError([Problem("resume_from_checkpoint", str(error))]) from error


def check_checkpoint(checkpoint: Checkpoint, config: Stage2Config, is_main_process: bool) -> list[dict[str, Any]]:
    """Checks a checkpoint before Trainer reads it, and returns the log history.

    With `allow_config_changes`, a missing average or missing best weights begin anew; the main process says so.

    Raises:
        Damaged: the checkpoint holds a pickle, or a file is missing or malformed.
    """
    refuse_pickles(checkpoint.path)
    history = read_trainer_state(checkpoint.path, checkpoint.step).log_history
    needed = [AVERAGE_NAME] if config.ema_decay > 0 else []
    needed += [f"{BEST_FOLDER}/{EVALUATION_NAME}"] if config.keep_best and evaluations(history) else []
    for path in (checkpoint.path / name for name in needed):
        if path.is_file():
            continue
        if not config.allow_config_changes:
            raise Damaged(f"{path}: this file is missing; if the run was started without it, {ALLOW}")
        if is_main_process:
            logger.warning("%s does not exist: the run begins a new one at this step", path)
    return history


def save_weights(model: Any, folder: Path, state_dict: dict[str, Tensor] | None) -> None:
    """Saves a prior or its adapter. `state_dict` holds the gathered weights if they are sharded."""
    model.save_pretrained(folder, state_dict=state_dict)
    (folder / "README.md").unlink(missing_ok=True)  # peft's template of a model card


def load_weights(model: Any, checkpoint: Path) -> None:
    """Loads what `save_weights` saved into a model, which may be sharded.

    Raises:
        Damaged: a file is missing or damaged, or the weights are not those of the model.
    """
    adapted = hasattr(model, "peft_config")
    file = checkpoint / ("adapter_model.safetensors" if adapted else "model.safetensors")
    paths = sorted(checkpoint.glob("model-*.safetensors")) or [file]  # `save_pretrained` may have divided the weights
    saved = {name: tensor for path in paths for name, tensor in read_tensors(path).items()}
    weights = _weights_of_adapter(model) if adapted else model.state_dict(keep_vars=True)
    tied = {id(weights[name]) for name in saved if name in weights}  # of tied weights, one is saved
    expected = {name: weight for name, weight in weights.items() if name in saved or id(weight) not in tied}
    require_like(saved, expected, file)
    for name, weight in expected.items():
        fill(weight.detach(), saved[name])


def save_states(trainer: Any, folder: Path) -> None:
    """Saves the states of optimizer, scheduler and scaler. All processes must call this."""
    states = {"optimizer": optimizer_state(*_optimizer(trainer)), **_plain_states(trainer)}
    write_state(folder / STATES, states, trainer.is_world_process_zero())


def load_states(trainer: Any, checkpoint: Path) -> None:
    """Loads what `save_states` saved.

    Raises:
        Damaged: a file is missing or damaged, or the states are not those of this run.
    """
    file, saved, own = checkpoint / f"{STATES}.json", read_state(checkpoint / STATES), _plain_states(trainer)
    optimizer = saved.pop("optimizer", None)
    require_values_like(saved, own, file, "states")
    load_optimizer_state(optimizer, *_optimizer(trainer), file)
    trainer.lr_scheduler.load_state_dict(saved["scheduler"])
    if "scaler" in own:
        trainer.accelerator.scaler.load_state_dict(saved["scaler"])


def read_trainer_state(checkpoint: Path, step: int) -> TrainerState:
    """Trainer's counters and logs after `step` optimizer steps.

    Raises:
        Damaged: the file is missing or malformed.
    """
    path = checkpoint / TRAINER_STATE_NAME
    try:
        state = TrainerState(**read_json(path))
    except (OSError, TypeError, ValueError) as error:
        raise Damaged(f"{path}: this file is missing or malformed ({error})") from error
    if state.global_step != step:
        raise Damaged(f"{path}: global_step: received {state.global_step!r}; the checkpoint is of step {step}")
    numbers = [state.total_flos, *_numbers(state.log_history)]
    if not all(isinstance(number, int | float) for number in numbers):
        raise Damaged(f"{path}: total_flos, or a step or a loss in log_history, is not a number")
    return state


def _numbers(history: Any) -> Iterator[Any]:
    """The step of each log in `TrainerState.log_history`, and the validation losses; None for what is malformed."""
    for logs in history if isinstance(history, list) else [None]:
        yield logs.get("step") if isinstance(logs, dict) else None
        if isinstance(logs, dict) and "eval_loss" in logs:
            yield logs["eval_loss"]


def _weights_of_adapter(model: Any) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model)


def _optimizer(trainer: Any) -> tuple[torch.optim.Optimizer, dict[str, nn.Parameter]]:
    """Trainer's optimizer without accelerate's wrapper, and the parameters of the model."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return trainer.optimizer.optimizer, dict(model.named_parameters())


def _plain_states(trainer: Any) -> dict[str, Any]:
    """The states of scheduler and, if training uses one, scaler. Both hold plain values only."""
    scaler = trainer.accelerator.scaler
    return {"scheduler": trainer.lr_scheduler.state_dict()} | ({"scaler": scaler.state_dict()} if scaler else {})
