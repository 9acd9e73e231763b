"""Launches that shard a prior, and what they cannot do."""

from typing import Any

from configs import ConfigError, Problem
from configs.sections import LAUNCHED_WITH


def check_sharding(trainer: Any, ema_decay: float) -> None:
    """Refuses a launch that would not shard as it was told to, or whose shards cannot be averaged.

    Args:
        trainer: transformers' Trainer, before it trains.
        ema_decay: of the averaged weights; 0 without.

    Raises:
        ConfigError: naming what to change.
    """
    if LAUNCHED_WITH["USE_FSDP"] == "true" and not trainer.is_fsdp_enabled:
        message = "accelerate shards on GPUs and the like only; on a CPU, launch with --multi_gpu instead"
        raise ConfigError([Problem("FSDP", message)], "launch")
    problem = None
    if trainer.is_deepspeed_enabled:
        problem = "DeepSpeed keeps the weights out of reach; shard with FSDP 2 (configs/accelerate/fsdp.yaml)"
    elif trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version == 1:
        problem = "FSDP 1 flattens the weights; set fsdp_version 2 in accelerate's configuration"
    if ema_decay and problem:
        raise ConfigError([Problem("ema_decay", f"received {ema_decay}, but {problem}, or set 0")], "launch")
