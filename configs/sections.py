"""What every typed configuration shares: strict keys, and the training keys that mean the same in both stages."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

LARGEST = 2**31 - 1
Positive = Annotated[int, Ge(1), Le(LARGEST)]
NonNegative = Annotated[int, Ge(0), Le(LARGEST)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
Seed = Annotated[int, Ge(0), Le(2**32 - 1)]
Momentum = Annotated[float, Ge(0), Lt(1)]

# What `accelerate launch` was told. Taken when this is imported, for Trainer sets the same variables later on.
LAUNCHED_WITH = {
    name: os.environ.get(f"ACCELERATE_{name}") for name in ("MIXED_PRECISION", "USE_FSDP", "USE_DEEPSPEED")
}


@dataclass(kw_only=True)
class Section:
    """A group of settings. Unknown keys are errors; subclasses add rules across fields.

    Attributes:
        refused: keys that a user may expect here, and why they do not exist.
    """

    refused: ClassVar[dict[str, str]] = {}

    def problems(self) -> Iterable[tuple[str, Any, str]]:
        """Broken rules across fields, as `(key, value received, what is allowed and what to do)`.

        The text names every other key of the rule. If one of these keys is wrong itself, the loader leaves this problem
        out.
        """
        return ()

    def library_problems(self) -> Iterable[tuple[str, Any, str]]:
        """Broken rules that need torch or transformers, which take seconds to import.

        The loader calls this only when `problems` and the types of all fields are in order, so that a mistake in them
        is reported at once.
        """
        return ()


def upload_problems(config: Any) -> Iterable[tuple[str, Any, str]]:
    """Problems of `push_to_hub` and `hub_model_id`, as `Section.problems` has them."""
    if config.push_to_hub and not config.hub_model_id:
        yield "hub_model_id", config.hub_model_id, "push_to_hub needs the repository to push to, as 'user/name'"


@dataclass(kw_only=True)
class TrainingConfig(Section):
    """Settings of a training run that both stages share, named as in `transformers.TrainingArguments`.

    output_dir: folder of the run: checkpoints, logs, and at the end the trained model itself
    max_steps: optimizer steps of the whole run
    per_device_train_batch_size, per_device_eval_batch_size: images on one device in one forward
    gradient_accumulation_steps: forwards that make one optimizer step
    global_batch_size: images in one optimizer step over all processes; sets per_device_train_batch_size
    learning_rate, lr_scheduler_type, warmup_steps: peak rate, its shape over the run, steps of linear warm-up
    adam_beta1, adam_beta2, weight_decay: AdamW
    max_grad_norm: gradients above this norm are scaled down to it; 0 turns clipping off
    ema_decay: of the averaged weights, which are evaluated and saved; 0 turns averaging off
    bf16: bfloat16 autocast (parameters stay float32)
    seed: with the step, the only source of randomness
    logging_steps, eval_steps, save_steps: how often, in optimizer steps
    save_total_limit: checkpoints kept; older ones are removed after a newer one is complete
    resume_from_checkpoint: "latest", "none", or a path
    allow_config_changes: go on in a folder whose run was started with other settings, or on other processes
    dataloader_num_workers: processes that decode images; 0 decodes in the training process
    report_to: accelerate trackers, for instance ["tensorboard", "wandb"]; scalars always go to metrics.jsonl too
    push_to_hub, hub_model_id, hub_private_repo: upload the trained model when done
    """

    output_dir: str
    max_steps: Positive
    per_device_train_batch_size: Positive = 32
    per_device_eval_batch_size: Positive = 64
    gradient_accumulation_steps: Positive = 1
    global_batch_size: Positive | None = None
    learning_rate: PositiveFloat = 1e-4
    lr_scheduler_type: Literal["constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    warmup_steps: NonNegative = 0
    adam_beta1: Momentum = 0.9
    adam_beta2: Momentum = 0.95
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: NonNegativeFloat = 1.0
    ema_decay: Momentum = 0.999
    bf16: bool = False
    seed: Seed = 0
    logging_steps: Positive = 50
    eval_steps: Positive = 1000
    save_steps: Positive = 1000
    save_total_limit: Positive = 2
    resume_from_checkpoint: str = "latest"
    allow_config_changes: bool = False
    dataloader_num_workers: NonNegative = 0
    report_to: list[str] = ("tensorboard",)  # type: ignore[assignment]
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private_repo: bool | None = None

    def __post_init__(self) -> None:
        self.report_to = list(self.report_to)

    @property
    def mixed_precision(self) -> str:
        """As `accelerate launch --mixed_precision` calls it."""
        return "bf16" if self.bf16 else "no"

    def device_batch_size(self, num_processes: int) -> int:
        """Images on one device in one forward: `per_device_train_batch_size`, or what `global_batch_size` makes it."""
        if self.global_batch_size is None:
            return self.per_device_train_batch_size
        return self.global_batch_size // (num_processes * self.gradient_accumulation_steps)

    def average_decay(self, step: int) -> float:
        """Decay of the averaged weights after a step (from 0): a young average follows quickly, (1 + n) / (10 + n)."""
        return min(self.ema_decay, (1 + step) / (10 + step))

    def problems(self) -> Iterable[tuple[str, Any, str]]:
        if self.warmup_steps > self.max_steps:
            yield "warmup_steps", self.warmup_steps, f"must be at most max_steps ({self.max_steps})"
        yield from upload_problems(self)
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        parts = processes * self.gradient_accumulation_steps
        if self.global_batch_size is not None and self.global_batch_size % parts:
            factors = f"{processes} (processes) × {self.gradient_accumulation_steps} (gradient_accumulation_steps)"
            yield "global_batch_size", self.global_batch_size, f"must be a multiple of {factors} = {parts}"
        launched = LAUNCHED_WITH["MIXED_PRECISION"] or "no"  # which is also what the launcher says if told nothing
        if launched not in ("no", self.mixed_precision):
            here = ", or set bf16: true here" if launched == "bf16" else ""
            allowed = (
                f"accelerate launch, or its config file, says mixed_precision {launched}; leave it out there{here}"
            )
            yield "bf16", self.bf16, allowed

    def library_problems(self) -> Iterable[tuple[str, Any, str]]:
        if set(self.report_to) <= {"tensorboard"}:  # a dependency of this package: always installed
            return
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

        installed = sorted(str(tracker) for tracker in get_available_trackers())
        for tracker in self.report_to:
            if tracker not in installed:
                known = tracker in LOGGER_TYPE_TO_CLASS
                reason = f"the package {tracker} is not installed" if known else "there is no such tracker"
                yield "report_to", self.report_to, f"{reason}; installed: {', '.join(installed)}"
