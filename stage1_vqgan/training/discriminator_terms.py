"""The discriminator's objective: its adversarial loss, and the penalties that restrain it.

Symbols: x images, x̂ reconstructions, D discriminator.
Shape letters: B batch, C channels, H W image size.
"""

from collections.abc import Mapping, Sequence

from accelerate import Accelerator
from torch import Tensor, nn

from stage1_vqgan.networks.diffaug import Augmentation, unchanged
from stage1_vqgan.training.loss_config import LossConfig
from stage1_vqgan.training.losses import DISCRIMINATOR_LOSSES
from stage1_vqgan.training.regularizers import LecamAnchors, gradient_penalty, interpolation_shares, r1_penalty


class DiscriminatorTerms:
    """The terms of the discriminator.

    Args:
        loss: the settings of the losses.
        accelerator: averages over processes.
        augment: changes the images that D sees, see `stage1_vqgan.networks.diffaug.augment`.

    Attributes:
        anchors: moving averages of the discriminator's logits, for LeCam's penalty.
    """

    def __init__(self, loss: LossConfig, accelerator: Accelerator, augment: Augmentation = unchanged):
        self.accelerator, self.observes, self.augment = accelerator, loss.lecam_weight > 0, augment
        self.adversarial_loss = DISCRIMINATOR_LOSSES[loss.adversarial_type]
        self.anchors = LecamAnchors(accelerator.device)

    def __call__(
        self, discriminator: nn.Module, real: Tensor, fake: Tensor, weights: Mapping[str, float], seeds: Sequence[int]
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """The adversarial loss, the penalties of weight above 0 by name, and the mean logits to log; scalars.

        Args:
            discriminator: D.
            real, fake: x and x̂, float32 `(B, C, H, W)`, without a graph.
            weights: of the penalties, by name.
            seeds: a seed for each image.
        """
        real = real.detach().requires_grad_(weights["r1"] > 0)
        seen_real, seen_fake = self.augment(real, seeds, 0), self.augment(fake, seeds, 1)
        logits_real, logits_fake = discriminator(seen_real).float(), discriminator(seen_fake).float()
        penalties = {}
        if weights["gradient_penalty"]:
            shares = interpolation_shares(seeds, real.device)
            penalties["gradient_penalty"] = gradient_penalty(discriminator, seen_real.detach(), seen_fake, shares)
        if weights["r1"]:
            penalties["r1"] = r1_penalty(logits_real, real)
        if weights["lecam"]:
            penalties["lecam"] = self.anchors.penalty(logits_real, logits_fake)
        if self.observes:
            self.anchors.observe(logits_real, logits_fake)
        logits = {"logits/real": logits_real.mean(), "logits/fake": logits_fake.mean()}
        return self.adversarial_loss(logits_real, logits_fake), penalties, logits

    def update_anchors(self) -> None:
        """Updates LeCam's moving averages by the micro-batches of an optimizer step."""
        self.anchors.update(lambda means: self.accelerator.reduce(means, "mean"))
