"""Sharding of a prior over processes: the shard of this process, and checks of the launch."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from configs import ConfigError, Problem
from configs.sections import LAUNCHED_WITH


def local_part(tensor: Tensor) -> Tensor:
    """This process's shard of a sharded tensor, or the tensor itself, detached. The result shares the memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def check_sharding(trainer: Any, ema_decay: float) -> None:
    """Refuses a launch that asks for sharding but would not shard, would save no model, or cannot average the shards.

    Args:
        trainer: transformers' Trainer, before it trains.
        ema_decay: decay of the averaged weights; 0 without an average.

    Raises:
        ConfigError: the message names what to change.
    """
    if problems := list(sharding_problems(trainer, ema_decay)):
        raise ConfigError(problems, "launch")


def sharding_problems(trainer: Any, ema_decay: float) -> Iterable[Problem]:
    """Yields the problems for which `check_sharding` refuses a launch."""
    if LAUNCHED_WITH["USE_FSDP"] == "true" and not trainer.is_fsdp_enabled:
        # accelerate would silently train a whole copy in every process
        yield Problem("FSDP", "accelerate shards on GPUs and similar devices only; launch with --multi_gpu here")
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if plugin is not None and "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        received = str(plugin.state_dict_type).rpartition(".")[2]
        message = f"received {received}, which saves no model; set FULL_STATE_DICT in accelerate's configuration"
        yield Problem("fsdp_state_dict_type", message)
    if plugin is not None and plugin.fsdp_version == 1:
        yield Problem("fsdp_version", "received 1, which flattens the weights; set 2 in accelerate's configuration")
