"""Guidance: joins the logits with and without the conditions to those that a code is drawn from.

Shape letters: G groups of conditions, B images, n rows of logits under each prompt, T steps, K codebook size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from stage2_prior.sampling.options import SamplingOptions


class Guidance:
    """Guidance in each step of a batch.

    An image gets the same logits as alone with its own scales: without guidance if these are 1.0, and the formula of
    one group if only one of its groups acts. All formulas are equal, but they round differently.

    Args:
        options: the scales, and their growth over the steps.
        num_steps: T.
        device: that of the logits.

    Attributes:
        steps: the steps that need logits without the conditions.
    """

    def __init__(self, options: SamplingOptions, num_steps: int, device: torch.device):
        self.steps = options.guided_positions(num_steps)
        self._acting, self._tables = options.acting, []
        scales = torch.from_numpy(options.scales(num_steps))
        self._scales: list[list[float]] = scales[:, :, 0].tolist()
        if scales.shape[2] > 1:
            acting = torch.from_numpy(options.table != 1)
            alone = (acting & (acting.sum(0) == 1)) & (scales != 1)
            self._tables = [table[..., None].to(device) for table in (scales.float(), (scales - 1).float(), alone)]

    def __call__(self, logits: Tensor, step: int, images: Tensor | slice = slice(None)) -> Tensor:
        """The logits of a step, `(n, K)`.

        Args:
            logits: `((1 + G)·n, K)`: with all conditions, then without those of each group.
            step: one of `steps`.
            images: the image of each of the n rows, int64 `(n,)`; by default they are the B images.
        """
        conditional, *without = logits.chunk(1 + len(self._acting))
        if not self._tables:
            groups = zip(self._scales[step], without, self._acting, strict=True)
            return _guided(conditional, [(scale, u) for scale, u, acts in groups if acts])
        scales, excess, alone = (table[step][:, images] for table in self._tables)
        guided = conditional + sum(more * (conditional - u) for more, u in zip(excess, without, strict=True))
        for scale, is_alone, u in zip(scales, alone, without, strict=True):
            guided = torch.where(is_alone, u + scale * (conditional - u), guided)
        return guided


def _guided(conditional: Tensor, groups: Sequence[tuple[float, Tensor]]) -> Tensor:
    """c + Σ (s_g - 1)·(c - u_g) with the scales and logits (s_g, u_g) of groups; for one group u + s·(c - u)."""
    if len(groups) == 1:
        ((scale, u),) = groups
        return u + scale * (conditional - u)
    return conditional + sum((scale - 1) * (conditional - u) for scale, u in groups)
