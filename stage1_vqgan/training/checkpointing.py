"""What a checkpoint of stage 1 holds. How it becomes a complete one is told in configs/checkpoints.py.

checkpoint-1000/
  model.safetensors, model_1.safetensors       generator, discriminator
  optimizer.bin, optimizer_1.bin
  custom_checkpoint_0.pkl, custom_checkpoint_1.pkl   moving average, codebook statistics
  custom_checkpoint_2.pkl                      LeCam's anchors, of a run with a discriminator
  random_states_{rank}.pkl
"""

from pathlib import Path

from accelerate import Accelerator

from configs import ConfigError, Problem
from configs.checkpoints import unfinished_path
from configs.run_folder import RunFolder
from stage1_vqgan.training.step import VQGANTrainer

DISCRIMINATOR_FILE = "model_1.safetensors"


def save(run: RunFolder, accelerator: Accelerator, trainer: VQGANTrainer, step: int) -> None:
    """Saves a checkpoint after `step` steps; all processes must call this."""
    trainer.pool_statistics()
    accelerator.save_state(str(unfinished_path(run.path, step)))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        run.publish(step, accelerator.num_processes)
    accelerator.wait_for_everyone()


def load(path: Path, accelerator: Accelerator, trainer: VQGANTrainer) -> None:
    """Puts a checkpoint's state into the run; all processes must call this.

    Raises:
        ConfigError: the run was without a discriminator and shall go on with one, or the other way round.
    """
    has, needs = (path / DISCRIMINATOR_FILE).exists(), trainer.discriminator is not None
    if has != needs:
        value, kind = trainer.config.loss.adversarial_weight, "with" if has else "without"
        message = (
            f"received {value}, but {path} is of a run {kind} a discriminator, which cannot come or go; start another "
            "output_dir (model_name_or_path takes the model of a run that has finished)"
        )
        raise ConfigError([Problem("loss.adversarial_weight", message)])
    accelerator.load_state(str(path))
    trainer.keep_statistics_on_main_process()
