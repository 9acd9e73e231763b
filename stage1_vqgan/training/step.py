"""The training step of stage 1: one update of the tokenizer, then one update of the discriminator.

Source: Esser et al. 2021, "Taming transformers for high-resolution image synthesis", section 3.1.

Symbols: x images, x̂ reconstructions, D discriminator, λ adaptive weight.
Shape letters: B batch, C channels, H W image size.
"""

import copy
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from configs.randomness import seed_from
from stage1_vqgan.modeling_vqgan import VQGANModel
from stage1_vqgan.training.codebook import Candidates, CodebookMonitor
from stage1_vqgan.training.components import (
    augmentation,
    build_tokenizer,
    memory_format,
    prepare_discriminator,
    prepare_generator,
)
from stage1_vqgan.training.config import Stage1Config
from stage1_vqgan.training.discriminator_terms import DiscriminatorTerms
from stage1_vqgan.training.generator_terms import GeneratorTerms
from stage1_vqgan.training.losses import weighted_sum
from stage1_vqgan.training.network_terms import build_alignment
from stage1_vqgan.training.perturbation import LatentPerturbation


class VQGANTrainer:
    """The models, losses and optimizers of a run, and the training step that updates them.

    Args:
        config: the settings of the run.
        accelerator: determines devices, processes, precision and gradient accumulation.

    Attributes:
        generator, optimizer: the tokenizer as accelerate wraps it, and its optimizer.
        alignment: compares latents with features; its projection has the generator's optimizer. None at weight 0.
        average: moving average of the tokenizer's weights; it is evaluated and saved.
        discriminator, discriminator_optimizer: None if the run has no discriminator.
        generator_terms, discriminator_terms: compute the losses of both.
        perturbation: gives the decoder some wrong codes, if `perturbation.image_share` is above 0.
        monitor: counts how often each code is used.
        candidates: for each codebook what it quantized in this step; unused entries may move onto it.
    """

    def __init__(self, config: Stage1Config, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        torch.manual_seed(config.seed)
        torch.backends.cudnn.benchmark = True  # pays off, because all steps have the same shapes
        model = build_tokenizer(config)
        model.to(memory_format=memory_format(config, accelerator.device))  # type: ignore[call-arg]
        self.average = copy.deepcopy(model).to(accelerator.device).eval().requires_grad_(False)
        alignment = build_alignment(config, model.config)
        self.generator, self.alignment, self.optimizer = prepare_generator(model, alignment, config, accelerator)
        self.generator_terms = GeneratorTerms(config, model, accelerator)
        self.discriminator, self.discriminator_optimizer = prepare_discriminator(model.config, config, accelerator)
        self.discriminator_terms = DiscriminatorTerms(config.loss, accelerator, augmentation(config))
        self.perturbation = LatentPerturbation(config.perturbation)
        if config.perturbation.image_share:
            model.quantize.register_forward_hook(self.perturbation)
        num_codes, codebooks = model.config.num_embeddings, model.quantize.codebooks
        self.monitor = CodebookMonitor(num_codes, accelerator.device, max(1, len(codebooks)))
        self.candidates = [Candidates(num_codes) for _ in codebooks]

    @property
    def model(self) -> VQGANModel:
        """The tokenizer in training, without accelerate's wrapper."""
        return self.accelerator.unwrap_model(self.generator)

    @property
    def codebook_is_trained(self) -> bool:
        """Whether the quantizer has codebook entries that k-means may initialise and that may be restarted."""
        return bool(self.model.quantize.codebooks) and not self.config.codes_are_frozen

    def step(self, images: Tensor, micro_step: int) -> dict[str, Tensor]:
        """One forward of the generator, then one update of the generator and one of the discriminator.

        With gradient accumulation the weights change in the last micro step of each optimizer step only.

        Args:
            images: float32 `(B, C, H, W)` in [-1, 1].
            micro_step: number of batches that this process has processed before.

        Returns:
            Scalars on the device, by the names under which they are logged.
        """
        config, step = self.config, micro_step // self.config.gradient_accumulation_steps
        quantizer = self.model.quantize
        weights, seeds = config.loss.weights(step), self.image_seeds(micro_step, len(images))
        metrics: dict[str, Tensor] = {}
        models = (self.generator, self.alignment, self.discriminator)
        with self.accelerator.accumulate(*(model for model in models if model is not None)):
            # Generator forward. The graph is cut at x̂: the losses of x̂ are differentiated with respect to x̂ first,
            # and their weighted sum enters the generator in a single backward pass.
            quantizer.prepare(step / config.max_steps, seeds)
            self.perturbation.prepare(seeds)
            with self.accelerator.autocast():
                out = self.generator(images)
            reconstruction = out.reconstruction.detach().float().requires_grad_()

            # Reconstruction terms.
            terms = self.generator_terms.reconstruction(reconstruction, images, weights)
            (gradient,) = torch.autograd.grad(weighted_sum(terms, weights), reconstruction)

            # Adversarial term, with the adaptive weight λ.
            if self.discriminator is not None and weights["adversarial"]:
                terms["adversarial"], of_adversarial = self.generator_terms.adversarial(
                    self.discriminator, reconstruction, seeds
                )
                adaptive, metrics = self.generator_terms.adaptive_weight(out.decoder_features, gradient, of_adversarial)
                gradient = gradient + adaptive * weights["adversarial"] * of_adversarial

            # Generator update. The terms of the latents have graphs of their own.
            of_latents = {"codebook": out.codebook_loss}
            if self.alignment is not None and weights["alignment"]:
                of_latents["alignment"] = self.alignment(out.quantized, images)
            objective = (out.reconstruction * gradient.to(out.reconstruction.dtype)).sum()
            objective = objective + weighted_sum(of_latents, weights)
            metrics |= self._update(self.generator, self.optimizer, objective, step)

            # Discriminator update, on the same reconstructions.
            if self.discriminator is not None and step >= config.loss.discriminator_start_step:
                of_discriminator, penalties, logits = self.discriminator_terms(
                    self.discriminator, images, reconstruction.detach(), weights, seeds
                )
                objective = of_discriminator + weighted_sum(penalties, weights)
                metrics |= self._update(self.discriminator, self.discriminator_optimizer, objective, step) | logits
                terms |= {"discriminator": of_discriminator, **penalties}

            # Codebook upkeep and moving averages.
            self.monitor.update(quantizer.entry_numbers(out.codes, out.latents.shape[2:]))
            if not config.codes_are_frozen:
                quantizer.observe(out.latents, out.codes)
            restarts = self._restarts_codes_after(step + 1)
            if restarts:
                for candidates, rows in zip(self.candidates, quantizer.inputs(out.latents), strict=True):
                    candidates.add(self.accelerator.gather(rows), seed_from(self.config.seed, micro_step))
            if self.accelerator.sync_gradients:
                self.discriminator_terms.update_anchors()
                quantizer.update(self._sum)
                self._update_average(step)
                if restarts:
                    metrics |= self._restart_dead_codes()
        metrics |= {f"loss/{name}": term for name, term in (terms | of_latents).items()}
        return {name: value.detach() for name, value in metrics.items()}

    def _update(self, model: nn.Module, optimizer: Any, objective: Tensor, step: int) -> dict[str, Tensor]:
        """Backward, and in the last micro step: clip the gradients and step the optimizer. Returns the norm to log."""
        self.accelerator.backward(objective)
        norm = self._clipped_norm(model, optimizer, step) if self.accelerator.sync_gradients else {}
        optimizer.step()  # accelerate's wrapper does nothing before the last micro step
        optimizer.zero_grad()
        return norm

    def _clipped_norm(self, model: nn.Module, optimizer: Any, step: int) -> dict[str, Tensor]:
        """Clips the gradients; returns their norm before. Without clipping, the norm of a step that is logged."""
        config, name = self.config, "generator" if model is self.generator else "discriminator"
        most = config.max_grad_norm if model is self.generator else config.of_discriminator("max_grad_norm")
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if most:
            norm = self.accelerator.clip_grad_norm_(trained, most)
        elif (step + 1) % config.logging_steps and step + 1 < config.max_steps:
            return {}
        else:
            norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        return {f"grad_norm/{name}": cast(Tensor, norm)}

    @torch.no_grad()
    def _update_average(self, step: int) -> None:
        """average ← decay · average + (1 - decay) · weights; buffers are copied."""
        update = get_ema_multi_avg_fn(self.config.average_decay(step))
        update(list(self.average.parameters()), list(self.model.parameters()), step)
        for average, buffer in zip(self.average.buffers(), self.model.buffers(), strict=True):
            average.copy_(buffer)

    def _restarts_codes_after(self, step: int) -> bool:
        """Whether unused codes are moved after this number of steps: every `restart_interval` steps.

        Not after the last step, because the decoder would never train on moved codes.
        """
        interval = self.config.codebook.restart_interval
        return bool(self.codebook_is_trained and interval and step % interval == 0 and step < self.config.max_steps)

    def _restart_dead_codes(self) -> dict[str, Tensor]:
        """Moves unused codes onto latents of this step."""
        restarted = self.monitor.restart(
            self.model.quantize,
            self.average.quantize,
            self.optimizer.optimizer,
            [candidates.rows() for candidates in self.candidates],
            self._sum,
        )
        return {"codebook/restarted": restarted}

    def image_seeds(self, micro_step: int, count: int) -> list[int]:
        """A seed for each image of this process's batch, which does not depend on the number of processes."""
        first = self.accelerator.process_index * count
        return [seed_from(self.config.seed, micro_step, first + index) for index in range(count)]

    def set_learning_rate(self, step: int) -> float:
        """Sets the learning rates of both optimizers for a step, and returns the generator's."""
        config, factor = self.config, self.config.learning_rate_factor(step)
        learning_rates = [(self.optimizer, config.learning_rate)]
        if self.discriminator is not None:
            learning_rates.append((self.discriminator_optimizer, config.of_discriminator("learning_rate")))
        for optimizer, learning_rate in learning_rates:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * factor
        return config.learning_rate * factor

    def codebook_statistics(self) -> dict[str, float]:
        """Usage and perplexity of the codebook since the last call, over all processes."""
        return {name: value.item() for name, value in self.monitor.statistics(self._sum).items()}

    def _sum(self, value: Tensor) -> Tensor:
        """Sum over processes."""
        return self.accelerator.reduce(value.clone(), "sum")
