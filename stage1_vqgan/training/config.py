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
    Fraction,
    NonNegative,
    launched_processes,
)
from configs.values import read_value
from stage1_vqgan.configuration_architecture import VQGANArchitecture
from stage1_vqgan.data.config import DataConfig
from stage1_vqgan.evaluation.config import TrainingMetricsConfig
from stage1_vqgan.training.discriminator_config import DiscriminatorConfig, logit_grid_size
from stage1_vqgan.training.loss_config import LPIPS_MIN_SIZE, LossConfig

if TYPE_CHECKING:
    from stage1_vqgan.configuration_vqgan import VQGANConfig

MOST_CHANNELS = 2**10  # of an image


@dataclass(kw_only=True)
class CodebookConfig(Section):
    """Upkeep of codebooks whose entries can be moved: of all quantizers but simvq, ibq, fsq, lfq and bsq.

    kmeans_init_batches: batches of whole steps whose latents initialise the codebook by k-means; 0 leaves it random
    restart_interval: steps between restarts, which move unused codes onto random latents; 0 never restarts
    """

    kmeans_init_batches: Annotated[int, Ge(0), Le(10_000)] = 8
    restart_interval: NonNegative = 100


@dataclass(kw_only=True)
class PerturbationConfig(Section):
    """Wrong codes in training, so that the decoder tolerates those that a prior will sample.

    image_share: share of the images that get wrong codes; 0 turns this off. RobusTok: 0.1
    code_share: share of the codes of such an image that are replaced
    neighbours: a replaced code becomes one of the codes whose entries are nearest to its own, out of this many; the
        code itself is the first of them
    """

    image_share: Fraction = 0.0
    code_share: Fraction = 1.0
    neighbours: Annotated[int, Ge(2), Le(2**20)] = 100


@dataclass(kw_only=True)
class Stage1Config(TrainingConfig):
    """Stage 1: trains a VQGAN tokenizer.

    channels_last: channels-last memory format, with which convolutions are faster; it is not used in bfloat16 on a CPU,
        where normalisation is slow in this format
    torch_compile: compiles encoder, decoder, LPIPS and discriminator: faster steps after some minutes at the start; the
        discriminator is not compiled with "actnorm", loss.gradient_penalty_weight or loss.r1_weight; nor are other
        discriminators than patchgan, shift-tolerant LPIPS and networks that are named
    gradient_checkpointing: keeps only the inputs of the tokenizer's levels for the backward, which computes the levels
        again: less memory, and about a quarter more time for the tokenizer; the numbers stay the same
    num_sample_images: images in the reconstruction grid of every evaluation
    min_lr_rate: "linear" and "cosine" end at this fraction of the learning rates instead of at 0
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
    perturbation: PerturbationConfig = field(default_factory=PerturbationConfig)
    metrics: TrainingMetricsConfig = field(default_factory=TrainingMetricsConfig)
    channels_last: bool = True
    torch_compile: bool = False
    gradient_checkpointing: bool = False
    num_sample_images: Annotated[int, Ge(1), MOST_PICTURES] = 8
    min_lr_rate: Fraction = 0.0

    def vqgan_config(self) -> "VQGANConfig":
        """The configuration of the model to train."""
        from stage1_vqgan.configuration_vqgan import VQGANConfig

        return VQGANConfig(**self.model)

    def settle(self) -> None:
        super().settle()
        self.loss.settle_steps(self.max_steps)

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

        After the warm-up it is constant, or falls to `min_lr_rate` at `max_steps`, linearly or as a cosine.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps)
        falling = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress}
        factor = falling.get(self.lr_scheduler_type, 1.0)
        return factor * (1 - self.min_lr_rate) + self.min_lr_rate

    def of_discriminator(self, name: str) -> Any:
        """A setting of the discriminator's optimizer, by its key: that of `discriminator`, or else the generator's."""
        own = getattr(self.discriminator, name)
        return getattr(self, name) if own is None else own

    @property
    def compiles_discriminator(self) -> bool:
        """Whether the discriminator is compiled.

        A compiled module cannot be differentiated twice, which penalties on gradients need. Nor can it initialise
        ActNorm in the first batch.
        """
        differentiated_twice = self.loss.gradient_penalty_weight or self.loss.r1_weight
        is_simple = self.discriminator.type == "patchgan" and self.discriminator.norm_type != "actnorm"
        return self.torch_compile and is_simple and not differentiated_twice

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
        if self.min_lr_rate and self.lr_scheduler_type == "constant_with_warmup":
            yield "min_lr_rate", self.min_lr_rate, "lr_scheduler_type must be linear or cosine, or this one 0"
        loss, kind, norm_type = self.loss, self.discriminator.type, self.discriminator.norm_type
        penalised = loss.adversarial_weight and (loss.gradient_penalty_weight or loss.r1_weight)
        if penalised and kind == "features":
            allowed = (
                "loss.gradient_penalty_weight and loss.r1_weight need 'patchgan' or 'stylegan': attention in a frozen "
                "network cannot be differentiated twice on a GPU; loss.lecam_weight restrains this one"
            )
            yield "discriminator.type", kind, allowed
        if penalised and kind == "patchgan" and norm_type == "batch":
            allowed = (
                "loss.gradient_penalty_weight and loss.r1_weight need 'group' or 'actnorm': with 'batch' the gradient "
                "at an image depends on the other images"
            )
            yield "discriminator.norm_type", norm_type, allowed
        if self.data.augmentation.ten_crop:
            allowed = "it is for the views of a code store (stage 2); for training images use random_crop"
            yield "data.augmentation.ten_crop", True, allowed
        if self.trainable == "decoder" and loss.alignment_weight:
            yield (
                "loss.alignment_weight",
                loss.alignment_weight,
                "the latents are frozen (trainable: decoder); set it to 0",
            )
        if self.trainable == "decoder" and self.model_name_or_path is None:
            yield "trainable", self.trainable, "needs model_name_or_path: the tokenizer whose codes are frozen"
        model, wrong = self._model_fields()
        yield from wrong
        if self.model_name_or_path is not None:  # `components.build_tokenizer` checks the rest
            return
        yield from self.channel_problems(model.in_channels)
        names = {key.removeprefix("model.") for key, _, _ in wrong}
        for name, value, allowed in model.architecture_problems():
            if not any(re.search(rf"\b{other}\b", f"{name} {allowed}") for other in names):
                yield f"model.{name}", value, allowed
                names.add(name)
        if not names & {"image_size", "channel_multiplier"}:
            yield from self._memory_problems(model)
            yield from self.size_problems(model)

    def library_problems(self) -> Iterable[tuple[str, Any, str]]:
        yield from super().library_problems()
        if self.model_name_or_path is None:
            from stage1_vqgan.quantizers import option_problems

            model = self._model_fields()[0]
            options = option_problems(model.quantizer, model.quantizer_options, model.num_embeddings, model.embed_dim)
            for name, value, allowed in options:
                yield f"model.{name}", value, allowed

    def channel_problems(self, channels: int) -> Iterable[tuple[str, Any, str]]:
        """The problem of a tokenizer with more channels than images can have, in the form of `problems`."""
        if channels > MOST_CHANNELS:
            yield "model.in_channels", channels, f"images have at most {MOST_CHANNELS} channels"

    def size_problems(self, model: VQGANArchitecture) -> Iterable[tuple[str, Any, str]]:
        """Problems of losses and discriminator with images of `model.image_size`, in the form of `problems`."""
        loss, size = self.loss, min(model.image_shape)
        smallest = LPIPS_MIN_SIZE[loss.lpips_backbone]
        if loss.perceptual_weight and size < smallest:
            allowed = f"LPIPS with {loss.lpips_backbone} needs {smallest} pixels; set loss.perceptual_weight to 0"
            yield "model.image_size", model.image_size, allowed
        is_patchgan = self.discriminator.type == "patchgan"
        if loss.adversarial_weight and is_patchgan and logit_grid_size(size, self.discriminator.num_layers) < 1:
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
