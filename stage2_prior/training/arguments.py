"""The arguments of Trainer, from the settings of stage 2."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from accelerate.utils import DynamoBackend, parse_flag_from_env
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.utils import is_liger_kernel_available

from configs import ConfigError, Problem, TrainingConfig
from configs.problems import one_line
from configs.sections import launched_processes
from configs.stalls import library_timeout
from stage2_prior.training.config import Stage2Config

# Our keys that Trainer does not get: this project resumes, removes old checkpoints and uploads without Trainer.
OWN_KEYS = {
    "global_batch_size",
    "resume_from_checkpoint",
    "allow_config_changes",
    "ema_decay",
    "save_total_limit",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
}


def training_arguments(config: Stage2Config) -> TrainingArguments:
    """TrainingArguments from our keys of the same names, and from the `training_arguments` section.

    Raises:
        ConfigError: transformers refuses a setting.
    """
    shared = {field.name: getattr(config, field.name) for field in fields(TrainingConfig) if field.name not in OWN_KEYS}
    defaults = {
        "ddp_find_unused_parameters": False,  # every parameter takes part in every step
        "eval_strategy": "steps",
        "prediction_loss_only": True,
        "save_strategy": "steps",
        "project": "tessella-stage2",  # of trackio; wandb reads WANDB_PROJECT
        "logging_nan_inf_filter": False,  # a loss that is not finite ends the run instead of being hidden
        "ddp_timeout": int(library_timeout(config.ddp_timeout).total_seconds()),
        # Trainer would take a GPU even if accelerate was launched with --cpu
        "use_cpu": parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available(),
    }
    defaults["per_device_train_batch_size"] = config.device_batch_size(launched_processes())
    with _refusals():
        arguments = TrainingArguments(**{**shared, **defaults, **config.training_arguments})
        _try(arguments)
    return arguments


@contextmanager
def _refusals() -> Iterator[None]:
    """Turns an error that transformers raises about its arguments into a `ConfigError`."""
    try:
        yield
    except (AttributeError, ImportError, LookupError, OSError, TypeError, ValueError) as error:
        message = f"transformers refuses these settings: {one_line(error, 200)}"
        raise ConfigError([Problem("training_arguments", message)]) from error


def _try(arguments: TrainingArguments) -> None:
    """Builds what Trainer builds from these arguments only when it starts.

    Raises:
        ImportError, TypeError, ValueError: a library refuses an argument.
    """
    if arguments.torch_compile:
        DynamoBackend(str(arguments.torch_compile_backend).upper())
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise ImportError("use_liger_kernel needs the package liger-kernel, which is not installed")
    if arguments.optim_args or arguments.lr_scheduler_kwargs:
        model: Any = torch.nn.Linear(1, 1)
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        schedule: Any = arguments.lr_scheduler_kwargs
        optimizer = kind(model.parameters(), **options)
        get_scheduler(arguments.lr_scheduler_type, optimizer, 0, 1, scheduler_specific_kwargs=schedule)
