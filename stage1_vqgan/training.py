"""The training of stage 1: one step of the adversarial game, and the loop around it.

Source: Esser et al. 2021, "Taming transformers for high-resolution image synthesis", section 3.1.
"""

import copy
import math
import time
from collections import defaultdict
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from einops import rearrange
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel

from configs import check
from configs.run_folder import finish_run, open_run
from stage1_vqgan import checkpointing
from stage1_vqgan.codebook import CodebookMonitor, kmeans
from stage1_vqgan.data import ImageDataset, TrainingSampler, keyed_loader, load_images, training_loader
from stage1_vqgan.discriminator import PatchDiscriminator
from stage1_vqgan.evaluate import evaluate_reconstruction
from stage1_vqgan.image_processing_vqgan import VQGANImageProcessor, image_grid, normalize
from stage1_vqgan.losses import (
    PerceptualLoss,
    adaptive_weight,
    discriminator_hinge_loss,
    generator_hinge_loss,
    last_layer_gradient,
    pixel_loss,
)
from stage1_vqgan.modeling_vqgan import VQGANModel
from stage1_vqgan.reporting import Reporter
from stage1_vqgan.training_config import Stage1Config


class VQGANTrainer:
    """Models, optimizers and losses of a run, and the step that updates them.

    Args:
        config: the run's settings.
        accelerator: decides devices, processes, precision and accumulation.
    """

    def __init__(self, config: Stage1Config, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        torch.manual_seed(config.seed)
        memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        model = VQGANModel(config.vqgan_config())
        model.to(memory_format=memory_format)  # type: ignore[call-arg]
        self.ema = AveragedModel(model, multi_avg_fn=self._update_average).to(accelerator.device)
        self.ema.eval()
        self.generator, self.optimizer = accelerator.prepare(model, self._optimizer(model))
        accelerator.register_for_checkpointing(self.ema)
        self.monitor = CodebookMonitor(model.config.num_embeddings, accelerator.device)
        accelerator.register_for_checkpointing(self.monitor)
        self.perceptual: PerceptualLoss | None = None
        if config.loss.perceptual_weight:
            self.perceptual = PerceptualLoss(config.loss.lpips_backbone, config.loss.lpips_weights).to(
                accelerator.device
            )
        self.discriminator: nn.Module | None = None
        if config.loss.adversarial_weight:
            self._build_discriminator(model.config.in_channels)

    @property
    def model(self) -> VQGANModel:
        """The tokenizer that is trained, unwrapped."""
        return self.accelerator.unwrap_model(self.generator)

    @property
    def average(self) -> VQGANModel:
        """Its moving average, which is evaluated and saved."""
        return cast(VQGANModel, self.ema.module)

    def step(self, images: Tensor, step: int) -> dict[str, Tensor]:
        """One update of the generator and then of the discriminator, with one forward of the generator.

        Args:
            images: float32 `(B, C, H, W)` in [-1, 1].
            step: optimizer steps done so far.

        Returns:
            Scalars on the device, by the names they are logged under.
        """
        loss = self.config.loss
        accumulated = [model for model in (self.generator, self.discriminator) if model is not None]
        with self.accelerator.accumulate(*accumulated):
            out = self.generator(images)
            # The graph is cut at the reconstruction x̂: what each loss wants of x̂ is computed first, and enters the
            # generator in one backward, weighted.
            reconstruction = out.reconstruction.detach().float().requires_grad_()
            terms = {"pixel": pixel_loss(reconstruction, images)}
            if self.perceptual is not None:
                terms["perceptual"] = self.perceptual(reconstruction, images)
            reconstruction_loss = sum(getattr(loss, f"{name}_weight") * term for name, term in terms.items())
            (gradient,) = torch.autograd.grad(reconstruction_loss, reconstruction)

            metrics = {f"loss/{name}": term.detach() for name, term in terms.items()}
            metrics["loss/codebook"] = out.codebook_loss.detach()
            if self.discriminator is not None and step >= loss.adversarial_start_step:
                adversarial, push = self._adversarial_gradient(reconstruction)
                rate, balance = self._balance(out.decoder_features, gradient, push)
                gradient = gradient + rate * push
                metrics |= {"loss/generator": adversarial, **balance}

            update = (out.reconstruction * gradient.to(out.reconstruction.dtype)).sum()
            self._update(self.generator, self.optimizer, update + loss.codebook_weight * out.codebook_loss)
            self.monitor.update(out.codes)
            if self.discriminator is not None and step >= loss.discriminator_start_step:
                logits_real = self.discriminator(images).float()
                logits_fake = self.discriminator(reconstruction.detach()).float()
                discriminator_loss = discriminator_hinge_loss(logits_real, logits_fake)
                self._update(self.discriminator, self.discriminator_optimizer, discriminator_loss)
                metrics["loss/discriminator"] = discriminator_loss.detach()
                metrics |= {"logits/real": logits_real.detach().mean(), "logits/fake": logits_fake.detach().mean()}

            if self.accelerator.sync_gradients:
                self.ema.update_parameters(self.model)
                metrics |= self._care_for_codebook(out.latents, step + 1)
        return metrics

    def _adversarial_gradient(self, reconstruction: Tensor) -> tuple[Tensor, Tensor]:
        """The generator's adversarial loss and ∂L/∂x̂; the discriminator's own parameters get no gradient."""
        discriminator = self.accelerator.unwrap_model(self.discriminator)
        with self.accelerator.autocast():
            adversarial = generator_hinge_loss(discriminator(reconstruction).float())
        return adversarial.detach(), torch.autograd.grad(adversarial, reconstruction)[0]

    def _balance(self, features: Tensor, gradient: Tensor, push: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The adversarial term's weight λ·w, from the last layer's gradients averaged over processes."""
        last_layer = self.model.decoder.conv_out
        pair = torch.stack([last_layer_gradient(features, last_layer, g) for g in (gradient, push)])
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

    def _update(self, model: nn.Module, optimizer: Any, objective: Tensor) -> None:
        self.accelerator.backward(objective)
        if self.accelerator.sync_gradients and self.config.max_grad_norm:
            self.accelerator.clip_grad_norm_(model.parameters(), self.config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    def _care_for_codebook(self, latents: Tensor, step: int) -> dict[str, Tensor]:
        interval = self.config.codebook.restart_interval
        if not interval or step % interval:
            return {}
        restarted = self.monitor.restart(
            self.model.quantize,
            self.average.quantize,
            self.optimizer.optimizer,
            rows(latents.detach()),
            self._sum,
            self.accelerator.gather,
            seed=key(self.config.seed, step),
        )
        return {"codebook/restarted": restarted}

    @torch.no_grad()
    def initialise_codebook(self, batches: Iterable[Tensor]) -> None:
        """k-means over the latents of the given uint8 batches, of all processes together."""
        latents = [rows(self.model.encode(normalize(batch.to(self.accelerator.device))).latents) for batch in batches]
        everything = self.accelerator.gather(torch.cat(latents))
        config = self.model.config
        centres = kmeans(everything, config.num_embeddings, config.l2_normalize, self.config.seed)
        for model in (self.model, self.average):
            model.quantize.embedding.weight.copy_(centres)

    def set_learning_rate(self, step: int) -> float:
        """Sets the rates of both optimizers for a step; returns the generator's."""
        config, shape = self.config, schedule(self.config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * shape
        if self.discriminator is not None:
            for group in self.discriminator_optimizer.param_groups:
                group["lr"] = (config.discriminator.learning_rate or config.learning_rate) * shape
        return config.learning_rate * shape

    def statistics(self) -> dict[str, Tensor]:
        """Codebook usage and perplexity since the last call."""
        return self.monitor.statistics(self._sum)

    def _sum(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value.clone(), "sum")

    def _optimizer(self, model: nn.Module) -> AdamW:
        config = self.config
        return AdamW(
            model.parameters(),
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )

    def _update_average(self, averaged: Any, current: Any, count: Tensor | int) -> None:
        # a young average follows quickly: decay (1 + n) / (10 + n) until it reaches the configured one
        number = int(count)
        decay = min(self.config.ema_decay, (1 + number) / (10 + number))
        torch._foreach_lerp_(averaged, current, 1 - decay)

    def _build_discriminator(self, in_channels: int) -> None:
        settings = self.config.discriminator
        discriminator: nn.Module = PatchDiscriminator(
            in_channels, settings.base_channels, settings.num_layers, settings.norm_type
        )
        if self.accelerator.device.type == "cuda" and self.accelerator.num_processes > 1:
            discriminator = nn.SyncBatchNorm.convert_sync_batchnorm(discriminator)
        self.discriminator, self.discriminator_optimizer = self.accelerator.prepare(
            discriminator, self._optimizer(discriminator)
        )


def train(config: Stage1Config) -> VQGANModel:
    """Trains a tokenizer, or goes on with a run that was interrupted, and saves it in `config.output_dir`.

    Returns:
        The trained tokenizer (the moving average of the weights), on the CPU.

    Raises:
        ConfigError: the configuration cannot work, or the folder holds a run with other settings.
    """
    config = check(config)
    accelerator = Accelerator(
        mixed_precision="bf16" if config.bf16 else None,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.report_to,
        project_dir=config.output_dir,
    )
    finished = open_run(config, accelerator.is_main_process)
    if finished is not None:
        accelerator.print(
            f"{config.output_dir} holds the finished run ({finished['global_step']} steps); nothing to do"
        )
        return VQGANModel.from_pretrained(config.output_dir)
    accelerator.wait_for_everyone()
    started = time.perf_counter()

    trainer = VQGANTrainer(config, accelerator)
    model_config = trainer.model.config
    train_source, validation_source = load_images(config.data)
    size, channels = model_config.image_size, model_config.in_channels
    train_set = ImageDataset(train_source, size, channels, config.data.augmentation, config.seed)
    validation_set = ImageDataset(validation_source, size, channels)

    checkpoint = checkpointing.find(config.output_dir, config.resume_from_checkpoint)
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        accelerator.print(f"going on from {checkpoint}")
    start = checkpointing.step_of(checkpoint) if checkpoint is not None else 0

    accumulation = config.gradient_accumulation_steps
    sampler = TrainingSampler(
        len(train_set),
        config.per_device_train_batch_size,
        start * accumulation,
        config.max_steps * accumulation,
        config.seed,
        accelerator.process_index,
        accelerator.num_processes,
    )
    pin_memory = accelerator.device.type == "cuda"
    loader = training_loader(train_set, sampler, config.dataloader_num_workers, pin_memory)
    if start == 0 and config.codebook.kmeans_init_batches:
        trainer.initialise_codebook(islice(loader, config.codebook.kmeans_init_batches))

    reporter = Reporter(accelerator, config.output_dir, start, config.max_steps)
    images_per_step = config.per_device_train_batch_size * accelerator.num_processes * accumulation
    collected: dict[str, list[Tensor]] = defaultdict(list)
    clock = time.perf_counter()
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    for number, batch in enumerate(loader, start * accumulation):
        step = number // accumulation
        torch.manual_seed(key(config.seed, number, accelerator.process_index))  # dropout: keyed, so resuming is exact
        learning_rate = trainer.set_learning_rate(step)
        images = normalize(batch.to(accelerator.device, non_blocking=True)).contiguous(memory_format=memory_format)
        for name, value in trainer.step(images, step).items():
            collected[name].append(value)
        if (number + 1) % accumulation:
            continue

        step += 1
        reporter.bar.update()
        if step % config.logging_steps == 0 or step == config.max_steps:
            averages = {name: torch.stack(values).float().mean() for name, values in sorted(collected.items())}
            scalars = {name: accelerator.reduce(value, "mean").item() for name, value in averages.items()}
            scalars |= {name: value.item() for name, value in trainer.statistics().items()}
            reporter.show({name: scalars[f"loss/{name}"] for name in SHOWN_TERMS if f"loss/{name}" in scalars})
            seconds = time.perf_counter() - clock
            done = len(collected["loss/codebook"]) // accumulation
            scalars |= {"learning_rate": learning_rate, "images_per_second": done * images_per_step / seconds}
            reporter.scalars(scalars, step)
            collected.clear()
            clock = time.perf_counter()
        if step % config.eval_steps == 0 or step == config.max_steps:
            metrics = evaluate(config, accelerator, trainer, validation_set, reporter, step)
            clock = time.perf_counter()
        if step % config.save_steps == 0 or step == config.max_steps:
            checkpointing.save(accelerator, config.output_dir, step, config.save_total_limit)
            clock = time.perf_counter()

    if start == config.max_steps:
        metrics = evaluate(config, accelerator, trainer, validation_set, reporter, start)
    reporter.close()
    model = finish(config, accelerator, trainer)
    if accelerator.is_main_process:
        results = {"global_step": config.max_steps, "train_runtime": round(time.perf_counter() - started, 1), **metrics}
        finish_run(config, results)
    accelerator.wait_for_everyone()
    return model


SHOWN_TERMS = ("pixel", "perceptual", "codebook", "generator", "discriminator")


def evaluate(
    config: Stage1Config,
    accelerator: Accelerator,
    trainer: VQGANTrainer,
    dataset: ImageDataset,
    reporter: Reporter,
    step: int,
) -> dict[str, float]:
    """Reconstruction metrics over the validation split, each image once, and a grid of some."""
    keys = [(0, index, 0) for index in range(accelerator.process_index, len(dataset), accelerator.num_processes)]
    loader = keyed_loader(dataset, keys, config.per_device_eval_batch_size, config.dataloader_num_workers)
    model = trainer.average
    metrics = evaluate_reconstruction(model, loader, lambda total: accelerator.reduce(total, "sum"))
    reporter.scalars({f"eval/{name}": value for name, value in metrics.items()}, step)
    if accelerator.is_main_process:
        shown = range(0, len(dataset), max(1, len(dataset) // config.num_sample_images))[: config.num_sample_images]
        originals = normalize(torch.stack(dataset.__getitems__([(0, index, 0) for index in shown])))
        with torch.no_grad():
            pair = torch.cat([originals, model(originals.to(model.device)).reconstruction.cpu()])
        processor = VQGANImageProcessor(dataset.image_size, dataset.num_channels)
        reporter.image("reconstructions", image_grid(processor.postprocess(pair), len(shown), min_tile=64), step)
    return metrics


def finish(config: Stage1Config, accelerator: Accelerator, trainer: VQGANTrainer) -> VQGANModel:
    """Saves the averaged weights with their fingerprint in the run's folder, and uploads them if asked to."""
    model = copy.deepcopy(trainer.average).cpu().eval()
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-arg]
    if accelerator.is_main_process:
        processor = VQGANImageProcessor(model.config.image_size, model.config.in_channels)
        model.save_pretrained(config.output_dir)
        processor.save_pretrained(config.output_dir)
        if config.push_to_hub:
            for part in (model, processor):
                part.push_to_hub(str(config.hub_model_id), private=config.hub_private_repo)
        print(f"tokenizer saved in {Path(config.output_dir).resolve()} (fingerprint {model.config.fingerprint})")
    return model


def rows(latents: Tensor | None) -> Tensor:
    """Latents `(B, D, h, w)` as `(B·h·w, D)`."""
    return rearrange(cast(Tensor, latents), "B D h w -> (B h w) D")


def schedule(config: Stage1Config, step: int) -> float:
    """Learning rate of a step as a fraction of its peak: linear warm-up, then constant, linear or cosine to zero."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    if config.lr_scheduler_type == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if config.lr_scheduler_type == "linear" else 1.0


def key(*numbers: int) -> int:
    """One 63-bit seed from several numbers."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return mixed
