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

from configs.checkpoints import unfinished_path
from configs.run_folder import RunFolder
from stage1_vqgan.training_step import VQGANTrainer


def save(run: RunFolder, accelerator: Accelerator, trainer: VQGANTrainer, step: int) -> None:
    """Saves a checkpoint after `step` steps; all processes must call this."""
    trainer.pool_statistics()
    accelerator.save_state(str(unfinished_path(run.path, step)))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        run.publish(step, accelerator.num_processes)
    accelerator.wait_for_everyone()


def load(path: Path, accelerator: Accelerator, trainer: VQGANTrainer) -> None:
    """Puts a checkpoint's state into the run; all processes must call this."""
    accelerator.load_state(str(path))
    trainer.keep_statistics_on_main_process()
