"""What a run shows: a progress bar, scalars in the trackers and in metrics.jsonl, grids of images."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from configs.run_folder import RunFolder


class Window:
    """The numbers of all forwards since the last log; nothing waits for the device before the means are asked for.

    Args:
        accelerator: for the means over processes.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.collected: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
        self.images = 0
        self._clock = time.perf_counter()

    def add(self, step: int, images: int, metrics: dict[str, Tensor]) -> None:
        """Adds one forward: optimizer steps done before it, images of this process, scalars."""
        for name, value in metrics.items():
            self.collected[name].append((step, value))
        self.images += images * self.accelerator.num_processes

    def means(self) -> dict[str, float]:
        """Means over the forwards and the processes."""
        means = {name: torch.stack([v for _, v in steps]).float().mean() for name, steps in self.collected.items()}
        return {name: self.accelerator.reduce(means[name], "mean").item() for name in sorted(means)}

    @property
    def images_per_second(self) -> float:
        """Of all processes, without the time in `paused`."""
        return self.images / (time.perf_counter() - self._clock)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock."""
        since = time.perf_counter()
        yield
        self._clock += time.perf_counter() - since


class Reporter:
    """Scalars and images of a run; does nothing on other processes than the main one.

    Args:
        accelerator: made with `log_with`; its trackers are started here.
        run: its folder gets `metrics.jsonl`, and the images in a folder of their own.
        start: step the run goes on from.
    """

    def __init__(self, accelerator: Accelerator, run: RunFolder, start: int):
        self.accelerator, self.run = accelerator, run
        self.bar = tqdm(
            total=run.config.max_steps,
            initial=start,
            desc="stage 1",
            unit="step",
            disable=not accelerator.is_main_process,
            smoothing=0.05,
        )
        accelerator.init_trackers("tessella-stage1")

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Logs scalars under names like `loss/l1`."""
        if not self.accelerator.is_main_process:
            return
        self.accelerator.log(values, step=step)
        self.run.log(step, values)

    def show(self, values: dict[str, float]) -> None:
        """Puts values beside the progress bar."""
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()}, refresh=False)

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """Saves an image as `name/step_00001000.png` and logs it."""
        if not self.accelerator.is_main_process:
            return
        self.run.save_image(name, image, step)
        pixels = np.asarray(image.convert("RGB"))[None]
        for tracker in self.accelerator.trackers:
            log_images: Any = getattr(tracker, "log_images", None)
            if tracker.name == "tensorboard":
                log_images({name: pixels}, step=step, dataformats="NHWC")
            elif log_images is not None:
                log_images({name: list(pixels)}, step=step)

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *exception: Any) -> None:
        """Ends the bar and the trackers; `Accelerator.end_training` would end the process group as well."""
        self.bar.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()
