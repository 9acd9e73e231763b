"""Settings of `tessella run`."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Le

from configs import ConfigError, Section, load_config
from configs.sections import Positive
from stage1_vqgan import DataConfig

BUDGET = re.compile(r"(\d+(?:\.\d+)?) ?(steps?|minutes?|min|hours?|h)")
MINUTES = {"m": 1, "h": 60}


@dataclass(kw_only=True)
class RunConfig(Section):
    """Takes images through all steps: train-tokenizer, tokenize, train-prior, build, evaluate, and push if asked.

    A step that is finished is skipped, one that was stopped goes on. Every step's own command is printed.

    data: folder of images, in which each sub-folder is a class, or another source that `data.dataset` of a training
        takes; or a section with the keys of `data` in a training
    output_dir: folder of all results: vqgan/, codes/, prior/, pipeline/, metrics.json and the pictures
    size: side of square images in pixels, or [height, width]; by default that of the preset
    channels: 1 trains on gray images, 3 on colour images; by default as the preset says
    classes: false ignores the classes of the images
    budget: "30 minutes" or "2 hours" for all steps together, or "2000 steps" for each training; by default the steps of
        the presets. Minutes become steps after a few steps have been timed
    push: upload the pipeline to this repository of the Hugging Face Hub, as "user/name"
    license: license of the uploaded model, an identifier of the Hub such as apache-2.0
    stage1, stage2: presets or YAML files of both trainings; by default own/cpu without a GPU, else own/64, own/128 or
        own/256, the first that is at least the shorter side of `size`
    """

    data: str | dict[str, Any]
    output_dir: str
    size: Positive | list[Positive] | None = None
    channels: Annotated[int, Ge(1), Le(1024)] | None = None
    classes: bool = True
    budget: str | None = None
    push: str | None = None
    license: str | None = None
    stage1: str | None = None
    stage2: str | None = None

    @property
    def data_keys(self) -> dict[str, Any]:
        """The keys of `data` in each step."""
        keys = {"dataset": self.data} if isinstance(self.data, str) else self.data
        return keys if self.classes else {**keys, "use_labels": False}

    @property
    def minutes(self) -> float | None:
        """The budget in minutes; None if it is none, or in steps."""
        match = BUDGET.fullmatch(self.budget or "")
        return float(match[1]) * MINUTES[match[2][0]] if match and match[2][0] in MINUTES else None

    @property
    def steps(self) -> int | None:
        """The budget in steps of each training; None if it is none, or in minutes."""
        match = BUDGET.fullmatch(self.budget or "")
        return int(float(match[1])) if match and match[2][0] == "s" else None

    def problems(self) -> Iterable[tuple[str, Any, str]]:
        if self.budget is not None and not (self.minutes or self.steps):
            yield "budget", self.budget, "must be such as '30 minutes', '2 hours' or '2000 steps', and not 0"
        try:
            load_config(DataConfig, overrides=self.data_keys)
        except ConfigError as error:
            yield from ((f"data.{problem.key}", None, problem.message) for problem in error.problems)
