"""The generator's objective, as far as it is a function of the reconstructions, and its gradient at them.

Symbols: x images, x̂ reconstructions, D discriminator, λ adaptive weight.
Shape letters: B batch, C channels, H W image size.
"""

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from stage1_vqgan.modeling_vqgan import VQGANModel
from stage1_vqgan.training.components import augmentation, build_reconstruction_losses
from stage1_vqgan.training.config import Stage1Config
from stage1_vqgan.training.losses import GENERATOR_LOSSES, adaptive_weight, last_layer_gradients


class GeneratorTerms:
    """The terms of the generator that compare x̂ with x, and the adversarial term.

    Args:
        config: the settings of the run.
        model: the tokenizer.
        accelerator: determines device, precision and processes.

    Attributes:
        losses: the losses of x̂ and x of weight above 0, by the name of their term.
    """

    def __init__(self, config: Stage1Config, model: VQGANModel, accelerator: Accelerator):
        loss = config.loss
        self.accelerator, self.last_layer, self.is_adaptive = accelerator, model.decoder.conv_out, loss.adaptive_weight
        self.losses = build_reconstruction_losses(config, model.config, accelerator)
        self.augment = augmentation(config)
        self.adversarial_loss = GENERATOR_LOSSES[loss.generator_type or loss.adversarial_type]

    def reconstruction(self, reconstruction: Tensor, images: Tensor, weights: Mapping[str, float]) -> dict[str, Tensor]:
        """The terms that compare x̂ with x, scalars by name; a term of weight 0 is not computed."""
        with self.accelerator.autocast():
            return {name: loss(reconstruction, images) for name, loss in self.losses.items() if weights[name]}

    def adversarial(
        self, discriminator: nn.Module, reconstruction: Tensor, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """The adversarial term L_adv(D(x̂)), and its gradient ∂L_adv/∂x̂; `seeds` of the augmentation of x̂.

        The parameters of the discriminator get no gradient: a compiled discriminator would compute all of them.
        """
        discriminator = self.accelerator.unwrap_model(discriminator)
        trained = [parameter for parameter in discriminator.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        adversarial = self.adversarial_loss(discriminator(self.augment(reconstruction, seeds, 2)).float())
        for parameter in trained:
            parameter.requires_grad_(True)
        return adversarial.detach(), torch.autograd.grad(adversarial, reconstruction)[0]

    def adaptive_weight(
        self, features: Tensor, of_reconstruction: Tensor, of_adversarial: Tensor
    ) -> tuple[Tensor | float, dict[str, Tensor]]:
        """λ and the norms to log; 1 and nothing if the weight is constant.

        The gradients of the last layer are averaged over processes first.

        Args:
            features: input of the decoder's last layer.
            of_reconstruction, of_adversarial: ∂L/∂x̂ of both sides, `(B, C, H, W)`.
        """
        if not self.is_adaptive:
            return 1.0, {}
        pair = last_layer_gradients(features, self.last_layer, (of_reconstruction, of_adversarial))
        at_reconstruction, at_adversarial = self.accelerator.reduce(pair, "mean")
        weight = adaptive_weight(at_reconstruction, at_adversarial)
        return weight, {
            "adversarial/adaptive_weight": weight,
            "adversarial/reconstruction_grad_norm": at_reconstruction.norm(),
            "adversarial/adversarial_grad_norm": at_adversarial.norm(),
        }
