"""What Trainer does not give to its trackers: our settings, and images."""

from typing import Any

import numpy as np
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from configs import to_dict
from configs.yaml_files import as_code
from stage2_prior.compat import tracker_of
from stage2_prior.training.config import Stage2Config


class SettingsOnTrackers(TrainerCallback):
    """Gives the settings of the run to the trackers: to TensorBoard as a text, to the others as their configuration.

    Args:
        trainer: the prior's Trainer. Its trackers start before this callback.
        config: the settings.
    """

    def __init__(self, trainer: Any, config: Stage2Config):
        self.trainer, self.config = trainer, config

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        settings = to_dict(self.config)
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_text("config", as_code(settings))
            elif (tracker := tracker_of(callback)) is not None:
                tracker.config.update({"config": settings}, allow_val_change=True)


def track_image(callbacks: list[TrainerCallback], name: str, image: Image.Image, step: int) -> None:
    """Logs an image to the trackers among Trainer's callbacks that accept images: TensorBoard, wandb and trackio."""
    pixels = np.asarray(image.convert("RGB"))
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_image(name, pixels, step, dataformats="HWC")
        elif (tracker := tracker_of(callback)) is not None:
            tracker.log({name: tracker.Image(pixels), "train/global_step": step})
