"""Launches that shard a prior, and what they cannot do."""

from collections.abc import Iterable
from typing import Any

from configs import ConfigError, Problem
from configs.sections import LAUNCHED_WITH


def check_sharding(trainer: Any, ema_decay: float) -> None:
    """Refuses a launch that would not shard as it was told to, would save no model, or has shards without an average.

    Args:
        trainer: transformers' Trainer, before it trains.
        ema_decay: of the averaged weights; 0 without.

    Raises:
        ConfigError: naming what to change.
    """
    if problems := list(sharding_problems(trainer, ema_decay)):
        raise ConfigError(problems, "launch")


def sharding_problems(trainer: Any, ema_decay: float) -> Iterable[Problem]:
    """What `check_sharding` refuses."""
    if LAUNCHED_WITH["USE_FSDP"] == "true" and not trainer.is_fsdp_enabled:
        # accelerate would train whole copies and say nothing
        yield Problem("FSDP", "accelerate shards on GPUs and their like only; here, launch with --multi_gpu")
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if plugin is not None and "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        received = str(plugin.state_dict_type).rpartition(".")[2]
        message = f"received {received}, which saves no model; set FULL_STATE_DICT in accelerate's configuration"
        yield Problem("fsdp_state_dict_type", message)
    reason = None
    if trainer.is_deepspeed_enabled:
        reason = "DeepSpeed keeps the weights out of reach; shard with FSDP 2 (configs/accelerate/fsdp.yaml)"
    elif plugin is not None and plugin.fsdp_version == 1:
        reason = "FSDP 1 flattens the weights; set fsdp_version 2 in accelerate's configuration"
    if ema_decay and reason:
        yield Problem("ema_decay", f"received {ema_decay}, but {reason}, or set 0")
