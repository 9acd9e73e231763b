"""Time and memory of a full step of stage 1, against the original's algorithm on the same modules:
`python -m benchmarks.training_step [--threads 1 2] [--rounds 7]`.

The original (Esser et al. 2021, the released code) runs the generator once for its own update and again for the
discriminator's, and differentiates the losses three times: twice with respect to the last layer for the adaptive
weight, once for the update. `OriginalTrainer` is that, written out; models, optimizers, data and everything around the
step are the product's. In both of its lanes the discriminator is frozen in the generator's update, and the second
forward keeps no graph. "original, at its best" has everything else from the product. "original, as released" computes
LPIPS for the discriminator's update too, where nothing needs it, its tensors are contiguous, and its residual blocks
leave to autograd what is kept for the backward.

`arithmetic` is the share of floating-point operations of matrix products and convolutions over the product's: what the
time ratio would be if nothing but the algorithm differed.

Before anything is timed the losses and gradients of a first step are compared. In the original the discriminator
meets the images of the updated generator: for the comparison the learning rate is 0, so that they are the same images.
"""

import argparse
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.measuring import (
    environment,
    interleaved,
    lane_rows,
    machine_speed,
    peak_memory,
    ratio,
    summary,
    table,
    write,
)
from configs import load_config
from stage1_vqgan import Stage1Config
from stage1_vqgan.losses import PIXEL_LOSSES, adaptive_weight, discriminator_hinge_loss, generator_linear_loss
from stage1_vqgan.modeling_blocks import ResidualBlock
from stage1_vqgan.training_step import VQGANTrainer

# What is measured: a preset, what is changed of it, and the batch. LPIPS has random weights: its time is the same.
SETTINGS: dict[str, tuple[str, dict[str, Any], int]] = {
    "f16 narrow, 64², LPIPS": (
        "imagenet256/stage1",
        {
            "model.image_size": 64,
            "model.base_channels": 32,
            "model.attn_resolutions": [4],
            "model.latent_channels": 64,
            "model.num_embeddings": 1024,
            "bf16": False,
            "loss.lpips_weights": "random",
        },
        4,
    ),
    "fashion_mnist, 32², no LPIPS": ("fashion_mnist/stage1", {"loss.perceptual_weight": 0, "bf16": False}, 8),
}
COMMON = {"loss.adversarial_start_step": 0, "warmup_steps": 0, "codebook.restart_interval": 0}

LANES = ("tessella", "original, at its best", "original, as released")


class OriginalTrainer(VQGANTrainer):
    """The product's trainer with the original's step; `as_released` repeats LPIPS for the discriminator."""

    as_released = False

    def step(self, images: Tensor, number: int) -> dict[str, Tensor]:
        """As [`VQGANTrainer.step`], the losses alone, without accumulation."""
        weights, model, discriminator = self.config.loss, self.generator, self.discriminator
        assert discriminator is not None
        discriminator.requires_grad_(False)
        out = model(images)
        pixel = PIXEL_LOSSES["l1"](out.reconstruction, images)
        reconstruction_loss = weights.l1_weight * pixel
        metrics = {"loss/l1": pixel.detach(), "loss/codebook": out.codebook_loss.detach()}
        if self.perceptual is not None:
            perceptual = self.perceptual(out.reconstruction, images)
            reconstruction_loss = reconstruction_loss + weights.perceptual_weight * perceptual
            metrics["loss/perceptual"] = perceptual.detach()
        adversarial = generator_linear_loss(discriminator(out.reconstruction))
        last_layer = model.decoder.conv_out.weight
        (of_reconstruction,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
        (of_adversarial,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
        rate = weights.adversarial_weight * adaptive_weight(of_reconstruction, of_adversarial)
        total = reconstruction_loss + rate * adversarial + weights.codebook_weight * out.codebook_loss
        self._update(model, self.optimizer, total)
        self.monitor.update(out.codes)

        discriminator.requires_grad_(True)
        with torch.no_grad():
            reconstruction = model(images).reconstruction
            if self.as_released and self.perceptual is not None:
                self.perceptual(reconstruction, images)
        loss = discriminator_hinge_loss(discriminator(images), discriminator(reconstruction))
        self._update(discriminator, self.discriminator_optimizer, loss)
        self._update_average(number)
        return metrics | {"loss/adversarial": adversarial.detach(), "loss/discriminator": loss.detach()}


def layer_by_layer(block: ResidualBlock, x: Tensor) -> Tensor:
    """A residual block as the released code has it."""
    h = block.conv1(functional.silu(block.norm1(x)))
    h = block.conv2(block.dropout(functional.silu(block.norm2(h))))
    return block.nin_shortcut(x) + h


def make(lane: str, setting: str) -> tuple[VQGANTrainer, Tensor]:
    """The trainer of a lane, with the same weights in all, and a batch of smooth images."""
    preset, changes, batch = SETTINGS[setting]
    as_released = lane == "original, as released"
    config = load_config(Stage1Config, preset, {**changes, **COMMON, "channels_last": not as_released})
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True)
    trainer = VQGANTrainer(config, accelerator) if lane == "tessella" else OriginalTrainer(config, accelerator)
    if isinstance(trainer, OriginalTrainer) and as_released:
        trainer.as_released = True
        for module in trainer.model.modules():
            if isinstance(module, ResidualBlock):
                module.forward = MethodType(layer_by_layer, module)  # type: ignore[method-assign]
    model = trainer.model.config
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(batch, model.in_channels, 8, 8, generator=generator) * 2 - 1
    images = functional.interpolate(small, model.image_size, mode="bilinear")
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    return trainer, images.contiguous(memory_format=memory_format)


def first_step(lane: str, setting: str) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Losses of a first step at learning rate 0, and the gradients that the optimizers got."""
    trainer, images = make(lane, setting)
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
    metrics = trainer.step(images, 0)
    return {name: value.item() for name, value in metrics.items() if name.startswith("loss/")}, gradients


def agreement(setting: str) -> dict[str, float]:
    """Largest relative difference of a loss, and of the gradient of each model as a whole, from the original's.

    Both with channels-last: another layout rounds differently, and a maximum or a ReLU of LPIPS or of the discriminator
    that tips over changes a gradient by 1e-3, of the original as of the product.

    Raises:
        AssertionError: a loss differs by more than 1e-5, or a gradient by more than 1e-4.
    """
    losses, gradients = first_step("tessella", setting)
    expected_losses, expected = first_step("original, at its best", setting)
    assert losses.keys() == expected_losses.keys() and gradients.keys() == expected.keys()
    result = {"losses": max(abs(losses[name] / value - 1) for name, value in expected_losses.items())}
    for part in ("generator", "discriminator"):
        names = [name for name in expected if name.startswith(part)]
        difference, whole = (
            torch.cat([tensor.flatten() for tensor in tensors]).norm().item()
            for tensors in ([gradients[name] - expected[name] for name in names], [expected[name] for name in names])
        )
        result[f"{part}_gradients"] = difference / whole
    assert result["losses"] <= 1e-5, result
    assert max(result["generator_gradients"], result["discriminator_gradients"]) <= 1e-4, result
    return result


def prepared(lane: str, setting: str) -> Callable[[], Any]:
    """A step of a lane, after a first one that made the optimizers' state."""
    trainer, images = make(lane, setting)
    trainer.set_learning_rate(0)
    trainer.step(images, 0)
    return partial(trainer.step, images, 1)


class Operations(TorchDispatchMode):
    """Counts the floating-point operations of matrix products and convolutions, forward and backward."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        self.total += count(*args, **(kwargs or {}), out_val=result) if count else 0
        return result


def count_operations(step: Callable[[], Any]) -> int:
    """Of one call."""
    with Operations() as operations:
        step()
    return operations.total


def measure(setting: str, threads: list[int], rounds: int) -> dict[str, Any]:
    """Every lane at one setting."""
    result: dict[str, Any] = {"setting": setting, "batch": SETTINGS[setting][2], "threads": {}}
    result["difference"] = agreement(setting)
    memory = {lane: peak_memory(prepared, lane, setting) for lane in LANES}
    result["peak_memory_mb"] = {lane: round(value / 2**20, 1) for lane, value in memory.items()}
    steps = {lane: prepared(lane, setting) for lane in LANES}
    operations = {lane: count_operations(step) for lane, step in steps.items()}
    for count in threads:
        torch.set_num_threads(count)
        times = interleaved(steps, rounds)
        result["threads"][count] = {
            "machine": machine_speed(),
            **{
                lane: summary(values)
                | {
                    "time_ratio": ratio(values, times["tessella"]),
                    "arithmetic": round(operations[lane] / operations["tessella"], 2),
                    "memory_ratio": round(memory["tessella"] / memory[lane], 2),
                }
                for lane, values in times.items()
            },
        }
    return result


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Lines of the table."""
    return lane_rows(result, {"setting": result["setting"]}, lambda _, lane: {"arithmetic": lane["arithmetic"]})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step", description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", default="runs/benchmarks/training_step.json")
    args = parser.parse_args()
    where = environment()
    results = [measure(setting, args.threads, args.rounds) for setting in SETTINGS]
    for result in results:
        print(f"{result['setting']}: relative differences from the original's first step {result['difference']}")
    print(table([row for result in results for row in rows(result)]))
    write(args.output, {"environment": where, "results": results})


if __name__ == "__main__":
    main()
