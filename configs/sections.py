"""The base class of all configurations, and the training settings that both stages share."""

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from annotated_types import Ge, Gt, Le, Lt

from configs.machine import most_workers, usual_workers
from configs.problems import shown

LARGEST = 2**31 - 1
Positive = Annotated[int, Ge(1), Le(LARGEST)]
NonNegative = Annotated[int, Ge(0), Le(LARGEST)]
LARGEST_BATCH = 2**20
BatchSize = Annotated[int, Ge(1), Le(LARGEST_BATCH)]  # images on one device in one pass
MOST_PICTURES = Le(10_000)  # images in one grid
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
Seed = Annotated[int, Ge(0), Le(2**32 - 1)]
Momentum = Annotated[float, Ge(0), Lt(1)]
Share = Annotated[float, Gt(0), Lt(1)]  # of the steps of a run
if TYPE_CHECKING:  # "auto" is replaced before a value is used, in `settle` or by configs/automatic.py
    AutoNumber: TypeAlias = int
    AutoSwitch: TypeAlias = bool
else:
    AutoNumber, AutoSwitch = NonNegative | Literal["auto"], bool | Literal["auto"]

# The options of `accelerate launch`. They are read at import, because Trainer sets the same variables later.
LAUNCHED_WITH = {
    name: os.environ.get(f"ACCELERATE_{name}") for name in ("MIXED_PRECISION", "USE_FSDP", "USE_DEEPSPEED")
}
# Variables of torchrun and `accelerate launch` that a library would fail to read; a number has a smallest value.
LAUNCHER_SWITCHES = [f"ACCELERATE_{name}" for name in ("USE_CPU", "USE_FSDP", "USE_DEEPSPEED", "DEBUG_MODE")]
LAUNCHER_NUMBERS = {"WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": -1, "MASTER_PORT": 0}
SWITCHED_ON, SWITCHED_OFF = {"1", "true", "t", "yes", "y", "on"}, {"0", "false", "f", "no", "n", "off"}


@dataclass(kw_only=True)
class Section:
    """A group of settings. Unknown keys are errors. Subclasses add rules across fields.

    Attributes:
        refused: keys that a user may expect here, and why they do not exist.
        preset: name of the command's presets in their folders: `own/cpu` then stands for `own/cpu/stage1`.
        fields_of: `{key: dataclass}`: `--help` describes the fields that the value of a key may have.
        displaces: `{key: other key}`: a key on the command line removes the other one from the file.
        positional: key that the first argument of the command sets if it follows no key and is no YAML file; None if
            this argument names a YAML file or preset.
    """

    positional: ClassVar[str | None] = None
    refused: ClassVar[dict[str, str]] = {}
    preset: ClassVar[str] = ""
    fields_of: ClassVar[dict[str, type]] = {}
    displaces: ClassVar[dict[str, str]] = {}

    def settle(self) -> None:
        """Replaces values that stand for others, such as a share of the run. Called before `problems`."""

    def problems(self) -> Iterable[tuple[str, Any, str]]:
        """Broken rules across fields, as `(key, value received, what is allowed and what to do)`.

        The text names every other key of the rule. If the value of one of these keys is itself wrong, the loader does
        not report the broken rule.
        """
        return ()

    def library_problems(self) -> Iterable[tuple[str, Any, str]]:
        """Broken rules that need torch or transformers, which take seconds to import.

        The loader calls this method only if it has found no other problem, so that the others are reported at once.
        """
        return ()


def upload_problems(config: Any) -> Iterable[tuple[str, Any, str]]:
    """Problems of `push_to_hub` and `hub_model_id`, in the form of `Section.problems`."""
    if not config.push_to_hub:
        return
    if not config.hub_model_id:
        yield "hub_model_id", config.hub_model_id, "push_to_hub needs the repository to push to, as 'user/name'"
    elif problem := name_problem(config.hub_model_id):
        yield "hub_model_id", config.hub_model_id, problem


def name_problem(name: str) -> str | None:
    """What is wrong with the name of a repository; None if the Hub accepts it."""
    from configs.hub import is_repo_id

    return None if is_repo_id(name) else "must be a name on the Hub, as 'user/name': letters, digits and - _ ."


def in_steps(value: float, max_steps: int) -> int:
    """A number of steps. A value below 1 is a share of `max_steps`, as in transformers.TrainingArguments."""
    return math.ceil(value * max_steps) if value < 1 else int(value)


def worker_problems(config: Any) -> Iterable[tuple[str, Any, str]]:
    """The problem of more `dataloader_num_workers` than the machine can run, in the form of `Section.problems`."""
    if config.dataloader_num_workers > (most := most_workers()):
        allowed = f"this machine has cores, memory and open files (ulimit -n) for at most {most}"
        yield "dataloader_num_workers", config.dataloader_num_workers, allowed


def launched_processes() -> int:
    """Number of processes of the run, as the launcher states it; 1 if `launcher_problems` refuses the statement."""
    value = os.environ.get("WORLD_SIZE", "1")
    return int(value) if re.fullmatch("[1-9][0-9]{0,8}", value) else 1


def launcher_problems() -> Iterable[tuple[str, Any, str]]:
    """Environment variables that the libraries cannot read, in the form of `Section.problems`."""
    for name in LAUNCHER_SWITCHES:
        value = os.environ.get(name, "false")
        if value.lower() not in SWITCHED_ON | SWITCHED_OFF:
            yield "", None, f"the environment has {name}={shown(value)}; must be true or false, or unset"
    for name, smallest in LAUNCHER_NUMBERS.items():
        value = os.environ.get(name, "1")
        if not re.fullmatch("-?[0-9]{1,9}", value) or int(value) < smallest:
            yield "", None, f"the environment has {name}={shown(value)}; must be a number from {smallest} up, or unset"


@dataclass(kw_only=True)
class TrainingConfig(Section):
    """Settings that both stages share, with the names of `transformers.TrainingArguments`.

    output_dir: folder of the run: checkpoints, logs, and at the end the trained model
    max_steps: optimizer steps of the whole run
    per_device_train_batch_size, per_device_eval_batch_size: images on one device in one forward pass
    gradient_accumulation_steps: forward and backward passes in one optimizer step
    global_batch_size: images in one optimizer step over all processes; replaces per_device_train_batch_size
    learning_rate: peak learning rate
    lr_scheduler_type: learning rate after the warm-up: "constant_with_warmup", "linear" or "cosine" (both fall to 0)
    warmup_steps: optimizer steps in which the learning rate grows linearly to its peak; below 1 a share of the run
    warmup_ratio: replaces warmup_steps by a share of the run; the same as a share in warmup_steps
    adam_beta1, adam_beta2, weight_decay: parameters of AdamW
    max_grad_norm: gradients with a larger norm are scaled down to this norm; 0 turns clipping off
    ema_decay: decay of the moving average of the weights, which is evaluated and saved; 0 turns averaging off
    bf16: bfloat16 autocast; parameters stay float32; "auto" turns it on if the GPU or the CPU computes in it
    seed: seed of all random numbers of the run
    logging_steps, eval_steps, save_steps: optimizer steps between two log lines, evaluations, checkpoints; below 1 a
        share of the run; after the last step all three are done
    save_total_limit: number of checkpoints to keep; a complete new one replaces the oldest
    resume_from_checkpoint: "latest" resumes from the newest checkpoint if there is one, "none" starts
        anew and refuses a folder with checkpoints, a path resumes from that checkpoint
    allow_config_changes: continue a run with other settings or another number of processes
    ddp_timeout: seconds after which a run ends whose processes wait for one of them; the message names that one
    dataloader_num_workers: processes that load data; 0 loads in the training process; "auto" takes half of the cores
    report_to: trackers of accelerate, such as [tensorboard, wandb]; metrics.jsonl is always written
    push_to_hub: upload the trained model at the end
    hub_model_id: repository of the upload, as "user/name"
    hub_private_repo: make a new repository private; null leaves this to the Hub
    license: license of the model, an identifier of the Hub such as apache-2.0; its model card states it
    """

    output_dir: str
    max_steps: Positive
    per_device_train_batch_size: BatchSize = 32
    per_device_eval_batch_size: BatchSize = 64
    gradient_accumulation_steps: Annotated[int, Ge(1), Le(2**16)] = 1
    global_batch_size: Positive | None = None
    learning_rate: PositiveFloat = 1e-4
    lr_scheduler_type: Literal["constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    warmup_steps: NonNegative | Share = 0
    warmup_ratio: Annotated[float, Ge(0), Lt(1)] | None = None
    adam_beta1: Momentum = 0.9
    adam_beta2: Momentum = 0.95
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: NonNegativeFloat = 1.0
    ema_decay: Momentum = 0.999
    bf16: AutoSwitch = False
    seed: Seed = 0
    logging_steps: Positive | Share = 50
    eval_steps: Positive | Share = 1000
    save_steps: Positive | Share = 1000
    save_total_limit: Positive = 2
    resume_from_checkpoint: str = "latest"
    allow_config_changes: bool = False
    ddp_timeout: Positive = 1800
    dataloader_num_workers: AutoNumber = 0
    report_to: list[str] = ("tensorboard",)  # type: ignore[assignment]
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private_repo: bool | None = None
    license: str | None = None

    refused: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("num_train_epochs", "epochs", "num_epochs"), "the length of a run is max_steps"),
        **dict.fromkeys(("batch_size", "train_batch_size"), "write per_device_train_batch_size or global_batch_size"),
        "lr": "write learning_rate",
    }
    displaces: ClassVar[dict[str, str]] = {
        "warmup_steps": "warmup_ratio",
        "per_device_train_batch_size": "global_batch_size",
    }

    def __post_init__(self) -> None:
        self.report_to = list(self.report_to)

    def settle(self) -> None:
        if self.warmup_ratio is not None:
            self.warmup_steps, self.warmup_ratio = self.warmup_ratio, None
        for name in ("warmup_steps", "logging_steps", "eval_steps", "save_steps"):
            setattr(self, name, in_steps(getattr(self, name), self.max_steps))
        if self.dataloader_num_workers == "auto":
            self.dataloader_num_workers = usual_workers()

    @property
    def mixed_precision(self) -> str:
        """The value for `accelerate launch --mixed_precision`."""
        return "bf16" if self.bf16 is True else "no"

    def device_batch_size(self, num_processes: int) -> int:
        """Images on one device in one forward pass, from `global_batch_size` if it is given."""
        if self.global_batch_size is None:
            return self.per_device_train_batch_size
        return self.global_batch_size // (num_processes * self.gradient_accumulation_steps)

    def average_decay(self, step: int) -> float:
        """Decay of the weight average after step n (from 0): (1 + n) / (10 + n), until that exceeds `ema_decay`."""
        return min(self.ema_decay, (1 + step) / (10 + step))

    def problems(self) -> Iterable[tuple[str, Any, str]]:
        if self.warmup_steps > self.max_steps:
            allowed = f"must be at most max_steps ({self.max_steps}); below 1 it is a share of the run, such as 0.05"
            yield "warmup_steps", self.warmup_steps, allowed
        yield from folder_problems(self)
        yield from upload_problems(self)
        yield from worker_problems(self)
        yield from launcher_problems()
        processes = launched_processes()
        parts = processes * self.gradient_accumulation_steps
        if self.global_batch_size is not None and self.global_batch_size % parts:
            factors = f"{processes} (processes) × {self.gradient_accumulation_steps} (gradient_accumulation_steps)"
            yield "global_batch_size", self.global_batch_size, f"must be a multiple of {factors} = {parts}"
        elif self.device_batch_size(processes) > LARGEST_BATCH:
            yield (
                "global_batch_size",
                self.global_batch_size,
                f"gives a device more than {LARGEST_BATCH} images at a time",
            )
        launched = LAUNCHED_WITH["MIXED_PRECISION"] or "no"  # The launcher sets "no" by default.
        if launched not in ("no", "bf16" if self.bf16 == "auto" else self.mixed_precision):
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
                absent = f"is not installed (pip install {tracker})" if known else "is no such tracker"
                yield "report_to", self.report_to, f"{tracker!r} {absent}; installed: {', '.join(installed)}"


def folder_problems(config: Any) -> Iterable[tuple[str, Any, str]]:
    """The problem of an output folder that is also an input: the run would replace what it reads."""
    output = os.path.realpath(config.output_dir)
    for key in ("model_name_or_path", "tokenizer", "code_store"):
        name = getattr(config, key, None)
        if isinstance(name, str) and os.path.realpath(name) == output:
            yield (
                "output_dir",
                config.output_dir,
                f"it is also {key}, which the run would replace; choose another",
            )
