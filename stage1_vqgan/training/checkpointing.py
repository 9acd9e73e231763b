"""The contents of a checkpoint of stage 1. configs/checkpoints.py describes how a checkpoint is completed.

checkpoint-1000/
  model.safetensors                    the generator
  average.safetensors                  its moving average
  optimizer.safetensors, .json         its optimizer
  alignment.safetensors                the projection that loss.alignment_weight trains, if it is above 0
  monitor.safetensors                  counters of code use
  discriminator.safetensors            this and the following ones, if the run has a discriminator
  discriminator_optimizer.safetensors, .json
  anchors.safetensors                  LeCam's anchors

The seed and the step determine all random numbers, so a checkpoint holds no state of a generator.
"""

from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from configs import ConfigError, Problem
from configs.checkpoints import unfinished_path
from configs.checksums import Damaged
from configs.optimizer_states import load_optimizer_state, optimizer_state
from configs.run_folder import RunFolder
from configs.states import read_state, read_tensors, refuse_pickles, require_like, write_state, write_tensors
from stage1_vqgan.training.step import VQGANTrainer

OF_DISCRIMINATOR = {"discriminator.safetensors", "discriminator_optimizer.safetensors", "anchors.safetensors"}


def save(run: RunFolder, accelerator: Accelerator, trainer: VQGANTrainer, step: int) -> None:
    """Saves a checkpoint after `step` optimizer steps. All processes must call this."""
    # Only the main process saves its counters of code use, so they become the sums over all processes.
    trainer.monitor.reduce(lambda counts: accelerator.reduce(counts.clone(), "sum"))
    _clear_counters_of_other_processes(accelerator, trainer)
    if accelerator.is_main_process:
        _write(unfinished_path(run.path, step), trainer)
        run.publish(step, accelerator.num_processes)
    accelerator.wait_for_everyone()


def load(path: Path, accelerator: Accelerator, trainer: VQGANTrainer) -> None:
    """Loads a checkpoint into the run. All processes must call this.

    Raises:
        ConfigError: a file is missing, damaged or no safetensors or JSON; or the checkpoint has a discriminator and
            the run has none, or the other way round.
    """
    try:
        refuse_pickles(path)
        _refuse_another_game(path, trainer)
        _read(path, trainer)
    except Damaged as error:
        raise ConfigError([Problem("resume_from_checkpoint", str(error))]) from error
    _clear_counters_of_other_processes(accelerator, trainer)


def _write(path: Path, trainer: VQGANTrainer) -> None:
    path.mkdir(parents=True)
    for name, module in _modules(trainer).items():
        write_tensors(path / f"{name}.safetensors", module.state_dict())
    for name, (optimizer, parameters) in _optimizers(trainer).items():
        write_state(path / name, optimizer_state(optimizer, parameters))


def _read(path: Path, trainer: VQGANTrainer) -> None:
    for name, module in _modules(trainer).items():
        file = path / f"{name}.safetensors"
        saved = read_tensors(file)
        require_like(saved, module.state_dict(), file)
        module.load_state_dict(saved)
    for name, (optimizer, parameters) in _optimizers(trainer).items():
        load_optimizer_state(read_state(path / name), optimizer, parameters, path / f"{name}.json")


def _modules(trainer: VQGANTrainer) -> dict[str, nn.Module]:
    """The modules of a checkpoint, by the names of their files."""
    modules: dict[str, nn.Module] = {"model": trainer.model, "average": trainer.average, "monitor": trainer.monitor}
    if trainer.alignment is not None:
        modules["alignment"] = trainer.accelerator.unwrap_model(trainer.alignment)
    if trainer.discriminator is not None:
        modules["discriminator"] = trainer.accelerator.unwrap_model(trainer.discriminator)
        modules["anchors"] = trainer.discriminator_terms.anchors
    return modules


def _optimizers(trainer: VQGANTrainer) -> dict[str, tuple[Optimizer, dict[str, nn.Parameter]]]:
    """The optimizers of a checkpoint and the parameters that they train, by the names of their files."""
    modules = _modules(trainer)
    of_generator = dict(modules["model"].named_parameters())
    if "alignment" in modules:
        of_generator |= dict(modules["alignment"].named_parameters(prefix="alignment"))
    optimizers = {"optimizer": (trainer.optimizer.optimizer, of_generator)}
    if trainer.discriminator is not None:
        of_discriminator = dict(modules["discriminator"].named_parameters())
        optimizers["discriminator_optimizer"] = (trainer.discriminator_optimizer.optimizer, of_discriminator)
    return optimizers


def _refuse_another_game(path: Path, trainer: VQGANTrainer) -> None:
    has, needs = any((path / name).exists() for name in OF_DISCRIMINATOR), trainer.discriminator is not None
    config = trainer.config
    starts_late = config.loss.adversarial_weight > 0 and not needs  # the saved discriminator is then not needed
    if has == needs or starts_late:
        return
    loss, kind = config.loss, "with" if has else "without"
    received = f"received {loss.adversarial_weight} (start at step {loss.adversarial_start_step})"
    message = (
        f"{received}, but {path} is of a run {kind} a discriminator, and a run cannot change that; choose "
        "another output_dir (model_name_or_path takes the model of a finished run)"
    )
    raise ConfigError([Problem("loss.adversarial_weight", message)])


def state_to_check(trainer: VQGANTrainer) -> Iterable[tuple[str, Iterable[Tensor]]]:
    """The tensors of a checkpoint that can overflow in training, by the name of their owner."""
    yield "the generator", trainer.model.parameters()
    yield "the moving average", trainer.average.parameters()
    if trainer.alignment is not None:
        yield "the projection of the alignment", trainer.alignment.parameters()
    optimizers = {"generator": trainer.optimizer}
    if trainer.discriminator is not None:
        yield "the discriminator", chain(trainer.discriminator.parameters(), trainer.discriminator.buffers())
        yield "the discriminator's LeCam anchors", trainer.discriminator_terms.anchors.buffers()
        optimizers["discriminator"] = trainer.discriminator_optimizer
    for name, optimizer in optimizers.items():
        moments = [value for state in optimizer.state.values() for value in state.values()]
        if moments:
            yield f"the {name}'s optimizer", moments


def _clear_counters_of_other_processes(accelerator: Accelerator, trainer: VQGANTrainer) -> None:
    """Clears the counters of code use on all processes but the main one, which holds the sums of all."""
    if not accelerator.is_main_process:
        trainer.monitor.clear()
