"""Builds the components of a run: tokenizer, losses, discriminator, and the optimizers."""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import AdamW

from configs import ConfigError, Problem
from configs.memory import SMALLER_BATCH, shortage
from stage1_vqgan.configuration_vqgan import VQGANConfig
from stage1_vqgan.modeling_vqgan import VQGANModel
from stage1_vqgan.networks.alignment import Alignment
from stage1_vqgan.networks.diffaug import Augmentation, augment, unchanged
from stage1_vqgan.pretrained import load_tokenizer, start_discriminator
from stage1_vqgan.quantizers import codes_shape
from stage1_vqgan.training.config import Stage1Config
from stage1_vqgan.training.loss_config import RECONSTRUCTION_TERMS
from stage1_vqgan.training.network_terms import DISCRIMINATORS, build_features, build_logits, build_perceptual

Loss = Callable[[Tensor, Tensor], Tensor]

FLOAT32, INT64 = 4, 8  # bytes
SMALLER = "choose smaller model.base_channels, model.num_res_blocks or model.num_embeddings"


def memory_format(config: Stage1Config, device: torch.device) -> torch.memory_format:
    """Memory format of models and images."""
    slow = device.type == "cpu" and config.bf16 is True  # PyTorch's GroupNorm: 4.5 × as slow in channels-last
    return torch.channels_last if config.channels_last and not slow else torch.contiguous_format


def build_tokenizer(config: Stage1Config) -> VQGANModel:
    """The tokenizer before its first step: a new one, or the one in `model_name_or_path` to fine-tune.

    Raises:
        ConfigError: the tokenizer cannot be loaded, its image size suits neither the losses nor the discriminator, its
            codes cannot be perturbed, or the weights and their average do not fit in memory.
    """
    if config.model_name_or_path is None:
        new = config.vqgan_config()
        refuse_perturbation(config, new)
        lack = shortage(2 * FLOAT32 * new.num_weights, torch.device("cpu"))
        if lack is not None:
            message = f"{new.num_weights:,} weights and their average: {lack}; {SMALLER}"
            raise ConfigError([Problem("model", message)])
        return VQGANModel(new)
    model = load_tokenizer(config.model_name_or_path, "model_name_or_path", **config.model).train()
    found = *config.channel_problems(model.config.in_channels), *config.size_problems(model.config)
    problems = [Problem(field, f"received {value!r}; {allowed}") for field, value, allowed in found]
    if problems:
        raise ConfigError(problems)
    refuse_perturbation(config, model.config)
    if config.codes_are_frozen:
        for part in (model.encoder, model.quant_conv, model.quantize):
            part.requires_grad_(False).eval()
    else:
        model.config.fingerprint = None  # training changes the codes: save_pretrained computes a new fingerprint
    return model


def refuse_perturbation(config: Stage1Config, model: VQGANConfig) -> None:
    """Refuses wrong codes for a quantizer with several codes at a position: their nearest entries are not defined.

    Raises:
        ConfigError: the run perturbs the codes of such a quantizer.
    """
    if config.perturbation.image_share and len(codes_shape(model.grids)) != 2:
        shape = f"the quantizer {model.quantizer!r} has several codes for a position; set it to 0"
        message = f"received {config.perturbation.image_share}; {shape}"
        raise ConfigError([Problem("perturbation.image_share", message)])


def prepare_generator(
    model: VQGANModel, alignment: Alignment | None, config: Stage1Config, accelerator: Accelerator
) -> tuple[Any, Any, Any]:
    """The tokenizer, compiled if `torch_compile`, and the alignment, both wrapped by accelerate; and their optimizer.

    Raises:
        ConfigError: training does not fit in memory.
    """
    if config.gradient_checkpointing:
        checkpoint_gradients(model)
    check_training_memory(model, config, accelerator)
    if config.torch_compile:
        model.compile(fullgraph=True, dynamic=False)
    parts = [model] if alignment is None else [model, alignment]
    generator, *wrapped, optimizer = accelerator.prepare(
        *parts, _optimizer(nn.ModuleList(parts), partial(getattr, config))
    )
    # accelerate converts everything that a model returns to float32, which copies the largest features: undo that.
    accelerator.unwrap_model(generator, keep_fp32_wrapper=False)
    return generator, wrapped[0] if wrapped else None, optimizer


def checkpoint_gradients(model: VQGANModel) -> None:
    """Turns on gradient checkpointing."""
    # transformers 6 removes the older names, here and in `is_checkpointed`
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def is_checkpointed(model: VQGANModel) -> bool:
    """Whether gradient checkpointing is on."""
    newer = "is_activation_checkpointing"
    return bool(getattr(model, newer if hasattr(model, newer) else "is_gradient_checkpointing"))


def check_training_memory(model: VQGANModel, config: Stage1Config, accelerator: Accelerator) -> None:
    """Compares what one step needs at least with the memory of the device, before the first step.

    Raises:
        ConfigError: it does not fit.
    """
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    states = 3 * FLOAT32 * trained  # the gradient and two moments of Adam; the weights exist already
    each = saved_activations(model, 2 if config.bf16 else FLOAT32)
    count = config.device_batch_size(accelerator.num_processes)
    lack = shortage(states, accelerator.device)
    if lack is not None:
        message = f"the gradients and the optimizer of {trained:,} weights: {lack}; {SMALLER}"
        raise ConfigError([Problem("model", message)])
    lack = shortage(3 * INT64 * model.quantize.num_entries, accelerator.device)  # since a log and a restart; evaluation
    if lack is not None:
        message = f"received {model.config.num_embeddings:,}; counting how often each code is used {lack}; choose fewer"
        raise ConfigError([Problem("model.num_embeddings", message)])
    lack = shortage(states + count * each, accelerator.device)
    if lack is not None:
        key = "global_batch_size" if config.global_batch_size else "per_device_train_batch_size"
        raise ConfigError([Problem(key, f"received {getattr(config, key)}; one step {lack}; {SMALLER_BATCH}")])


def saved_activations(model: VQGANModel, itemsize: int) -> int:
    """Bytes that one image keeps at least until the backward: input and middle of every residual block.

    With gradient checkpointing it is one level that keeps them, while it is computed again.
    """
    config = model.config
    blocks = config.decoder_blocks  # of a level of the decoder; those of a frozen encoder keep nothing
    if any(parameter.requires_grad for parameter in model.encoder.parameters()):
        blocks += config.num_res_blocks
    levels = [width * prod(shape) for width, shape in zip(config.widths, config.resolutions, strict=True)]
    if is_checkpointed(model):
        return 2 * config.decoder_blocks * max(levels) * itemsize
    return 2 * blocks * sum(levels) * itemsize


# How to build the loss of each term in RECONSTRUCTION_TERMS, from the settings and the configuration of the tokenizer.
# A loss is a scalar function of reconstructions and images `(B, C, H, W)`.
RECONSTRUCTION_LOSSES: dict[str, Callable[[Stage1Config, VQGANConfig, Accelerator], Loss]] = {
    "l1": lambda *_: F.l1_loss,
    "l2": lambda *_: F.mse_loss,
    "perceptual": build_perceptual,
    "features": build_features,
    "logits": build_logits,
}


def build_reconstruction_losses(config: Stage1Config, model: VQGANConfig, accelerator: Accelerator) -> dict[str, Loss]:
    """The losses of reconstructions and images whose weight is above 0, by the name of their term.

    Raises:
        ConfigError: weights of a network are missing or damaged.
    """
    weights = config.loss.terms()
    names = [name for name in RECONSTRUCTION_TERMS if weights[name]]
    losses = {name: RECONSTRUCTION_LOSSES[name](config, model, accelerator) for name in names}
    for loss in losses.values():
        if isinstance(loss, nn.Module):
            loss.to(accelerator.device, memory_format=memory_format(config, accelerator.device))  # type: ignore[call-overload]
    return losses


def augmentation(config: Stage1Config) -> Augmentation:
    """What changes the images that the discriminator sees."""
    return augment if config.discriminator.augments else unchanged


def prepare_discriminator(model: VQGANConfig, config: Stage1Config, accelerator: Accelerator) -> tuple[Any, Any]:
    """The discriminator, compiled if possible and wrapped, and its optimizer; None if the run has no discriminator.

    In fine-tuning, it starts from the weights of the discriminator in the tokenizer's folder, if they fit.
    """
    if not config.has_discriminator:
        return None, None
    discriminator = DISCRIMINATORS[config.discriminator.type](model, config.discriminator)
    if config.model_name_or_path is not None:
        message = start_discriminator(discriminator, config.model_name_or_path, config.discriminator.architecture)
        if message is not None:
            accelerator.print(message)
    if accelerator.device.type == "cuda" and accelerator.num_processes > 1:
        discriminator = nn.SyncBatchNorm.convert_sync_batchnorm(discriminator)
    if config.compiles_discriminator:
        discriminator.compile(dynamic=False)  # not fullgraph: SyncBatchNorm may break the graph
    return accelerator.prepare(discriminator, _optimizer(discriminator, config.of_discriminator))


def _optimizer(model: nn.Module, setting: Callable[[str], float]) -> AdamW:
    """AdamW of the trained parameters; `setting` returns the value of a key."""
    return AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        betas=(setting("adam_beta1"), setting("adam_beta2")),
        weight_decay=setting("weight_decay"),
        fused=True,
    )
