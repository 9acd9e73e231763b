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
    build_perceptual,
    build_tokenizer,
    memory_format,
    prepare_discriminator,
    prepare_generator,
)
from stage1_vqgan.training.config import Stage1Config
from stage1_vqgan.training.losses import (
    ADVERSARIAL_LOSSES,
    PIXEL_LOSSES,
    adaptive_weight,
    last_layer_gradients,
    weighted_sum,
)
from stage1_vqgan.training.regularizers import LecamAnchors, gradient_penalty, interpolation_shares, r1_penalty


class VQGANTrainer:
    """The models, losses and optimizers of a run, and the training step that updates them.

    Args:
        config: the settings of the run.
        accelerator: determines devices, processes, precision and gradient accumulation.

    Attributes:
        generator, optimizer: the tokenizer as accelerate wraps it, and its optimizer.
        average: moving average of the tokenizer's weights; it is evaluated and saved.
        discriminator, discriminator_optimizer: None if the run has no discriminator.
        perceptual: LPIPS; None if its weight is 0.
        monitor: counts how often each code is used.
        candidates: for each codebook what it quantized in this step; unused entries may move onto it.
        anchors: moving averages of the discriminator's logits, for LeCam's penalty.
    """

    def __init__(self, config: Stage1Config, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        torch.manual_seed(config.seed)
        torch.backends.cudnn.benchmark = True  # pays off, because all steps have the same shapes
        model = build_tokenizer(config)
        model.to(memory_format=memory_format(config))  # type: ignore[call-arg]
        self.average = copy.deepcopy(model).to(accelerator.device).eval().requires_grad_(False)
        self.generator, self.optimizer = prepare_generator(model, config, accelerator)
        channels = model.config.in_channels
        self.perceptual = build_perceptual(config, channels, accelerator)
        self.discriminator, self.discriminator_optimizer = prepare_discriminator(channels, config, accelerator)
        self.adversarial = ADVERSARIAL_LOSSES[config.loss.adversarial_type]
        num_codes, codebooks = model.config.num_embeddings, model.quantize.codebooks
        self.monitor = CodebookMonitor(num_codes, accelerator.device, max(1, len(codebooks)))
        self.candidates = [Candidates(num_codes) for _ in codebooks]
        self.anchors = LecamAnchors(accelerator.device)

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
        loss, step = self.config.loss, micro_step // self.config.gradient_accumulation_steps
        quantizer, seeds = self.model.quantize, self.image_seeds(micro_step, len(images))
        metrics: dict[str, Tensor] = {}
        accumulated = [model for model in (self.generator, self.discriminator) if model is not None]
        with self.accelerator.accumulate(*accumulated):
            # Generator forward. The graph is cut at x̂: the losses of x̂ are differentiated with respect to x̂ first,
            # and their weighted sum enters the generator in a single backward pass.
            quantizer.prepare(step / self.config.max_steps, seeds)
            with self.accelerator.autocast():
                out = self.generator(images)
            reconstruction = out.reconstruction.detach().float().requires_grad_()

            # Reconstruction terms.
            terms = self._reconstruction_terms(reconstruction, images)
            (gradient,) = torch.autograd.grad(weighted_sum(terms, loss), reconstruction)
            terms["codebook"] = out.codebook_loss

            # Adversarial term, with the adaptive weight λ.
            if self.discriminator is not None and step >= loss.adversarial_start_step:
                terms["adversarial"], adversarial_gradient = self._adversarial_term(reconstruction)
                weight, metrics = self._adversarial_weight(out.decoder_features, gradient, adversarial_gradient)
                gradient = gradient + weight * adversarial_gradient

            # Generator update.
            objective = (out.reconstruction * gradient.to(out.reconstruction.dtype)).sum()
            objective = objective + loss.codebook_weight * out.codebook_loss
            self._update(self.generator, self.optimizer, objective)

            # Discriminator update, on the same reconstructions.
            if self.discriminator is not None and step >= loss.discriminator_start_step:
                discriminator_loss, penalties, logits = self._discriminator_terms(
                    images, reconstruction.detach(), seeds
                )
                objective = discriminator_loss + weighted_sum(penalties, loss)
                self._update(self.discriminator, self.discriminator_optimizer, objective)
                terms |= {"discriminator": discriminator_loss, **penalties}
                metrics |= logits

            # Codebook upkeep and moving average.
            self.monitor.update(quantizer.entry_numbers(out.codes, out.latents.shape[2:]))
            if not self.config.codes_are_frozen:
                quantizer.observe(out.latents, out.codes)
            restarts = self._restarts_codes_after(step + 1)
            if restarts:
                for candidates, rows in zip(self.candidates, quantizer.inputs(out.latents), strict=True):
                    candidates.add(self.accelerator.gather(rows), seed_from(self.config.seed, micro_step))
            if self.accelerator.sync_gradients:
                quantizer.update(self._sum)
                self._update_average(step)
                if restarts:
                    metrics |= self._restart_dead_codes()
        metrics |= {f"loss/{name}": term for name, term in terms.items()}
        return {name: value.detach() for name, value in metrics.items()}

    def _reconstruction_terms(self, reconstruction: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Pixel losses and LPIPS, by name; a term of weight 0 is not computed."""
        weights = self.config.loss
        terms = {
            name: pixel_loss(reconstruction, images)
            for name, pixel_loss in PIXEL_LOSSES.items()
            if getattr(weights, f"{name}_weight")
        }
        if self.perceptual is not None:
            with self.accelerator.autocast():
                terms["perceptual"] = self.perceptual(reconstruction, images)
        return terms

    def _adversarial_term(self, reconstruction: Tensor) -> tuple[Tensor, Tensor]:
        """The generator's adversarial loss L_adv(D(x̂)), and its gradient ∂L_adv/∂x̂.

        The parameters of the discriminator get no gradient: a compiled discriminator would compute all of them.
        """
        discriminator = self.accelerator.unwrap_model(self.discriminator)
        discriminator.requires_grad_(False)
        adversarial = self.adversarial.generator(discriminator(reconstruction).float())
        discriminator.requires_grad_(True)
        return adversarial.detach(), torch.autograd.grad(adversarial, reconstruction)[0]

    def _adversarial_weight(
        self, features: Tensor, reconstruction_gradient: Tensor, adversarial_gradient: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """λ · `adversarial_weight`, and metrics. Gradients of the last layer are averaged over processes first.

        Args:
            features: input of the decoder's last layer.
            reconstruction_gradient, adversarial_gradient: ∂L/∂x̂ of both sides, `(B, C, H, W)`.
        """
        pair = last_layer_gradients(
            features, self.model.decoder.conv_out, (reconstruction_gradient, adversarial_gradient)
        )
        of_reconstruction, of_adversarial = self.accelerator.reduce(pair, "mean")
        adaptive = adaptive_weight(of_reconstruction, of_adversarial)
        weight = adaptive * self.config.loss.adversarial_weight
        norms = of_reconstruction.norm(), of_adversarial.norm()
        return weight, {
            "adversarial/adaptive_weight": adaptive,
            "adversarial/reconstruction_grad_norm": norms[0],
            "adversarial/adversarial_grad_norm": norms[1],
            "adversarial/relative_force": weight * norms[1] / norms[0],
        }

    def _discriminator_terms(
        self, real: Tensor, fake: Tensor, seeds: list[int]
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """The discriminator's loss, its penalties of weight above 0 by name, and the mean logits to log."""
        discriminator, weights = cast(nn.Module, self.discriminator), self.config.loss
        real = real.detach().requires_grad_(weights.r1_weight > 0)
        logits_real, logits_fake = discriminator(real).float(), discriminator(fake).float()
        penalties = {}
        if weights.gradient_penalty_weight:
            shares = interpolation_shares(seeds, real.device)
            penalties["gradient_penalty"] = gradient_penalty(discriminator, real.detach(), fake, shares)
        if weights.r1_weight:
            penalties["r1"] = r1_penalty(logits_real, real)
        if weights.lecam_weight:
            self.anchors.update(logits_real, logits_fake, lambda means: self.accelerator.reduce(means, "mean"))
            penalties["lecam"] = self.anchors.penalty(logits_real, logits_fake)
        logits = {"logits/real": logits_real.mean(), "logits/fake": logits_fake.mean()}
        return self.adversarial.discriminator(logits_real, logits_fake), penalties, logits

    def _update(self, model: nn.Module, optimizer: Any, objective: Tensor) -> None:
        """Backward, and in the last micro step: clip the gradients and step the optimizer."""
        self.accelerator.backward(objective)
        if self.accelerator.sync_gradients and self.config.max_grad_norm:
            self.accelerator.clip_grad_norm_(model.parameters(), self.config.max_grad_norm)
        optimizer.step()  # accelerate's wrapper does nothing before the last micro step
        optimizer.zero_grad()

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
            own = config.discriminator.learning_rate or config.learning_rate
            learning_rates.append((self.discriminator_optimizer, own))
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
