"""What a run shows: a progress bar, scalars in the trackers and in metrics.jsonl, grids of images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm


class Reporter:
    """Scalars and images of a run; does nothing on other processes than the main one.

    Args:
        accelerator: made with `log_with`; its trackers are started here.
        output_dir: gets `metrics.jsonl`, and the images in a folder of their own.
        start, total: step the run goes on from, and steps in all.
    """

    def __init__(self, accelerator: Accelerator, output_dir: str | Path, start: int, total: int):
        self.accelerator = accelerator
        self.folder = Path(output_dir)
        self.bar = tqdm(
            total=total,
            initial=start,
            desc="stage 1",
            unit="step",
            disable=not accelerator.is_main_process,
            smoothing=0.05,
        )
        accelerator.init_trackers("tessella-stage1")

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Logs scalars under names like `loss/pixel`."""
        if not self.accelerator.is_main_process:
            return
        self.accelerator.log(values, step=step)
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def show(self, values: dict[str, float]) -> None:
        """Puts values beside the progress bar."""
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()}, refresh=False)

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """Saves an image as `name/step_00001000.png` and logs it."""
        if not self.accelerator.is_main_process:
            return
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        image.save(folder / f"step_{step:08d}.png")
        pixels = np.asarray(image.convert("RGB"))[None]
        for tracker in self.accelerator.trackers:
            log_images: Any = getattr(tracker, "log_images", None)
            if tracker.name == "tensorboard":
                log_images({name: pixels}, step=step, dataformats="NHWC")
            elif log_images is not None:
                log_images({name: list(pixels)}, step=step)

    def close(self) -> None:
        """Ends the bar and the trackers; `Accelerator.end_training` would end the process group as well."""
        self.bar.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()
