"""Checks of a run of stage 1: it ends when a number is not finite, and warns when codebook or discriminator fail."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from configs.run_folder import RunFolder
from stage1_vqgan.training.losses import MAX_ADAPTIVE_WEIGHT, AdversarialType

# A codebook has collapsed if less than this fraction of its entries is used, although the number of codes would suffice
# to use every entry this many times.
COLLAPSED_USAGE = 0.05
USES_PER_ENTRY = 10
# A discriminator has won if its loss stays below this fraction of an undecided discriminator's loss for this many logs.
# If all logits are 0, the hinge loss is 1 and the logistic losses are log 2. The Wasserstein loss is a distance without
# such a scale, and its gradient does not vanish.
WON_SHARE = 0.05
WON_LOGS = 3
GUESSING_LOSS: dict[AdversarialType, float] = {"hinge": 1.0, "vanilla": math.log(2), "non_saturating": math.log(2)}

logger = logging.getLogger(__name__)

Steps = Sequence[tuple[int, Tensor]]


class Health:
    """Checks the numbers of a run. All processes come to the same conclusion.

    Args:
        run: the folder of the run.
        accelerator: gathers the numbers of all processes.
        adversarial_type: determines the loss of an undecided discriminator.
    """

    def __init__(self, run: RunFolder, accelerator: Accelerator, adversarial_type: AdversarialType):
        self.run, self.accelerator = run, accelerator
        self._won_loss = WON_SHARE * GUESSING_LOSS.get(adversarial_type, -math.inf)
        self._warned: set[str] = set()
        self._won_logs = 0

    def require_finite_losses(self, collected: Mapping[str, Steps]) -> None:
        """Ends the run if a loss since the last log is not finite. All processes must call this.

        Args:
            collected: by name, `(step, scalar)` of every micro step.

        Raises:
            Diverged: the message names the first such loss and its step, over all processes.
        """
        names = sorted(name for name in collected if name.startswith("loss/"))
        if not names:
            return
        never = torch.iinfo(torch.int64).max
        first = [_first_step(collected[name], never) for name in names]
        everywhere = self.accelerator.gather(torch.stack(first)[None]).amin(0).tolist()  # type: ignore[union-attr]
        step, name = min(zip(everywhere, names, strict=True))
        if step < never:
            raise self.run.diverged(f"{name} was not finite at step {step + 1}")

    def require_finite_state(self, named: Iterable[tuple[str, Iterable[Tensor]]], step: int) -> None:
        """Ends the run if a tensor of the next checkpoint is not finite.

        Args:
            named: tensors, by the name of their owner.
            step: optimizer steps done.

        Raises:
            Diverged: the message names the owner of the tensor.
        """
        for name, tensors in named:
            finite = torch.stack([tensor.isfinite().all() for tensor in tensors if tensor.is_floating_point()]).all()
            if not finite:
                raise self.run.diverged(f"{name}: not all numbers are finite after step {step}")

    def warn_of_problems(
        self, scalars: Mapping[str, float], collected: Mapping[str, Steps], num_codes_used: int, num_embeddings: int
    ) -> None:
        """Warns, once each, of a collapsed codebook, a discriminator that has won, an adaptive weight at its clamp.

        Args:
            scalars: means since the last log.
            collected: by name, `(step, scalar)` of every micro step since then.
            num_codes_used: codes of all images since then, repetitions included.
            num_embeddings: K.
        """
        usage = scalars["codebook/usage"]
        if usage < COLLAPSED_USAGE and num_codes_used >= USES_PER_ENTRY * num_embeddings:
            self._warn_once(
                "codebook",
                f"the codebook has collapsed: {usage:.1%} of {num_embeddings} codes are used. Try a lower "
                "learning_rate, a smaller model.embed_dim with model.quantizer_options.l2_normalize true, "
                "codebook.kmeans_init_batches and codebook.restart_interval above 0",
            )
        is_adversarial = "loss/adversarial" in scalars
        has_won = is_adversarial and scalars.get("loss/discriminator", math.inf) < self._won_loss
        self._won_logs = self._won_logs + 1 if has_won else 0
        if self._won_logs >= WON_LOGS:
            self._warn_once(
                "discriminator",
                f"the discriminator has won: its loss is {scalars['loss/discriminator']:.2g}, so the generator gets "
                "almost no gradient from it. Try a lower discriminator.learning_rate, fewer discriminator.num_layers, "
                "augmentation, loss.lecam_weight or loss.r1_weight above 0, or a later loss.adversarial_start_step",
            )
        weights = [value for _, value in collected.get("adversarial/adaptive_weight", ())]
        if weights and (torch.stack(weights) >= MAX_ADAPTIVE_WEIGHT).float().mean() >= 0.5:
            self._warn_once(
                "adaptive weight",
                f"the adaptive weight is at its clamp of {MAX_ADAPTIVE_WEIGHT:g}: the generator gets almost no "
                "gradient from the discriminator. Try a later loss.adversarial_start_step, or a lower "
                "discriminator.learning_rate",
            )

    def _warn_once(self, subject: str, message: str) -> None:
        if subject not in self._warned and self.accelerator.is_main_process:
            logger.warning("%s", message)
        self._warned.add(subject)


def _first_step(steps: Steps, never: int) -> Tensor:
    """The first step whose scalar is not finite, or `never`."""
    values = torch.stack([value.detach().float() for _, value in steps])
    numbers = torch.tensor([step for step, _ in steps], device=values.device)
    return torch.where(values.isfinite(), torch.full_like(numbers, never), numbers).amin()
