"""Reports of a run: a progress bar, scalars in the trackers and in metrics.jsonl, and grids of images."""

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

from configs import to_dict
from configs.run_folder import RunFolder
from configs.yaml_files import as_code


class LogInterval:
    """The scalars of all micro steps since the last log. The host waits for the device only when it computes means.

    Args:
        accelerator: averages over processes.

    Attributes:
        collected: by name, `(optimizer steps done before, scalar)` of every micro step.
        images: number of images, over all processes.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.collected: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
        self.images = 0
        self._started = time.perf_counter()

    def add(self, step: int, images: int, metrics: dict[str, Tensor]) -> None:
        """Adds a micro step.

        Args:
            step: optimizer steps done before it.
            images: number of images of this process.
            metrics: scalars by name.
        """
        for name, value in metrics.items():
            self.collected[name].append((step, value))
        self.images += images * self.accelerator.num_processes

    def means(self) -> dict[str, float]:
        """Means over the micro steps and the processes."""
        means = {name: torch.stack([v for _, v in steps]).float().mean() for name, steps in self.collected.items()}
        return {name: self.accelerator.reduce(means[name], "mean").item() for name in sorted(means)}

    @property
    def images_per_second(self) -> float:
        """Training speed of all processes together, without the time inside `paused`."""
        return self.images / (time.perf_counter() - self._started)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time inside from `images_per_second`."""
        since = time.perf_counter()
        yield
        self._started += time.perf_counter() - since


class Reporter:
    """Reports the scalars and images of a run, from the main process only.

    Args:
        accelerator: created with `log_with`; its trackers start here.
        run: the run, whose folder gets `metrics.jsonl` and a folder for each kind of image.
        start: optimizer steps done before this session.
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
        if accelerator.is_main_process:
            self._settings()

    def _settings(self) -> None:
        """Gives the settings to the trackers: TensorBoard as a text, the others as their configuration."""
        settings = to_dict(self.run.config)
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_text("config", as_code(settings))  # type: ignore[attr-defined]
            else:
                tracker.store_init_configuration(settings)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Logs scalars by names like `loss/l1`."""
        if not self.accelerator.is_main_process:
            return
        self.accelerator.log(values, step=step)
        self.run.log(step, values)

    def evaluation(self, metrics: dict[str, float], step: int) -> None:
        """Logs the metrics of an evaluation, and prints them in a line."""
        self.scalars({f"eval/{name}": value for name, value in metrics.items()}, step)
        if self.accelerator.is_main_process:
            self.bar.write(f"step {step}: {', '.join(f'{name} {value:.4g}' for name, value in metrics.items())}")

    def show(self, values: dict[str, float]) -> None:
        """Shows values beside the progress bar."""
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()}, refresh=False)

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """Saves an image as `name/step_00001000.png`, and logs it."""
        if not self.accelerator.is_main_process:
            return
        self.run.save_image(name, image, step)
        pixels = np.asarray(image.convert("RGB"))[None]
        for tracker in self.accelerator.trackers:
            log_images: Any = getattr(tracker, "log_images", None)
            if tracker.name == "tensorboard":
                log_images({name: pixels}, step=step, dataformats="NHWC")
            elif tracker.name == "trackio":  # accelerate has no call for it
                from trackio import Image as TrackedImage

                tracker.log({name: TrackedImage(pixels[0])}, step=step)
            elif log_images is not None:
                log_images({name: list(pixels)}, step=step)

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *exception: Any) -> None:
        """Closes the bar and the trackers. Not `Accelerator.end_training`, which also ends the process group."""
        self.bar.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()
