"""A full training step of stage 1, compared with the algorithm of the original on the same modules.

The original (Esser et al. 2021, the released code) runs the generator once for its own update and again for the update
of the discriminator. It differentiates the losses three times: twice with respect to the last layer, for the adaptive
weight, and once for the update. `OriginalTrainer` implements this algorithm; models, optimizers and data are those of
this project. Both of its lanes freeze the discriminator in the update of the generator, and run the second forward
without a graph.

"original, at its best" has all other optimizations of this project, including torch.compile on a GPU.
"original, as released" also computes an unused LPIPS in the update of the discriminator, has contiguous tensors, and
lets autograd save the intermediate results of residual blocks.

The setting in bfloat16 on a CPU also has this project's step in float32, and in channels-last, which runs in bfloat16
on a CPU avoid.

Before the measurement, losses and gradients of a first step are compared in float32. In the original, the discriminator
learns from images of the updated generator. The comparison has the learning rate 0, so that the images are the same.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch._functorch.config
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor
from torch.nn import functional

from benchmarks.case import OURS, Case, Prepared
from benchmarks.ideal import training_step_operations
from benchmarks.machine import full_precision
from configs import load_config
from stage1_vqgan import Stage1Config
from stage1_vqgan.modeling_blocks import ResidualBlock
from stage1_vqgan.training.components import memory_format
from stage1_vqgan.training.losses import adaptive_weight, discriminator_hinge_loss, generator_linear_loss
from stage1_vqgan.training.step import VQGANTrainer


class Setting(NamedTuple):
    """A preset, changes of its settings, and the batch size. LPIPS has random weights, which do not change its time."""

    preset: str
    changes: dict[str, Any]
    batch: int


NARROW: dict[str, Any] = {
    "model.image_size": 64,
    "model.base_channels": 32,
    "model.latent_channels": 64,
    "model.num_embeddings": 1024,
    "bf16": False,
}
TINY: dict[str, Any] = {
    "model.image_size": 64,
    "model.base_channels": 8,
    "model.norm_num_groups": 8,
    "model.latent_channels": 16,
    "model.num_embeddings": 64,
    "loss.lpips_backbone": "alex",
}
SETTINGS: dict[str, dict[str, Setting]] = {
    "cpu": {
        "f16 narrow, 64², LPIPS, batch 4": Setting("imagenet256/stage1", NARROW, 4),
        "fashion_mnist, 32², no LPIPS, batch 8": Setting(
            "fashion_mnist/stage1", {"loss.perceptual_weight": 0, "bf16": False}, 8
        ),
        "fashion_mnist/cpu by the losses of the original, bfloat16, batch 32": Setting(
            "fashion_mnist/cpu/stage1",
            {"loss.l1_weight": 1.0, "loss.l2_weight": 0.0, "loss.adversarial_weight": 0.1, "bf16": True},
            32,
        ),
    },
    "gpu": {
        **{f"f16, 256², LPIPS, batch {batch}": Setting("imagenet256/stage1", {}, batch) for batch in (64, 32, 128)},
        "fashion_mnist, 32², LPIPS, batch 128": Setting("fashion_mnist/stage1", {"bf16": True}, 128),
    },
}
SETTINGS["tiny"] = {
    f"tiny {name}": Setting(preset, {**changes, **TINY}, 2) for name, (preset, changes, _) in SETTINGS["gpu"].items()
}
ALL_SETTINGS = {name: setting for settings in SETTINGS.values() for name, setting in settings.items()}
COMMON = {
    "loss.adversarial_start_step": 0,
    "loss.lpips_weights": "random",
    "warmup_steps": 0,
    "codebook.restart_interval": 0,
}
RELEASED, BEST = "original, as released", "original, at its best"
FLOAT32, CHANNELS_LAST = f"{OURS}, float32", f"{OURS}, channels-last"


class OriginalTrainer(VQGANTrainer):
    """Our trainer with the training step of the original. `as_released` repeats LPIPS for the discriminator."""

    as_released = False

    @property
    def perceptual(self) -> Any:
        """LPIPS; None if its weight is 0."""
        return self.generator_terms.losses.get("perceptual")

    def compile_modules(self) -> None:
        """Compiles the same modules as this project, with accelerate's autocast of the discriminator in its graph."""
        decoder = self.model.decoder
        decoder.trunk = torch.compile(decoder.trunk, dynamic=False)  # type: ignore[method-assign]
        for module in (self.model.encoder, self.perceptual, self.discriminator):
            if module is not None:
                torch.nn.Module.compile(module, dynamic=False)

    def step(self, images: Tensor, number: int) -> dict[str, Tensor]:
        """As [`VQGANTrainer.step`], but returns only the losses, and has no gradient accumulation."""
        weights, model, discriminator = self.config.loss, self.generator, self.discriminator
        assert discriminator is not None
        discriminator.requires_grad_(False)
        with self.accelerator.autocast():
            out = model(images)
        pixel = functional.l1_loss(out.reconstruction, images)
        reconstruction_loss = weights.l1_weight * pixel
        metrics = {"loss/l1": pixel.detach(), "loss/codebook": out.codebook_loss.detach()}
        if self.perceptual is not None:
            with self.accelerator.autocast():
                perceptual = self.perceptual(out.reconstruction, images)
            reconstruction_loss = reconstruction_loss + weights.perceptual_weight * perceptual
            metrics["loss/perceptual"] = perceptual.detach()
        adversarial = generator_linear_loss(discriminator(out.reconstruction))
        last_layer = model.decoder.conv_out.weight
        (of_reconstruction,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
        (of_adversarial,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
        rate = weights.adversarial_weight * adaptive_weight(of_reconstruction, of_adversarial)
        total = reconstruction_loss + rate * adversarial + weights.codebook_weight * out.codebook_loss
        self._update(model, self.optimizer, total, number)
        self.monitor.update(out.codes)

        discriminator.requires_grad_(True)
        with torch.no_grad(), self.accelerator.autocast():
            reconstruction = model(images).reconstruction
            if self.as_released and self.perceptual is not None:
                self.perceptual(reconstruction, images)
        loss = discriminator_hinge_loss(discriminator(images), discriminator(reconstruction))
        self._update(discriminator, self.discriminator_optimizer, loss, number)
        self._update_average(number)
        return metrics | {"loss/adversarial": adversarial.detach(), "loss/discriminator": loss.detach()}


def layer_by_layer(block: ResidualBlock, x: Tensor) -> Tensor:
    """The forward of a residual block as in the released code."""
    h = block.conv1(functional.silu(block.norm1(x)))
    h = block.conv2(block.dropout(functional.silu(block.norm2(h))))
    return block.nin_shortcut(x) + h


def make(lane: str, setting: str, device: torch.device, **changes: Any) -> tuple[VQGANTrainer, Tensor]:
    """Builds the trainer of a lane and a batch of smooth images. The weights are the same in all lanes."""
    preset, of_setting, batch = ALL_SETTINGS[setting]
    as_released, compiled = lane == RELEASED, lane == f"{OURS}, compiled"
    values = {**of_setting, **COMMON, "channels_last": not as_released, "torch_compile": compiled, **changes}
    config = load_config(Stage1Config, preset, values | ({"bf16": False} if lane == FLOAT32 else {}))
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=config.mixed_precision)
    trainer = VQGANTrainer(config, accelerator) if lane.startswith(OURS) else OriginalTrainer(config, accelerator)
    if isinstance(trainer, OriginalTrainer):
        if as_released:
            release(trainer)
        elif lane == BEST and setting not in SETTINGS["cpu"]:
            trainer.compile_modules()
    model = trainer.model.config
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(batch, model.in_channels, 8, 8, generator=generator) * 2 - 1
    images = functional.interpolate(small, model.image_shape, mode="bilinear")
    layout = memory_format(config, device)
    if lane == CHANNELS_LAST:
        layout = torch.channels_last
        trainer.model.to(memory_format=layout)  # type: ignore[call-arg]
        if trainer.discriminator is not None:
            trainer.discriminator.to(memory_format=layout)  # type: ignore[call-overload]
    return trainer, images.to(device).to(memory_format=layout)


def release(trainer: OriginalTrainer) -> None:
    """Replaces the step and the residual blocks by those of the released code."""
    trainer.as_released = True
    for module in trainer.model.modules():
        if isinstance(module, ResidualBlock):
            module.forward = MethodType(layer_by_layer, module)  # type: ignore[method-assign]


def first_step(lane: str, setting: str, device: torch.device) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Losses of a first step in float32 with learning rate 0, and the gradients that the optimizers receive."""
    trainer, images = make(lane, setting, device, bf16=False)
    gradients = {}

    def keep(name: str, model: torch.nn.Module, *_: Any) -> None:
        for parameter_name, parameter in model.named_parameters():
            assert parameter.grad is not None, parameter_name
            gradients[f"{name}.{parameter_name}"] = parameter.grad.clone()

    discriminator = trainer.discriminator
    assert discriminator is not None
    pairs = {
        "generator": (trainer.generator, trainer.optimizer),
        "discriminator": (discriminator, trainer.discriminator_optimizer),
    }
    for name, (model, optimizer) in pairs.items():
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.optimizer.register_step_pre_hook(partial(keep, name, model))
    metrics = trainer.step(images[:4], 0)
    return {name: value.item() for name, value in metrics.items() if name.startswith("loss/")}, gradients


def agree(setting: str, device: torch.device) -> Mapping[str, Any]:
    """The largest relative differences from the original, of a loss and of the whole gradient of a model.

    Both lanes run uncompiled and channels-last, because another memory format rounds differently. Rounding can change
    the choice of a maximum or a ReLU in LPIPS or the discriminator, which changes a gradient by 1e-3 in both lanes.

    Raises:
        AssertionError: a loss differs by more than 1e-5, or a gradient by more than 1e-4. On a GPU, which sums in any
            order, the bounds are 1e-4 and 5e-3.
    """
    with full_precision():
        losses, gradients = first_step(OURS, setting, device)
        expected_losses, expected = first_step("original, eager", setting, device)
    assert losses.keys() == expected_losses.keys() and gradients.keys() == expected.keys()
    result = {"losses": max(abs(losses[name] / value - 1) for name, value in expected_losses.items())}
    for part in ("generator", "discriminator"):
        names = [name for name in expected if name.startswith(part)]
        difference, whole = (
            torch.cat([tensor.flatten() for tensor in tensors]).norm().item()
            for tensors in ([gradients[name] - expected[name] for name in names], [expected[name] for name in names])
        )
        result[f"{part}_gradients"] = difference / whole
    of_losses, of_gradients = (1e-5, 1e-4) if device.type == "cpu" else (1e-4, 5e-3)
    assert result["losses"] <= of_losses, result
    assert max(result["generator_gradients"], result["discriminator_gradients"]) <= of_gradients, result
    return {"relative differences": {name: float(f"{value:.1e}") for name, value in result.items()}}


def prepared(lane: str, setting: str, device: torch.device) -> Prepared:
    """A step of a lane, after a first step that created the state of the optimizers."""
    trainer, images = make(lane, setting, device)
    trainer.set_learning_rate(0)
    # several backward passes through a compiled graph need its saved tensors
    with torch._functorch.config.patch(donated_buffer=lane != BEST):
        trainer.step(images, 0)
    return partial(trainer.step, images, 1)


def operations(config: Stage1Config, batch: int) -> float:
    """Operations of a step."""
    return batch * training_step_operations(config)


def cases(suite: str, device: torch.device, data: str | None) -> Iterator[Case]:
    """One case for each setting."""
    names = [OURS, *([f"{OURS}, compiled"] if suite != "cpu" else []), BEST, RELEASED]
    for setting, (preset, changes, batch) in SETTINGS[suite].items():
        config = load_config(Stage1Config, preset, {**changes, **COMMON})
        more = [FLOAT32, CHANNELS_LAST] if suite == "cpu" and config.bf16 else []
        lanes: dict[str, Callable[[], Prepared]] = {
            name: partial(prepared, name, setting, device) for name in names + more
        }
        yield Case(
            row="training step",
            setting=setting,
            lanes=lanes,
            agree=partial(agree, setting, device),
            unit="images/s",
            count=batch,
            operations=partial(operations, config, batch),
            dtype=torch.bfloat16 if config.bf16 else torch.float32,
        )
