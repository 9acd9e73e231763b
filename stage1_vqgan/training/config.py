"""Settings of stage 1, the training of a tokenizer."""

import math
import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, fields
from math import prod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Le

from configs import Section, TrainingConfig, unknown_key
from configs.memory import total_memory
from configs.problems import in_bytes, nearest, shown
from configs.sections import (
    LAUNCHED_WITH,
    MOST_PICTURES,
    SWITCHED_ON,
    NonNegative,
    NonNegativeFloat,
    PositiveFloat,
    Share,
    in_steps,
    launched_processes,
)
from configs.values import read_value
from stage1_vqgan.configuration_architecture import VQGANArchitecture
from stage1_vqgan.data.config import DataConfig

if TYPE_CHECKING:
    from stage1_vqgan.configuration_vqgan import VQGANConfig

Backbone = Literal["vgg", "alex", "squeeze"]
AdversarialType = Literal["hinge", "vanilla", "non_saturating", "wasserstein"]
NormType = Literal["batch", "group", "actnorm"]

MOST_CHANNELS = 2**10  # of an image

# Smallest image side that passes every pooling layer of the LPIPS backbone.
LPIPS_MIN_SIZE: dict[Backbone, int] = {"vgg": 16, "alex": 32, "squeeze": 32}


@dataclass(kw_only=True)
class LossConfig(Section):
    """Terms of the objective and their weights. A term of weight 0 is not computed, and its models are not built.

    l1_weight, l2_weight: mean absolute and mean squared error of the pixels
    perceptual_weight: LPIPS
    lpips_backbone, lpips_weights: "vgg", "alex" or "squeeze"; "pretrained", torchvision's weight file, or "random"
    codebook_weight: codebook and commitment terms
    adversarial_weight: multiplies the adaptive weight λ; 0 trains a VQ-VAE, without a discriminator
    adversarial_type: "hinge", "vanilla", "non_saturating" or "wasserstein"
    discriminator_start_step: first step that trains the discriminator; below 1 a share of the run
    adversarial_start_step: first step in which the generator has an adversarial term; below 1 a share of the run; a run
        that ends before it trains no discriminator
    gradient_penalty_weight: WGAN-GP's penalty on the discriminator's gradients between images and reconstructions
    r1_weight: γ of the penalty on the discriminator's gradients at images
    lecam_weight: LeCam's penalty on the distance of the discriminator's logits from their moving averages
    """

    l1_weight: NonNegativeFloat = 1.0
    l2_weight: NonNegativeFloat = 0.0
    perceptual_weight: NonNegativeFloat = 1.0
    lpips_backbone: Backbone = "vgg"
    lpips_weights: str = "pretrained"
    codebook_weight: PositiveFloat = 1.0
    adversarial_weight: NonNegativeFloat = 0.5
    adversarial_type: AdversarialType = "hinge"
    discriminator_start_step: NonNegative | Share = 0
    adversarial_start_step: NonNegative | Share = 0
    gradient_penalty_weight: NonNegativeFloat = 0.0
    r1_weight: NonNegativeFloat = 0.0
    lecam_weight: NonNegativeFloat = 0.0

    def problems(self) -> Iterable[tuple[str, Any, str]]:
        if not self.l1_weight and not self.l2_weight and not self.perceptual_weight:
            yield "l1_weight", self.l1_weight, "l1_weight, l2_weight and perceptual_weight must not all be 0"
        if self.adversarial_weight and self.adversarial_type == "wasserstein" and not self._has_penalty:
            allowed = (
                "the loss of a Wasserstein discriminator has no lower bound: set gradient_penalty_weight (10 in the "
                "paper), r1_weight or lecam_weight above 0"
            )
            yield "adversarial_type", self.adversarial_type, allowed
        if self.adversarial_weight and self.adversarial_start_step < self.discriminator_start_step:
            allowed = f"must be at least discriminator_start_step ({self.discriminator_start_step})"
            yield "adversarial_start_step", self.adversarial_start_step, allowed

    @property
    def _has_penalty(self) -> bool:
        return any((self.gradient_penalty_weight, self.r1_weight, self.lecam_weight))


@dataclass(kw_only=True)
class DiscriminatorConfig(Section):
    """The PatchGAN discriminator.

    base_channels: width after the first convolution
    num_layers: number of convolutions with stride 2; it determines the size of a patch
    norm_type: "batch" (synchronised over GPUs), "group" or "actnorm"
    learning_rate: peak learning rate; by default the generator's
    """

    base_channels: Annotated[int, Ge(4), Le(4096)] = 64
    num_layers: Annotated[int, Ge(1), Le(8)] = 3
    norm_type: NormType = "batch"
    learning_rate: PositiveFloat | None = None


@dataclass(kw_only=True)
class CodebookConfig(Section):
    """Upkeep of the codebook, for the quantizers that have one: vq and ema.

    kmeans_init_batches: batches whose latents initialise the codebook by k-means; 0 keeps the uniform initialisation
    restart_interval: steps between restarts, which move unused codes onto random latents; 0 never restarts
    """

    kmeans_init_batches: Annotated[int, Ge(0), Le(10_000)] = 8
    restart_interval: NonNegative = 100


@dataclass(kw_only=True)
class Stage1Config(TrainingConfig):
    """Stage 1: trains a VQGAN tokenizer.

    channels_last: channels-last memory format, with which convolutions are faster
    torch_compile: compiles encoder, decoder, LPIPS and discriminator: faster steps after some minutes at the start; the
        discriminator is not compiled with "actnorm", loss.gradient_penalty_weight or loss.r1_weight
    gradient_checkpointing: keeps only the inputs of the tokenizer's levels for the backward, which computes the levels
        again: less memory, and about a quarter more time for the tokenizer; the numbers stay the same
    num_sample_images: images in the reconstruction grid of every evaluation
    model: fields of VQGANConfig, see below
    model_name_or_path: fine-tunes the tokenizer in this folder or Hub repository, without k-means; `model` may then
        change fields that do not change the shapes of the weights, for instance image_size
    trainable: "all", or "decoder", which freezes encoder and codebook, so that all codes stay the same
    """

    preset: ClassVar[str] = "stage1"
    fields_of: ClassVar[dict[str, type]] = {"model": VQGANArchitecture}

    model: dict[str, Any] = field(default_factory=dict)
    model_name_or_path: str | None = None
    trainable: Literal["all", "decoder"] = "all"
    data: DataConfig
    loss: LossConfig = field(default_factory=LossConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    channels_last: bool = True
    torch_compile: bool = False
    gradient_checkpointing: bool = False
    num_sample_images: Annotated[int, Ge(1), MOST_PICTURES] = 8

    def vqgan_config(self) -> "VQGANConfig":
        """The configuration of the model to train."""
        from stage1_vqgan.configuration_vqgan import VQGANConfig

        return VQGANConfig(**self.model)

    def settle(self) -> None:
        super().settle()
        for name in ("discriminator_start_step", "adversarial_start_step"):
            setattr(self.loss, name, in_steps(getattr(self.loss, name), self.max_steps))

    @property
    def has_discriminator(self) -> bool:
        """Whether the run trains a discriminator: the generator gets the adversarial term in at least one step."""
        return self.loss.adversarial_weight > 0 and self.loss.adversarial_start_step < self.max_steps

    @property
    def codes_are_frozen(self) -> bool:
        """Whether encoder and codebook keep their weights."""
        return self.trainable == "decoder"

    def learning_rate_factor(self, step: int) -> float:
        """Learning rate at a step (from 0), as a fraction of its peak: linear warm-up, then `lr_scheduler_type`.

        After the warm-up it is constant, or falls to 0 at `max_steps`, linearly or as a cosine.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps)
        if self.lr_scheduler_type == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        return 1 - progress if self.lr_scheduler_type == "linear" else 1.0

    @property
    def compiles_discriminator(self) -> bool:
        """Whether the discriminator is compiled.

        A compiled module cannot be differentiated twice, which penalties on gradients need. Nor can it initialise
        ActNorm in the first batch.
        """
        differentiated_twice = self.loss.gradient_penalty_weight or self.loss.r1_weight
        return self.torch_compile and self.discriminator.norm_type != "actnorm" and not differentiated_twice

    refused: ClassVar[dict[str, str]] = TrainingConfig.refused | {
        "fp16": "stage 1 cannot train in float16: gradients of the adversarial term are taken unscaled; use bf16: true"
    }

    def problems(self) -> Iterable[tuple[str, Any, str]]:
        yield from super().problems()
        for name in ("FSDP", "DEEPSPEED"):
            if (LAUNCHED_WITH[f"USE_{name}"] or "").lower() in SWITCHED_ON:
                reason = "it trains two models and a moving average (ema_decay), which cannot be sharded"
                yield "", None, f"stage 1 was launched with {name}, but {reason}; use accelerate launch --multi_gpu"
        steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", str(self.gradient_accumulation_steps))
        if steps != str(self.gradient_accumulation_steps):
            allowed = f"accelerate launch, or its config file, says {shown(steps)}; leave it out there"
            yield "gradient_accumulation_steps", self.gradient_accumulation_steps, allowed
        loss, norm_type = self.loss, self.discriminator.norm_type
        if loss.adversarial_weight and norm_type == "batch" and (loss.gradient_penalty_weight or loss.r1_weight):
            allowed = (
                "loss.gradient_penalty_weight and loss.r1_weight need 'group' or 'actnorm': with 'batch' the gradient "
                "at an image depends on the other images"
            )
            yield "discriminator.norm_type", norm_type, allowed
        if self.data.augmentation.ten_crop:
            allowed = "it is for the views of a code store (stage 2); for training images use random_crop"
            yield "data.augmentation.ten_crop", True, allowed
        if self.trainable == "decoder" and self.model_name_or_path is None:
            yield "trainable", self.trainable, "needs model_name_or_path: the tokenizer whose codes are frozen"
        model, wrong = self._model_fields()
        yield from wrong
        if self.model_name_or_path is not None:  # `components.build_tokenizer` checks the rest
            return
        if model.in_channels > MOST_CHANNELS:
            yield "model.in_channels", model.in_channels, f"images have at most {MOST_CHANNELS} channels"
        if "model.image_size" not in {key for key, _, _ in wrong}:
            yield from self._memory_problems(model)
        names = {key.removeprefix("model.") for key, _, _ in wrong}
        for name, value, allowed in model.architecture_problems():
            if not any(re.search(rf"\b{other}\b", f"{name} {allowed}") for other in names):
                yield f"model.{name}", value, allowed
                names.add(name)
        if not names & {"image_size", "channel_multiplier"}:
            yield from self.size_problems(model)

    def library_problems(self) -> Iterable[tuple[str, Any, str]]:
        yield from super().library_problems()
        if self.model_name_or_path is None:
            from stage1_vqgan.quantizers import option_problems

            model = self._model_fields()[0]
            options = option_problems(model.quantizer, model.quantizer_options, model.num_embeddings, model.embed_dim)
            for name, value, allowed in options:
                yield f"model.{name}", value, allowed

    def size_problems(self, model: VQGANArchitecture) -> Iterable[tuple[str, Any, str]]:
        """Problems of losses and discriminator with images of `model.image_size`, in the form of `problems`."""
        loss, size = self.loss, min(model.image_shape)
        smallest = LPIPS_MIN_SIZE[loss.lpips_backbone]
        if loss.perceptual_weight and size < smallest:
            allowed = f"LPIPS with {loss.lpips_backbone} needs {smallest} pixels; set loss.perceptual_weight to 0"
            yield "model.image_size", model.image_size, allowed
        if loss.adversarial_weight and logit_grid_size(size, self.discriminator.num_layers) < 1:
            most = max((layers for layers in range(9) if logit_grid_size(size, layers) >= 1), default=0)
            allowed = f"images of {size} pixels (the shorter side of model.image_size) allow at most {most}"
            yield "discriminator.num_layers", self.discriminator.num_layers, allowed

    def _memory_problems(self, model: VQGANArchitecture) -> Iterable[tuple[str, Any, str]]:
        """The problem of a batch whose pixels alone are larger than the machine's memory.

        A pixel has 4 bytes in float32. Each worker holds three batches with 1 byte per pixel.
        """
        batch_size = self.device_batch_size(launched_processes())
        needed = max(4, 3 * self.dataloader_num_workers) * batch_size * model.in_channels * prod(model.image_shape)
        if needed > (memory := total_memory()):
            images = f"{batch_size:,} images of a batch need {in_bytes(needed)} for their pixels"
            advice = f"this machine has {in_bytes(memory)}; lower it or per_device_train_batch_size"
            yield "model.image_size", model.image_size, f"{images}, but {advice}"

    def _model_fields(self) -> tuple[VQGANArchitecture, list[tuple[str, Any, str]]]:
        """The architecture, with defaults in place of values of a wrong type, and the problems of these values."""
        types = {field.name: field.type for field in fields(VQGANArchitecture)}
        model, wrong = VQGANArchitecture(), []
        for name, value in self.model.items():
            if name not in types:
                wrong.append((f"model.{name}", None, _unknown_field(name, types)))
                continue
            try:
                setattr(model, name, read_value(types[name], value, strict=True))
            except ValueError as error:
                wrong.append((f"model.{name}", None, str(error)))
        return model, wrong


def _unknown_field(name: str, fields_of_model: Collection[str]) -> str:
    if not nearest(name, fields_of_model):
        from stage1_vqgan.quantizers import QUANTIZERS  # slow to import, so only for a name that resembles no field

        if any(name == option.name for kind in QUANTIZERS.values() for option in fields(kind.Options)):
            return unknown_key(name, fields_of_model, f"model.quantizer_options.{name}")
    return unknown_key(name, fields_of_model)


def logit_grid_size(image_size: int, num_layers: int) -> int:
    """Shorter side of the discriminator's logit grid, for that of an image. Below 1, the image is too small for it."""
    for _ in range(num_layers):
        image_size //= 2
    return image_size - 2
