"""Binary spherical quantization ("bsq"): a code is the signs of a latent's channels, on the unit sphere."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .quantizer_base import entropy, mean_over_processes, unit_length
from .quantizer_lfq import LFQuantizer, LFQuantizerOptions


@dataclass(frozen=True, kw_only=True)
class BSQuantizerOptions(LFQuantizerOptions):
    """Options of [`BSQuantizer`]; they mean the same as those of [`LFQuantizerOptions`].

    The squared distance of a latent from its code is at most 2, so no commitment term is needed.
    """

    commitment_cost: float | int = 0.0
    entropy_temperature: float | int = 1.0


class BSQuantizer(LFQuantizer):
    """Projects a latent onto the unit sphere, and maps every channel to -1/√D or 1/√D; these bits form the code.

    The entropy term treats the bits as independent, also in the mean distribution over codes. So it needs memory for
    D numbers instead of 2^D.

    Source: Zhao et al. 2024, "Image and video tokenization with binary spherical quantization", section 4.
    """

    Options = BSQuantizerOptions

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u = unit_length(z)
        codes = self.codes_of(u)
        corners = self.entries(codes)
        loss = self.options.commitment_cost * (u - corners).square().sum(1).mean()
        if self.options.entropy_weight and self.training:
            loss = loss + self.options.entropy_weight * self.entropy_loss(u)
        # straight-through on the signs, so the gradient is multiplied by 1/√D like the signs
        return corners + (u - u.detach()) / self.embed_dim**0.5, codes, loss

    def entries(self, codes: Tensor) -> Tensor:
        return super().entries(codes) / self.embed_dim**0.5

    def entropy_loss(self, z: Tensor) -> Tensor:
        """Mean over latents of the entropy of their softmax over codes, minus the weighted sum of the entropies of each
        bit's mean distribution in the batch of all processes; a scalar.
        """
        # ‖u + c‖² - ‖u - c‖² = 4uc for a channel u and c = 1/√D
        on = torch.sigmoid(4 * z / (self.embed_dim**0.5 * self.options.entropy_temperature))
        bits = torch.stack([1 - on, on], -1)
        mean_entropy = entropy(bits).sum(1).mean()
        return mean_entropy - self.options.diversity_weight * entropy(mean_over_processes(bits.mean(0))).sum()
