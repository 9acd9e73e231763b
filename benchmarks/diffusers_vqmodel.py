"""The tokenizer of `benchmarks.recipes --diffusers`: diffusers' own `VQModel`, trained by the losses of its example.

As in the example (examples/vqgan/train_vqgan.py, commit 58eb52c, with its defaults):
- steps take turns: one trains the tokenizer, the next one the discriminator, each with a new batch;
- the tokenizer's loss is the mean squared error of the pixels in [0, 1], the codebook loss, and λ times the adversarial
  loss, -mean D(x̂), from the first step on;
- the discriminator's loss is the hinge loss, and ten times the mean of (‖∇D(x)‖ - 1)² at real images. It has
  convolutions with stride 2 and spectral norm, instance norm, and a sigmoid at its end;
- AdamW with a constant rate of 1e-4 for both, gradients clipped at a norm of 1, no weight average.

Other than in the example:
- The perceptual loss, features of timm's VGG19 at 224 pixels, is left out: its weights are a download. In the example,
  the gradient of the perceptual loss at the last layer, divided by that of the adversarial loss, gives λ. Here the
  gradient of the squared error takes its place.
- The sizes of model and batch, the augmentation and bfloat16 are those of the preset. A `VQModel` has one residual
  block more in each level of the decoder than of the encoder, even where the preset has a shorter decoder. The decoder
  has group norms, because a tokenizer of this package cannot have the "spatial" norms of the example.
- The tokenizer takes pixels in [-1, 1], as all of this package do. The losses see them in [0, 1].
- Of its six convolutions, the discriminator has those that leave 2×2 positions.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from configs.files import remove_tree, write_json
from configs.run_folder import RESULTS_NAME
from stage1_vqgan import ConvertConfig, ImageDataset, Stage1Config, VQGANConfig, VQGANModel, load_images
from stage1_vqgan.convert.command import convert
from stage1_vqgan.convert.diffusers import write
from stage1_vqgan.data.loading import training_loader
from stage1_vqgan.data.samplers import training_sampler

Precision = Callable[[], AbstractContextManager[object]]

LEARNING_RATE = 1e-4
WEIGHT_DECAY = 1e-2
MAX_GRAD_NORM = 1.0
PENALTY_WEIGHT = 10.0
MAX_ADVERSARIAL_WEIGHT = 1e4
SMALLEST_NORM = 1e-8
ENDLESS = 10**9  # batches


def train(config: Stage1Config, seconds: float) -> dict[str, float]:
    """Trains a `VQModel` for some seconds, and saves it as a tokenizer of this package in `config.output_dir`.

    Args:
        config: sizes of the model, batches, data and seed.
        seconds: the steps end after them.

    Returns:
        `global_step`, the number of steps of both kinds together, and `train_runtime`, their seconds.
    """
    torch.manual_seed(config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = vqmodel(config).to(device)
    judge = discriminator(model.config.in_channels, min(config.vqgan_config().image_shape)).to(device)
    precision = partial(torch.autocast, device.type, torch.bfloat16, enabled=config.bf16 is True)
    turns = cycle((generator_step(model, judge, precision), discriminator_step(model, judge, precision)))
    started, steps, runtime = time.perf_counter(), 0, 0.0
    for images in tqdm(batches(config), desc="VQModel", unit="step"):
        next(turns)(images.to(device))
        steps, runtime = steps + 1, time.perf_counter() - started
        if runtime >= seconds:
            break
    save(model, Path(config.output_dir))
    results = {"global_step": steps, "train_runtime": round(runtime, 1)}
    write_json(Path(config.output_dir) / RESULTS_NAME, results)
    return results


def vqmodel(config: Stage1Config) -> Any:
    """A `VQModel` with new weights, in the sizes of a configuration."""
    from diffusers import VQModel

    stock: dict[str, Any] = {"quantizer": "vq", "quantizer_options": {}, "decoder_num_res_blocks": None}
    ours = VQGANModel(VQGANConfig(**config.model | stock))
    with tempfile.TemporaryDirectory() as folder:
        write(ours, Path(folder))
        return VQModel.from_config(VQModel.load_config(folder))


def discriminator(channels: int, image_size: int) -> nn.Sequential:
    """Images `(B, channels, H, W)` to values `(B, 1, h, w)` in [0, 1]; the shorter side has `image_size` pixels."""
    layers: list[nn.Module] = []
    for number in range(min(6, (image_size - 1).bit_length() - 1)):
        width = min(64 * 2**number, 512)
        layers.append(nn.utils.parametrizations.spectral_norm(nn.Conv2d(channels, width, 3, stride=2, padding=1)))
        layers += [nn.InstanceNorm2d(width)] if number else []
        layers.append(nn.LeakyReLU(0.2))
        channels = width
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, 1), nn.Sigmoid())


def generator_step(model: Any, judge: nn.Module, precision: Precision = nullcontext) -> Callable[[Tensor], None]:
    """The function that trains the tokenizer with images `(B, C, H, W)` in [-1, 1]."""
    update = updates(model)

    def step(images: Tensor) -> None:
        with precision():
            reconstruction, codebook_loss = model(images, return_dict=False)
        reconstruction = reconstruction.float()
        error = F.mse_loss(in_unit_range(reconstruction), in_unit_range(images))
        adversarial = -judge(in_unit_range(reconstruction)).mean()
        last = model.decoder.conv_out.weight
        of_error, of_adversarial = (gradient_norm(loss, last) for loss in (error, adversarial))
        weight = (of_error / of_adversarial.clamp(min=SMALLEST_NORM)).clamp(max=MAX_ADVERSARIAL_WEIGHT)
        update(error + codebook_loss + weight * adversarial)

    return step


def discriminator_step(model: Any, judge: nn.Module, precision: Precision = nullcontext) -> Callable[[Tensor], None]:
    """The function that trains the discriminator with images `(B, C, H, W)` in [-1, 1]."""
    update = updates(judge)

    def step(images: Tensor) -> None:
        with torch.no_grad(), precision():
            fake = in_unit_range(model(images, return_dict=False)[0].float())
        real = in_unit_range(images).requires_grad_()
        of_real, of_fake = judge(real), judge(fake)
        (gradient,) = torch.autograd.grad(of_real.sum(), real, create_graph=True)
        penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
        update((F.relu(1 + of_fake) + F.relu(1 - of_real)).mean() + PENALTY_WEIGHT * penalty)

    return step


def updates(module: nn.Module) -> Callable[[Tensor], None]:
    """The function that updates all weights of a module by the gradient of a loss."""
    optimizer = torch.optim.AdamW(module.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def update(loss: Tensor) -> None:
        optimizer.zero_grad()  # a step of the other module has left gradients here
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), MAX_GRAD_NORM)
        optimizer.step()

    return update


def in_unit_range(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] brought to [0, 1]."""
    return (pixels + 1) / 2


def gradient_norm(loss: Tensor, weight: Tensor) -> Tensor:
    """The norm of a loss's gradient with respect to a weight, a scalar without a graph."""
    return torch.autograd.grad(loss, weight, retain_graph=True)[0].norm()


def batches(config: Stage1Config) -> Iterator[Tensor]:
    """Training images float32 `(B, C, H, W)` in [-1, 1], without end."""
    source, model = load_images(config.data)[0], config.vqgan_config()
    shape, channels, data = model.image_shape, model.in_channels, config.data
    images = ImageDataset(
        source, shape, channels, data.augmentation, config.seed, aspect_ratio=data.aspect_ratio, keep_batch_size=True
    )
    sampler = training_sampler(source, config.per_device_train_batch_size, 0, ENDLESS, config.seed)
    for batch in training_loader(images, sampler, config.dataloader_num_workers, pin_memory=False):
        yield batch.images()


def save(model: Any, folder: Path) -> None:
    """Converts the model to a tokenizer of this package, in place of what the folder holds.

    The conversion compares it with the original.
    """
    remove_tree(folder)
    with tempfile.TemporaryDirectory() as original:
        model.save_pretrained(original)
        convert(ConvertConfig(source="diffusers", checkpoint=original, output=str(folder)))
