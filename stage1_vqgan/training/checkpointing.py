"""The contents of a checkpoint of stage 1. configs/checkpoints.py describes how a checkpoint is completed.

checkpoint-1000/
  model.safetensors, model_1.safetensors             generator, discriminator
  optimizer.bin, optimizer_1.bin                     their optimizers
  custom_checkpoint_0.pkl, custom_checkpoint_1.pkl   moving average, counters of code use
  custom_checkpoint_2.pkl                            LeCam's anchors, if the run has a discriminator
  random_states_{rank}.pkl                           written by accelerate, not needed: the seed determines all draws
"""

from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor

from configs import ConfigError, Problem
from configs.checkpoints import unfinished_path
from configs.run_folder import RunFolder
from stage1_vqgan.training.step import VQGANTrainer

DISCRIMINATOR_FILE = "model_1.safetensors"


def save(run: RunFolder, accelerator: Accelerator, trainer: VQGANTrainer, step: int) -> None:
    """Saves a checkpoint after `step` optimizer steps. All processes must call this."""
    # Only the main process saves its counters of code use, so they become the sums over all processes.
    trainer.monitor.reduce(lambda counts: accelerator.reduce(counts.clone(), "sum"))
    _clear_counters_of_other_processes(accelerator, trainer)
    accelerator.save_state(str(unfinished_path(run.path, step)))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        run.publish(step, accelerator.num_processes)
    accelerator.wait_for_everyone()


def load(path: Path, accelerator: Accelerator, trainer: VQGANTrainer) -> None:
    """Loads a checkpoint into the run. All processes must call this.

    Raises:
        ConfigError: the checkpoint has a discriminator and the run has none, or the other way round.
    """
    has, needs = (path / DISCRIMINATOR_FILE).exists(), trainer.discriminator is not None
    if has != needs:
        value, kind = trainer.config.loss.adversarial_weight, "with" if has else "without"
        message = (
            f"received {value}, but {path} is of a run {kind} a discriminator, and a run cannot change that; choose "
            "another output_dir (model_name_or_path takes the model of a finished run)"
        )
        raise ConfigError([Problem("loss.adversarial_weight", message)])
    accelerator.load_state(str(path))
    _clear_counters_of_other_processes(accelerator, trainer)


def state_to_check(trainer: VQGANTrainer) -> Iterable[tuple[str, Iterable[Tensor]]]:
    """The tensors of a checkpoint that can overflow in training, by the name of their owner."""
    yield "the generator", trainer.model.parameters()
    yield "the moving average", trainer.average.parameters()
    optimizers = {"generator": trainer.optimizer}
    if trainer.discriminator is not None:
        yield "the discriminator", chain(trainer.discriminator.parameters(), trainer.discriminator.buffers())
        yield "the discriminator's LeCam anchors", trainer.anchors.buffers()
        optimizers["discriminator"] = trainer.discriminator_optimizer
    for name, optimizer in optimizers.items():
        moments = [value for state in optimizer.state.values() for value in state.values()]
        if moments:
            yield f"the {name}'s optimizer", moments


def _clear_counters_of_other_processes(accelerator: Accelerator, trainer: VQGANTrainer) -> None:
    """Clears the counters of code use on all processes but the main one, which holds the sums of all."""
    if not accelerator.is_main_process:
        trainer.monitor.clear()
