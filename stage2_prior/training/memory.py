"""Compares what a training step needs at least with the memory of the device, before the first step."""

from typing import Any

from configs import ConfigError, Problem
from configs.memory import SMALLER_BATCH, shortage
from stage2_prior.training.config import Stage2Config
from stage2_prior.vocabulary import TokenLayout

FLOAT32, BFLOAT16 = 4, 2  # bytes


def check_training_memory(trainer: Any, config: Stage2Config, layout: TokenLayout) -> None:
    """Refuses a prior or a batch that cannot be trained in the memory of the device. Does not judge sharded training.

    Args:
        trainer: transformers' Trainer, before it trains.
        config: the settings of the run.
        layout: the token layout.

    Raises:
        ConfigError: it does not fit.
    """
    if trainer.is_fsdp_enabled:
        return
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    moments = 2 if str(trainer.args.optim) in ("adamw_torch", "adamw_torch_fused") else 0
    copies = 1 + moments + (config.ema_decay > 0)  # gradient, optimizer, average; the weights exist already
    device, batch = trainer.args.device, trainer.args.per_device_train_batch_size
    if lack := shortage(copies * FLOAT32 * trained, device):
        message = f"the gradients, the optimizer and the average of {trained:,} weights: {lack}; choose a smaller model"
        raise ConfigError([Problem("model", message)])
    if lack := shortage(batch * saved_activations(trainer.model.config, layout), device):
        key = "global_batch_size" if config.global_batch_size else "per_device_train_batch_size"
        message = f"received {getattr(config, key)}; one step {lack}; {SMALLER_BATCH}"
        raise ConfigError([Problem(key, message)])


def saved_activations(model: Any, layout: TokenLayout) -> int:
    """Bytes that one image needs at least in a step: the input of every layer, and the logits."""
    per_token = getattr(model, "hidden_size", 0) * getattr(model, "num_hidden_layers", 0) + layout.vocab_size
    return BFLOAT16 * layout.num_positions * per_token
