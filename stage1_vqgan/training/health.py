"""Watching a run of stage 1: numbers that went wrong end it, a game that went wrong is told once."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from configs.interruption import Diverged
from stage1_vqgan.training.losses import MAX_ADAPTIVE_WEIGHT, AdversarialType

# A codebook of which less than this share is used, while every code could have been used so many times, has collapsed.
COLLAPSED_USAGE = 0.05
CHANCES_PER_CODE = 10
# A discriminator has won whose loss stays, for so many logs, below this share of what guessing costs: 1 with hinge,
# log 2 with the logistic losses. Wasserstein's has no such scale: it is a distance, and its gradient does not fade.
WON_SHARE = 0.05
WON_LOGS = 3
GUESSING_LOSS: dict[AdversarialType, float] = {"hinge": 1.0, "vanilla": math.log(2), "non_saturating": math.log(2)}

logger = logging.getLogger(__name__)

Steps = Sequence[tuple[int, Tensor]]


class Health:
    """Checks the numbers of a run, the same on every process.

    Args:
        accelerator: for what other processes saw.
        adversarial_type: of the run, which decides what a discriminator's loss tells.
    """

    def __init__(self, accelerator: Accelerator, adversarial_type: AdversarialType):
        self.accelerator = accelerator
        self._won_loss = WON_SHARE * GUESSING_LOSS.get(adversarial_type, -math.inf)
        self.last_checkpoint: str | None = None
        self._told: set[str] = set()
        self._won_logs = 0

    def require_finite_losses(self, collected: Mapping[str, Steps]) -> None:
        """Ends the run if a loss since the last log was not finite; all processes must call this.

        Args:
            collected: by name, `(step, scalar)` of every forward.

        Raises:
            Diverged: naming the first such term and step of any process.
        """
        names = sorted(name for name in collected if name.startswith("loss/"))
        if not names:
            return
        never = torch.iinfo(torch.int64).max
        first = [_first_step(collected[name], never) for name in names]
        everywhere = self.accelerator.gather(torch.stack(first)[None]).amin(0).tolist()  # type: ignore[union-attr]
        step, name = min(zip(everywhere, names, strict=True))
        if step < never:
            raise Diverged(f"{name} was not finite at step {step + 1}; {self._advice()}")

    def require_finite_state(self, named: Iterable[tuple[str, Iterable[Tensor]]], step: int) -> None:
        """Ends the run if any tensor that is about to be saved holds a number that is not finite.

        Args:
            named: tensors by what they belong to.
            step: steps done.

        Raises:
            Diverged: naming what they belong to.
        """
        for name, tensors in named:
            finite = torch.stack([tensor.isfinite().all() for tensor in tensors if tensor.is_floating_point()]).all()
            if not finite:
                raise Diverged(f"{name}: not all numbers are finite after step {step}; {self._advice()}")

    def look(
        self, scalars: Mapping[str, float], collected: Mapping[str, Steps], codes_seen: int, num_codes: int
    ) -> None:
        """Warns once of a collapsed codebook, a discriminator that has won, an adaptive weight at its clamp.

        Args:
            scalars: means since the last log.
            collected: by name, `(step, scalar)` of every forward since then.
            codes_seen: codes of all images since then.
            num_codes: K.
        """
        usage = scalars["codebook/usage"]
        if usage < COLLAPSED_USAGE and codes_seen >= CHANCES_PER_CODE * num_codes:
            self._tell(
                "codebook",
                f"the codebook has collapsed: {usage:.1%} of {num_codes} codes are used. Try a lower learning_rate, a "
                "smaller model.embed_dim with model.quantizer_options.l2_normalize true, codebook.kmeans_init_batches "
                "and codebook.restart_interval above 0",
            )
        playing = "loss/adversarial" in scalars
        won = playing and scalars.get("loss/discriminator", math.inf) < self._won_loss
        self._won_logs = self._won_logs + 1 if won else 0
        if self._won_logs >= WON_LOGS:
            self._tell(
                "discriminator",
                f"the discriminator has won: it tells every image (loss {scalars['loss/discriminator']:.2g}), and the "
                "generator learns nothing from it any more. Try a lower discriminator.learning_rate, fewer "
                "discriminator.num_layers, augmentation, loss.lecam_weight or loss.r1_weight above 0, or a later "
                "loss.adversarial_start_step",
            )
        weights = [value for _, value in collected.get("adversarial/adaptive_weight", ())]
        if weights and (torch.stack(weights) >= MAX_ADAPTIVE_WEIGHT).float().mean() >= 0.5:
            self._tell(
                "adaptive weight",
                f"the adaptive weight is at its clamp of {MAX_ADAPTIVE_WEIGHT:g}: the discriminator gives the "
                "generator next to no gradient. Try a later loss.adversarial_start_step, or a lower "
                "discriminator.learning_rate",
            )

    def _tell(self, subject: str, message: str) -> None:
        if subject not in self._told and self.accelerator.is_main_process:
            logger.warning("%s", message)
        self._told.add(subject)

    def _advice(self) -> str:
        saved = (
            f"the last good checkpoint is {self.last_checkpoint}"
            if self.last_checkpoint
            else "no checkpoint was saved yet"
        )
        return f"{saved}. Try a lower learning_rate, more warmup_steps, max_grad_norm 1, or bf16 false"


def _first_step(steps: Steps, never: int) -> Tensor:
    values = torch.stack([value.detach().float() for _, value in steps])
    numbers = torch.tensor([step for step, _ in steps], device=values.device)
    return torch.where(values.isfinite(), torch.full_like(numbers, never), numbers).amin()
