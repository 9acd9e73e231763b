"""Options of the sampling loop: guidance at each position, temperature and filters."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from configs.arguments import choice, described, is_number, number

# The smallest positive and the largest number that float32 represents in full precision.
SMALLEST, LARGEST = 2.0**-126, 3.4e38

GuidanceSchedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Guidance, temperature and filters of the sampling loop.

    Args:
        guidance_scale: s in u + s·(c - u) on the logits; 1.0 is no guidance. A tuple has a scale for each group of
            conditions, whose null tokens give u_g: c + Σ (s_g - 1)·(c - u_g). In place of a group's scale, a tuple has
            one for each image of a request.
        guidance_schedule: "constant"; "linear" and "cosine" raise the scale from 1.0 at the first code towards
            guidance_scale at the last code, as t^power and (1 - cos(π·t^power)) / 2. t is the fraction of the codes
            before the position.
        guidance_power: the power above; with a power above 1, guidance starts later.
        guidance_interval: (start, stop) in t. Positions outside start ≤ t < stop have no guidance, which halves their
            computation.
        temperature: divides the logits; 0.0 takes the most likely code.
        top_k: keeps the k most likely codes; 0 keeps all.
        top_p: keeps the most likely codes whose probabilities sum to p.
        min_p: keeps the codes that are at least min_p times as likely as the most likely one.

    Raises:
        ValueError: a value is out of range.

    Source: guidance, Ho and Salimans 2022, "Classifier-free diffusion guidance"; on the logits, and growing linearly,
    Chang et al. 2023, "Muse", section 2.7; power-cosine, Gao et al. 2023, "Masked diffusion transformer"; interval,
    Kynkäänniemi et al. 2024, "Applying guidance in a limited interval"; top-p, Holtzman et al. 2020; min-p, Nguyen et
    al. 2024. The order of the filters is that of transformers.
    """

    guidance_scale: float | tuple[float | tuple[float, ...], ...] = 1.0
    guidance_schedule: GuidanceSchedule = "constant"
    guidance_power: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        # in float32, the dtype of logits, smaller numbers become 0 and larger ones infinite
        ranges = {
            "guidance_power": (lambda value: value > 0, "a number above 0"),
            "temperature": (
                lambda value: value == 0 or SMALLEST <= value <= LARGEST,
                "a number from 0 up to 3.4e38 (0.0 is greedy), but none between 0 and 1.2e-38",
            ),
            "top_k": (lambda value: value >= 0 and value % 1 == 0, "a whole number from 0 up (0 is all)"),
            "top_p": (lambda value: SMALLEST <= value <= 1, "a number from 1.2e-38 to 1"),
            "min_p": (lambda value: 0 <= value <= 1, "a number from 0 to 1"),
        }
        object.__setattr__(self, "guidance_scale", _scales(self.guidance_scale))
        lengths = sorted({len(scale) for scale in self.group_scales if isinstance(scale, tuple)})
        if len(lengths) > 1:
            raise ValueError(f"guidance_scale: received scales for {lengths} images; give lists of one length")
        for name, (holds, allowed) in ranges.items():
            object.__setattr__(self, name, number(name, getattr(self, name), holds, allowed))
        object.__setattr__(self, "top_k", int(self.top_k))
        choice("guidance_schedule", self.guidance_schedule, get_args(GuidanceSchedule))
        object.__setattr__(self, "guidance_interval", _interval(self.guidance_interval))

    @property
    def group_scales(self) -> tuple[float | tuple[float, ...], ...]:
        """The guidance scale of each group of conditions; one group, all conditions, unless a tuple was given."""
        scale = self.guidance_scale
        return scale if isinstance(scale, tuple) else (scale,)

    @property
    def table(self) -> np.ndarray:
        """The guidance scale of each group and each image, float64 `(G, B)`; `(G, 1)` if all images share them."""
        scales = [scale if isinstance(scale, tuple) else (scale,) for scale in self.group_scales]
        count = max(map(len, scales))
        return np.array([scale if len(scale) == count else scale * count for scale in scales])

    @property
    def acting(self) -> list[bool]:
        """Whether each group guides an image."""
        return (self.table != 1).any(1).tolist()

    @property
    def guided(self) -> bool:
        """Whether the options ask for guidance, which needs rows with null tokens."""
        return any(self.acting)

    @property
    def rows_per_image(self) -> int:
        """Rows of the prior for each image: one, and with guidance one for each group."""
        return 1 + len(self.group_scales) if self.guided else 1

    def of_images(self, images: Sequence[int]) -> "SamplingOptions":
        """The options of some images of the request, by their numbers; they may repeat."""

        def chosen(scale: float | tuple[float, ...]) -> float | tuple[float, ...]:
            some = tuple(scale[image] for image in images) if isinstance(scale, tuple) else (scale,)
            return some if len(set(some)) > 1 else some[0]

        if not any(isinstance(scale, tuple) for scale in self.group_scales):
            return self
        return replace(self, guidance_scale=tuple(map(chosen, self.group_scales)))

    def scales(self, length: int) -> np.ndarray:
        """The table at each of `length` positions, float64 `(length, G, B)`; 1.0 is no guidance."""
        strengths = np.array([self._strength(position / length) for position in range(length)])[:, None, None]
        return np.where(strengths < 1, 1 + strengths * (self.table - 1), self.table)

    def guided_positions(self, length: int) -> range:
        """From the first to the last position with a scale other than 1.0; only these need rows with null tokens."""
        guided = (self.scales(length) != 1).any((1, 2)).nonzero()[0].tolist()
        return range(guided[0], guided[-1] + 1) if guided else range(0)

    def _strength(self, t: float) -> float:
        """The share of the guidance that acts at t, from 0 to 1."""
        start, stop = self.guidance_interval
        if not start <= t < stop:
            return 0.0
        if self.guidance_schedule == "constant":
            return 1.0
        share = t**self.guidance_power
        return (1 - math.cos(math.pi * share)) / 2 if self.guidance_schedule == "cosine" else share


def _scales(value: Any, depth: int = 2) -> Any:
    """A guidance scale, or tuples of them up to this depth, as floats."""
    if depth and isinstance(value, list | tuple) and value:
        return tuple(_scales(one, depth - 1) for one in value)
    allowed = "a number from 0 up to 3.4e38 (1.0 is no guidance)"
    return number("guidance_scale", value, lambda value: 0 <= value <= LARGEST, allowed)


def _interval(value: Any) -> tuple[float, float]:
    ends = list(value) if isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim) else []
    if len(ends) == 2 and all(map(is_number, ends)) and 0 <= ends[0] < ends[1] <= 1:
        return float(ends[0]), float(ends[1])
    raise ValueError(
        f"guidance_interval: received {described(value)}; allowed are two shares of the codes, 0 <= start < stop <= 1"
    )
