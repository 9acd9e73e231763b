"""One step of stage 1: the adversarial game between tokenizer and discriminator.

Source: Esser et al. 2021, "Taming transformers for high-resolution image synthesis", section 3.1.
"""

import copy
import math
from collections.abc import Iterable
from itertools import chain
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from einops import rearrange
from torch import Tensor, nn
from torch.optim import AdamW

from configs import ConfigError, Problem
from configs.randomness import seed_from
from stage1_vqgan.data.transfer import to_device
from stage1_vqgan.modeling_vqgan import VQGANModel
from stage1_vqgan.pretrained import load_tokenizer, start_discriminator
from stage1_vqgan.quantizers import VectorQuantizer
from stage1_vqgan.training.codebook import CodebookMonitor, kmeans
from stage1_vqgan.training.config import Stage1Config
from stage1_vqgan.training.discriminator import PatchDiscriminator
from stage1_vqgan.training.losses import (
    ADVERSARIAL_LOSSES,
    PIXEL_LOSSES,
    PerceptualLoss,
    adaptive_weight,
    last_layer_gradients,
)
from stage1_vqgan.training.regularizers import LecamAnchors, gradient_penalty, r1_penalty


class VQGANTrainer:
    """Models, optimizers and losses of a run, and the step that updates them.

    Args:
        config: the run's settings.
        accelerator: decides devices, processes, precision and accumulation.
    """

    def __init__(self, config: Stage1Config, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        torch.manual_seed(config.seed)
        torch.backends.cudnn.benchmark = True  # the shapes of a step are those of all
        memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        model = self._initial_model()
        model.to(memory_format=memory_format)  # type: ignore[call-arg]
        # The moving average of the weights is what is evaluated and saved.
        self.average = copy.deepcopy(model).to(accelerator.device).eval().requires_grad_(False)
        if config.torch_compile:
            model.compile(fullgraph=True, dynamic=False)
        self.generator, self.optimizer = accelerator.prepare(model, self._optimizer(model))
        # accelerate would convert all that the generator returns to float32, its largest features too
        accelerator.unwrap_model(self.generator, keep_fp32_wrapper=False)
        accelerator.register_for_checkpointing(self.average)
        self.monitor = CodebookMonitor(model.config.num_embeddings, accelerator.device)
        accelerator.register_for_checkpointing(self.monitor)
        self.perceptual: PerceptualLoss | None = None
        if config.loss.perceptual_weight:
            self._build_perceptual()
        self.adversarial = ADVERSARIAL_LOSSES[config.loss.adversarial_type]
        self.anchors = LecamAnchors(accelerator.device)
        self.discriminator: nn.Module | None = None
        if config.loss.adversarial_weight:
            self._build_discriminator(model.config.in_channels)

    @property
    def model(self) -> VQGANModel:
        """The tokenizer that is trained, unwrapped."""
        return self.accelerator.unwrap_model(self.generator)

    @property
    def keeps_codes(self) -> bool:
        """Whether encoder and codebook stay as they are."""
        return self.config.trainable == "decoder"

    @property
    def moves_codes(self) -> bool:
        """Whether codes are entries that may be placed by k-means and restarted."""
        return self.model.quantize.has_codebook and not self.keeps_codes

    @property
    def num_codes(self) -> int:
        """K."""
        return self.average.config.num_embeddings

    @property
    def codes_per_image(self) -> int:
        """h · w."""
        return self.average.config.grid_size**2

    def step(self, images: Tensor, number: int) -> dict[str, Tensor]:
        """One update of the generator and then of the discriminator, with one forward of the generator.

        Args:
            images: float32 `(B, C, H, W)` in [-1, 1].
            number: batches this process has had so far.

        Returns:
            Scalars on the device, by the names they are logged under.
        """
        loss, step = self.config.loss, number // self.config.gradient_accumulation_steps
        self.model.quantize.prepare(step / self.config.max_steps, self.image_seeds(number, len(images)))
        accumulated = [model for model in (self.generator, self.discriminator) if model is not None]
        with self.accelerator.accumulate(*accumulated):
            with self.accelerator.autocast():
                out = self.generator(images)
            # The graph is cut at the reconstruction x̂: what each loss wants of x̂ is computed first, and enters the
            # generator in one backward, weighted.
            reconstruction = out.reconstruction.detach().float().requires_grad_()
            terms = self._reconstruction_terms(reconstruction, images)
            (gradient,) = torch.autograd.grad(loss.weighted(terms), reconstruction)
            terms["codebook"] = out.codebook_loss
            metrics: dict[str, Tensor] = {}
            if self.discriminator is not None and step >= loss.adversarial_start_step:
                terms["adversarial"], push = self._adversarial_gradient(reconstruction)
                rate, metrics = self._balance(out.decoder_features, gradient, push)
                gradient = gradient + rate * push

            update = (out.reconstruction * gradient.to(out.reconstruction.dtype)).sum()
            self._update(self.generator, self.optimizer, update + loss.codebook_weight * out.codebook_loss)
            self.monitor.update(out.codes)
            if not self.keeps_codes:
                self.model.quantize.observe(out.latents, out.codes)
            if self.discriminator is not None and step >= loss.discriminator_start_step:
                fake = reconstruction.detach()
                discriminator_loss, penalties, logits = self._discriminator_terms(images, fake, number)
                objective = discriminator_loss + loss.weighted(penalties)
                self._update(self.discriminator, self.discriminator_optimizer, objective)
                terms |= {"discriminator": discriminator_loss, **penalties}
                metrics |= logits

            metrics |= {f"loss/{name}": term for name, term in terms.items()}
            if self.accelerator.sync_gradients:
                self.model.quantize.update(self._sum)
                self._update_average(step)
                metrics |= self._care_for_codebook(out.latents, step + 1)
        return {name: value.detach() for name, value in metrics.items()}

    def _reconstruction_terms(self, reconstruction: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Those terms of weight above 0 that compare pixels or features."""
        weights = self.config.loss
        pixel_losses = {name: loss for name, loss in PIXEL_LOSSES.items() if getattr(weights, f"{name}_weight")}
        terms = {name: loss(reconstruction, images) for name, loss in pixel_losses.items()}
        if self.perceptual is not None:
            with self.accelerator.autocast():
                terms["perceptual"] = self.perceptual(reconstruction, images)
        return terms

    def image_seeds(self, number: int, count: int) -> list[int]:
        """A seed for each image of this process's batch, the same on any number of processes."""
        first = self.accelerator.process_index * count
        return [seed_from(self.config.seed, number, first + index) for index in range(count)]

    def _adversarial_gradient(self, reconstruction: Tensor) -> tuple[Tensor, Tensor]:
        """The generator's adversarial loss and ∂L/∂x̂; the discriminator's own parameters get no gradient."""
        discriminator = self.accelerator.unwrap_model(self.discriminator)
        discriminator.requires_grad_(False)  # else a compiled one would compute all of its gradients
        adversarial = self.adversarial.generator(discriminator(reconstruction).float())
        discriminator.requires_grad_(True)
        return adversarial.detach(), torch.autograd.grad(adversarial, reconstruction)[0]

    def _balance(self, features: Tensor, gradient: Tensor, push: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The adversarial term's weight λ·w, from the last layer's gradients averaged over processes."""
        last_layer = self.model.decoder.conv_out
        pair = last_layer_gradients(features, last_layer, (gradient, push))
        reconstruction_side, adversarial_side = self.accelerator.reduce(pair, "mean")
        adaptive = adaptive_weight(reconstruction_side, adversarial_side)
        rate = adaptive * self.config.loss.adversarial_weight
        norms = reconstruction_side.norm(), adversarial_side.norm()
        return rate, {
            "adversarial/adaptive_weight": adaptive,
            "adversarial/reconstruction_grad_norm": norms[0],
            "adversarial/adversarial_grad_norm": norms[1],
            "adversarial/relative_force": rate * norms[1] / norms[0],
        }

    def _discriminator_terms(
        self, real: Tensor, fake: Tensor, number: int
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """The discriminator's loss, its penalties of weight above 0 by their names, and the mean logits to log."""
        discriminator, weights = cast(nn.Module, self.discriminator), self.config.loss
        real = real.detach().requires_grad_(weights.r1_weight > 0)
        logits_real, logits_fake = discriminator(real).float(), discriminator(fake).float()
        penalties = {}
        if weights.gradient_penalty_weight:
            share = to_device(uniform(self.image_seeds(number, len(real))), real.device)
            penalties["gradient_penalty"] = gradient_penalty(discriminator, real.detach(), fake, share)
        if weights.r1_weight:
            penalties["r1"] = r1_penalty(logits_real, real)
        if weights.lecam_weight:
            self.anchors.update(logits_real, logits_fake, lambda means: self.accelerator.reduce(means, "mean"))
            penalties["lecam"] = self.anchors.penalty(logits_real, logits_fake)
        logits = {"logits/real": logits_real.mean(), "logits/fake": logits_fake.mean()}
        return self.adversarial.discriminator(logits_real, logits_fake), penalties, logits

    def _update(self, model: nn.Module, optimizer: Any, objective: Tensor) -> None:
        self.accelerator.backward(objective)
        if self.accelerator.sync_gradients and self.config.max_grad_norm:
            self.accelerator.clip_grad_norm_(model.parameters(), self.config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    def _care_for_codebook(self, latents: Tensor, step: int) -> dict[str, Tensor]:
        interval = self.config.codebook.restart_interval
        is_last = step == self.config.max_steps  # the decoder must still meet the codes that moved
        if not self.moves_codes or not interval or step % interval or is_last:
            return {}
        restarted = self.monitor.restart(
            *self._codebooks(),
            self.optimizer.optimizer,
            rows(latents.detach()),
            self._sum,
            self.accelerator.gather,
            seed=seed_from(self.config.seed, step),
        )
        return {"codebook/restarted": restarted}

    @torch.no_grad()
    def initialise_codebook(self, batches: Iterable[Tensor]) -> None:
        """k-means over the latents of the given batches, as `step` takes them, of all processes together."""
        # gathered batch by batch: the order of the latents does not depend on the number of processes
        everything = torch.cat([self.accelerator.gather(rows(self.average.encode(x).latents)) for x in batches])
        spherical = self._codebooks()[0].l2_normalize
        centres = kmeans(everything, self.num_codes, spherical, self.config.seed)
        centres = broadcast(centres)  # sums on a GPU come in any order: take those of one process
        for quantizer in self._codebooks():
            quantizer.move_entries(torch.arange(self.num_codes, device=centres.device), centres)

    def set_learning_rate(self, step: int) -> float:
        """Sets the rates of both optimizers for a step; returns the generator's."""
        config, shape = self.config, schedule(self.config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * shape
        if self.discriminator is not None:
            for group in self.discriminator_optimizer.param_groups:
                group["lr"] = (config.discriminator.learning_rate or config.learning_rate) * shape
        return config.learning_rate * shape

    def statistics(self) -> dict[str, float]:
        """Codebook usage and perplexity since the last call."""
        return {name: value.item() for name, value in self.monitor.statistics(self._sum).items()}

    def state(self) -> Iterable[tuple[str, Iterable[Tensor]]]:
        """Everything a checkpoint holds that training may drive out of range, by what it belongs to."""
        yield "the generator", self.model.parameters()
        yield "the moving average", self.average.parameters()
        optimizers = {"generator": self.optimizer}
        if self.discriminator is not None:
            yield "the discriminator", chain(self.discriminator.parameters(), self.discriminator.buffers())
            yield "the discriminator's LeCam anchors", self.anchors.buffers()
            optimizers["discriminator"] = self.discriminator_optimizer
        for name, optimizer in optimizers.items():
            moments = [value for state in optimizer.state.values() for value in state.values()]
            if moments:
                yield f"the {name}'s optimizer", moments

    def pool_statistics(self) -> None:
        """Sums the codebook's counters on the main process, whose counters are those a checkpoint holds."""
        for name in ("logged", "recent"):
            setattr(self.monitor, name, self._sum(getattr(self.monitor, name)))
        self.keep_statistics_on_main_process()

    def keep_statistics_on_main_process(self) -> None:
        """Clears the counters of the other processes, which hold the same after loading a checkpoint."""
        if not self.accelerator.is_main_process:
            self.monitor.logged.zero_()
            self.monitor.recent.zero_()

    def _codebooks(self) -> tuple[VectorQuantizer, VectorQuantizer]:
        """The trained codebook and its moving average, where `moves_codes`."""
        return cast(VectorQuantizer, self.model.quantize), cast(VectorQuantizer, self.average.quantize)

    def _sum(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value.clone(), "sum")

    def _initial_model(self) -> VQGANModel:
        """The tokenizer before its first step: a new one, or the one to fine-tune."""
        config = self.config
        if config.model_name_or_path is None:
            return VQGANModel(config.vqgan_config())
        model = load_tokenizer(config.model_name_or_path, "model_name_or_path", **config.model).train()
        found = config.size_problems(model.config.image_size)
        problems = [Problem(field, f"received {value!r}; {message}") for field, value, message in found]
        if problems:
            raise ConfigError(problems)
        if self.keeps_codes:
            for part in (model.encoder, model.quant_conv, model.quantize):
                part.requires_grad_(False).eval()
        else:
            model.config.fingerprint = None  # other codes: it gets a new one when it is saved
        return model

    def _optimizer(self, model: nn.Module) -> AdamW:
        config = self.config
        return AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )

    @torch.no_grad()
    def _update_average(self, step: int) -> None:
        weight = 1 - self.config.average_decay(step)
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), weight)
        for own, other in zip(self.average.buffers(), self.model.buffers(), strict=True):
            own.copy_(other)

    def _build_perceptual(self) -> None:
        settings = self.config.loss
        try:
            perceptual = PerceptualLoss(settings.lpips_backbone, settings.lpips_weights)
        except (FileNotFoundError, ValueError) as error:
            raise ConfigError([Problem("loss", str(error))]) from error
        if self.config.channels_last:  # as the images that it gets
            perceptual.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.perceptual = perceptual.to(self.accelerator.device)
        if self.config.torch_compile:
            self.perceptual.compile(fullgraph=True, dynamic=False)

    def _build_discriminator(self, in_channels: int) -> None:
        settings = self.config.discriminator
        discriminator = PatchDiscriminator(in_channels, settings.base_channels, settings.num_layers, settings.norm_type)
        if self.config.model_name_or_path and (
            told := start_discriminator(discriminator, self.config.model_name_or_path)
        ):
            self.accelerator.print(told)
        if self.accelerator.device.type == "cuda" and self.accelerator.num_processes > 1:
            discriminator = nn.SyncBatchNorm.convert_sync_batchnorm(discriminator)
        if self.config.compiles_discriminator:
            discriminator.compile(dynamic=False)  # SyncBatchNorm may break the graph
        self.discriminator, self.discriminator_optimizer = self.accelerator.prepare(
            discriminator, self._optimizer(discriminator)
        )
        self.accelerator.register_for_checkpointing(self.anchors)


def rows(latents: Tensor | None) -> Tensor:
    """Latents `(B, D, h, w)` as `(B·h·w, D)`."""
    return rearrange(cast(Tensor, latents), "B D h w -> (B h w) D")


def uniform(image_seeds: Iterable[int]) -> Tensor:
    """One number in [0, 1) for each image: float32 `(B,)`, not of the same draws as the quantizer's noise."""
    return torch.cat(
        [torch.rand(1, generator=torch.Generator().manual_seed(seed_from(seed, 1))) for seed in image_seeds]
    )


def schedule(config: Stage1Config, step: int) -> float:
    """Learning rate of a step as a fraction of its peak: linear warm-up, then constant, linear or cosine to zero."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    if config.lr_scheduler_type == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if config.lr_scheduler_type == "linear" else 1.0
