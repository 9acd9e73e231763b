"""Settings of the losses of stage 1: which terms the objective has, and the weight of each at every step."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal

from configs import Section, unknown_key
from configs.sections import NonNegative, NonNegativeFloat, PositiveFloat, Share, in_steps
from stage1_vqgan.networks.names import name_problems, weights_problems
from stage1_vqgan.training.schedules import Schedule, schedule_problems

Backbone = Literal["vgg", "alex", "squeeze"]
ShiftTolerant = Literal["stlpips_alex", "stlpips_vgg"]
AdversarialType = Literal["hinge", "vanilla", "non_saturating", "wasserstein"]

# Smallest image side that passes every pooling layer of the LPIPS backbone.
LPIPS_MIN_SIZE: dict[Backbone | ShiftTolerant, int] = {
    **{"vgg": 16, "alex": 32, "squeeze": 32},
    **{"stlpips_alex": 21, "stlpips_vgg": 18},
}

# Terms that compare features of a frozen network, which the key `…_network` names.
NETWORK_TERMS = ("features", "logits", "alignment")
DINOV2 = "timm/vit_base_patch14_dinov2.lvd142m@224"

# Terms that compare reconstructions with images. RECONSTRUCTION_LOSSES in components.py builds the loss of each.
RECONSTRUCTION_TERMS = ("l1", "l2", "perceptual", "features", "logits")
# Terms that restrain the discriminator.
PENALTIES = ("gradient_penalty", "r1", "lecam")
# Keys with the first step of a term; the others begin at step 0.
FIRST_STEPS = {"adversarial": "adversarial_start_step", **dict.fromkeys(PENALTIES, "discriminator_start_step")}


@dataclass(kw_only=True)
class LossConfig(Section):
    """Terms of the objective and their weights. A term of weight 0 is not computed, and its models are not built.

    l1_weight, l2_weight: mean absolute and mean squared error of the pixels
    perceptual_weight: LPIPS
    lpips_backbone, lpips_weights: "vgg", "alex" or "squeeze"; "pretrained", torchvision's weight file, or "random".
        "stlpips_alex" and "stlpips_vgg" are shift-tolerant LPIPS, whose trained weights a package holds
        (pip install 'tessella[metrics]'): no download, but its values are not those of LPIPS
    features_weight: cosine distance in the features of a frozen network
    features_network, features_network_weights: its name, see the README; "pretrained", a file, or "random"
    logits_weight: mean squared difference of the logits of a frozen classifier
    logits_network, logits_network_weights: its name and weights
    alignment_weight: cosine distance between projected quantized latents and the features of a frozen network
    alignment_network, alignment_network_weights: its name and weights
    codebook_weight: codebook and commitment terms
    adversarial_weight: the generator's adversarial term; 0 trains a VQ-VAE, without a discriminator
    adaptive_weight: whether the adaptive weight λ multiplies adversarial_weight; false leaves the weight constant
    adversarial_type: loss of the discriminator: "hinge", "vanilla", "non_saturating" or "wasserstein"
    generator_type: adversarial loss of the generator, one of the same names; null takes that of adversarial_type
    discriminator_start_step: first step that trains the discriminator; below 1 a share of the run
    adversarial_start_step: first step in which the generator has an adversarial term; below 1 a share of the run; a run
        that ends before it trains no discriminator
    gradient_penalty_weight: WGAN-GP's penalty on the discriminator's gradients between images and reconstructions
    r1_weight: γ of the penalty on the discriminator's gradients at images
    lecam_weight: LeCam's penalty on the distance of the discriminator's logits from their moving averages
    schedules: weights that change during the run, by the name of the term: {adversarial: {ramp: 0.1, end_weight: 0.1}}
        raises adversarial_weight from 0 over a tenth of the run, then changes it to 0.1 until the end. A term whose key
        is 0 stays off
    """

    l1_weight: NonNegativeFloat = 1.0
    l2_weight: NonNegativeFloat = 0.0
    perceptual_weight: NonNegativeFloat = 1.0
    lpips_backbone: Backbone | ShiftTolerant = "vgg"
    lpips_weights: str = "pretrained"
    features_weight: NonNegativeFloat = 0.0
    features_network: str = DINOV2
    features_network_weights: str = "pretrained"
    logits_weight: NonNegativeFloat = 0.0
    logits_network: str = "torchvision/convnext_small"
    logits_network_weights: str = "pretrained"
    alignment_weight: NonNegativeFloat = 0.0
    alignment_network: str = DINOV2
    alignment_network_weights: str = "pretrained"
    codebook_weight: PositiveFloat = 1.0
    adversarial_weight: NonNegativeFloat = 0.5
    adaptive_weight: bool = True
    adversarial_type: AdversarialType = "hinge"
    generator_type: AdversarialType | None = None
    discriminator_start_step: NonNegative | Share = 0
    adversarial_start_step: NonNegative | Share = 0
    gradient_penalty_weight: NonNegativeFloat = 0.0
    r1_weight: NonNegativeFloat = 0.0
    lecam_weight: NonNegativeFloat = 0.0
    schedules: dict[str, dict[str, Any]] = field(default_factory=dict)

    fields_of: ClassVar[dict[str, type]] = {"schedules.TERM": Schedule}

    def terms(self) -> dict[str, float]:
        """The values of the keys `…_weight`, by the name of the term."""
        names = (name.name.removesuffix("_weight") for name in fields(self) if name.name.endswith("_weight"))
        return {name: getattr(self, f"{name}_weight") for name in names if name != "adaptive"}

    def weights(self, step: int) -> dict[str, float]:
        """The weight of every term at a step (from 0), by its name: 0 before its start, then as `schedules` says."""
        return {name: value and self._schedule(name).weight(value, step) for name, value in self.terms().items()}

    def _schedule(self, term: str) -> Schedule:
        first = getattr(self, FIRST_STEPS[term]) if term in FIRST_STEPS else 0
        return Schedule(**{"start": first, **self.schedules.get(term, {})})

    def settle_steps(self, max_steps: int) -> None:
        """Replaces shares of the run by numbers of steps."""
        for name in ("discriminator_start_step", "adversarial_start_step"):
            setattr(self, name, in_steps(getattr(self, name), max_steps))
        for term, values in self.schedules.items():
            if not list(schedule_problems(values)):
                whole = asdict(self._schedule(term).in_steps(max_steps))
                given = {name for name, value in values.items() if value is not None} | {"anneal"}
                self.schedules[term] = {
                    name: value for name, value in whole.items() if name in given and value is not None
                }

    def problems(self) -> Iterable[tuple[str, Any, str]]:
        if not any(getattr(self, f"{term}_weight") for term in RECONSTRUCTION_TERMS):
            *others, last = (f"{term}_weight" for term in RECONSTRUCTION_TERMS)
            yield "l1_weight", self.l1_weight, f"{', '.join(others)} and {last} must not all be 0"
        if self.adversarial_weight and self.adversarial_type == "wasserstein" and not self._has_penalty:
            allowed = (
                "the loss of a Wasserstein discriminator has no lower bound: set gradient_penalty_weight (10 in the "
                "paper), r1_weight or lecam_weight above 0"
            )
            yield "adversarial_type", self.adversarial_type, allowed
        if self.adversarial_weight and self.adversarial_start_step < self.discriminator_start_step:
            allowed = f"must be at least discriminator_start_step ({self.discriminator_start_step})"
            yield "adversarial_start_step", self.adversarial_start_step, allowed
        for term in NETWORK_TERMS:
            if getattr(self, f"{term}_weight"):
                yield from name_problems(f"{term}_network", getattr(self, f"{term}_network"))
                yield from weights_problems(f"{term}_network_weights", getattr(self, f"{term}_network_weights"))
        yield from self._schedule_problems()

    def _schedule_problems(self) -> Iterable[tuple[str, Any, str]]:
        wrong = [
            (f"schedules.{term}.{name}", value, allowed)
            for term, values in self.schedules.items()
            for name, value, allowed in schedule_problems(values)
        ]
        terms = self.terms()
        wrong += [(f"schedules.{term}", None, unknown_key(term, terms)) for term in self.schedules if term not in terms]
        if "start" in self.schedules.get("adversarial", {}):
            wrong.append(("schedules.adversarial.start", None, "write loss.adversarial_start_step instead"))
        yield from wrong
        if not wrong and any(terms[term] for term in RECONSTRUCTION_TERMS) and not self._reconstructs_always():
            names = ", ".join(RECONSTRUCTION_TERMS)
            yield "schedules", None, f"in some steps the weights of {names} are all 0; leave one of them without start"

    def _reconstructs_always(self) -> bool:
        """Whether one of the reconstruction terms has a weight above 0 in every step."""
        schedules = [self._schedule(term) for term in RECONSTRUCTION_TERMS if getattr(self, f"{term}_weight")]
        return any(schedule.start == 0 and schedule.end_weight != 0 for schedule in schedules)

    @property
    def _has_penalty(self) -> bool:
        return any(getattr(self, f"{name}_weight") for name in PENALTIES)
