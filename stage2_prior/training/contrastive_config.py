"""The settings of condition contrastive alignment, and what cannot go with it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from configs import Section
from configs.sections import NonNegativeFloat


@dataclass(kw_only=True)
class ContrastiveConfig(Section):
    """Condition contrastive alignment (CCA): fine-tunes a causal prior to sample without guidance as if with it.

    beta: weight of the change of an image's log-likelihood; a smaller one changes the prior more; 0 turns CCA off
    negative_weight: weight of images with the conditions of other images (lambda of the paper); the number of classes
        is a good start
    """

    beta: NonNegativeFloat = 0.0
    negative_weight: NonNegativeFloat = 0.0

    def problems(self) -> Iterable[tuple[str, Any, str]]:
        if bool(self.beta) != bool(self.negative_weight):
            yield "negative_weight", self.negative_weight, "with beta above 0 it must be above 0, else 0"


def contrastive_problems(config: Any) -> Iterable[tuple[str, Any, str]]:
    """Settings of a Stage2Config that cannot go with `cca`, in the form of `Section.problems`."""
    if not config.cca.beta:
        return
    if config.prior != "causal":
        yield "prior", config.prior, "cca.beta needs the likelihood of an image, which only a causal prior has"
    if config.model_name_or_path is None:
        yield "cca.beta", config.cca.beta, "needs model_name_or_path, the trained prior to fine-tune"
    if not config.data.use_labels and not config.conditions:
        yield "data.use_labels", False, "cca.beta compares conditions, and there are none"
    dropouts = {"condition_dropout": config.condition_dropout}
    dropouts |= {f"conditions.{name}.dropout": dropout for name, dropout in config.segment_dropout.items()}
    for key, dropout in dropouts.items():
        if dropout:
            yield key, dropout, "cca.beta needs the conditions of every image; set it to 0"
    if config.keep_best:
        yield "keep_best", True, "cca.beta does not lower the validation loss; set it to false"
    if config.early_stopping_patience:
        yield "early_stopping_patience", config.early_stopping_patience, "cca.beta does not lower the loss; set it to 0"
    if smoothing := config.training_arguments.get("label_smoothing_factor"):
        yield (
            "training_arguments.label_smoothing_factor",
            smoothing,
            "has no part in the loss of cca.beta; leave it out",
        )
