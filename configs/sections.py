"""What every typed configuration shares: strict keys, and the training keys that mean the same in both stages."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

Positive = Annotated[int, Gt(0)]
NonNegative = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
Momentum = Annotated[float, Ge(0), Lt(1)]


@dataclass(kw_only=True)
class Section:
    """A group of settings. Unknown keys are errors; `problems` may add checks across fields."""

    __pydantic_config__: ClassVar[Any] = {
        "extra": "forbid",
        "coerce_numbers_to_str": True,
        "allow_inf_nan": False,
        "protected_namespaces": (),
    }

    def problems(self) -> Iterable[tuple[str, Any, str]]:
        """Cross-field problems as `(key, value received, what is allowed and what to do)`."""
        return ()


@dataclass(kw_only=True)
class TrainingConfig(Section):
    """Settings of a training run that both stages share, named as in `transformers.TrainingArguments`.

    output_dir: folder of the run: checkpoints, logs, and at the end the trained model itself
    max_steps: optimizer steps of the whole run
    per_device_train_batch_size, per_device_eval_batch_size: images on one device in one forward
    gradient_accumulation_steps: forwards that make one optimizer step
    learning_rate, lr_scheduler_type, warmup_steps: peak rate, its shape over the run, steps of linear warm-up
    adam_beta1, adam_beta2, weight_decay: AdamW
    max_grad_norm: gradients above this norm are scaled down to it; 0 turns clipping off
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
    learning_rate: PositiveFloat = 1e-4
    lr_scheduler_type: Literal["constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    warmup_steps: NonNegative = 0
    adam_beta1: Momentum = 0.9
    adam_beta2: Momentum = 0.95
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: NonNegativeFloat = 1.0
    bf16: bool = False
    seed: NonNegative = 0
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

    def problems(self) -> Iterable[tuple[str, Any, str]]:
        if self.warmup_steps > self.max_steps:
            yield "warmup_steps", self.warmup_steps, f"must be at most max_steps ({self.max_steps})"
        if self.push_to_hub and not self.hub_model_id:
            yield "hub_model_id", self.hub_model_id, "push_to_hub needs the repository to push to, as 'user/name'"
