"""Which settings are the best, and whether they are better than the present ones beyond the noise.

Shape letters: N generated images, M real ones, D principal components.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.tuning.judge import Sample, gaussian
from stage1_vqgan.evaluation.frechet import Gaussian, frechet_distance

RESAMPLES = 200
SURE = 2  # standard errors


@dataclass(frozen=True)
class Figures:
    """The figures of some settings.

    Attributes:
        distance: Frechet distance to real images.
        accuracy: class accuracy; None without classes.
    """

    distance: float
    accuracy: float | None

    @classmethod
    def of(cls, sample: Sample, real: Gaussian) -> "Figures":
        """The figures of a sample, compared with real images."""
        return cls(frechet_distance(gaussian(sample.components), real), sample.accuracy)


@dataclass(frozen=True)
class Gain:
    """What settings change, compared with the present ones, each with its standard error.

    Attributes:
        distance, distance_error: of the Frechet distance; below 0 is better.
        accuracy, accuracy_error: of the class accuracy; above 0 is better. 0 without classes.
    """

    distance: float
    distance_error: float
    accuracy: float
    accuracy_error: float

    @property
    def is_worse(self) -> bool:
        """Whether one of the figures is worse beyond the noise."""
        return self.distance > SURE * self.distance_error or -self.accuracy > SURE * self.accuracy_error

    @property
    def is_nearer(self) -> bool:
        """Whether the distance is smaller beyond the noise."""
        return -self.distance > SURE * self.distance_error

    @property
    def is_clearer(self) -> bool:
        """Whether the class accuracy is higher beyond the noise."""
        return self.accuracy > SURE * self.accuracy_error


def gain(sample: Sample, present: Sample, real: np.ndarray, seed: int = 0) -> Gain:
    """Compares two samples whose images have the same prompts and seeds, with components `(M, D)` of real images.

    The standard errors are those of a bootstrap. Each time it draws the same images of both samples, and real images,
    with repetition. So they hold the chance of the seeds, and that of the real images.

    Source: Efron and Tibshirani 1993, "An introduction to the bootstrap".
    """
    rng, count = np.random.default_rng(seed), len(sample.components)
    differences = []
    for _ in range(RESAMPLES):
        rows, some = rng.integers(count, size=count), rng.integers(len(real), size=len(real))
        differences.append(_difference(sample.rows(rows), present.rows(rows), real[some]))
    change, errors = _difference(sample, present, real), np.std(differences, axis=0, ddof=1)
    return Gain(change[0], float(errors[0]), change[1], float(errors[1]))


def _difference(sample: Sample, present: Sample, real: np.ndarray) -> tuple[float, float]:
    new, old = (Figures.of(one, gaussian(real)) for one in (sample, present))
    return new.distance - old.distance, (new.accuracy or 0.0) - (old.accuracy or 0.0)


def is_better(change: Gain, present: Figures, objective: str, real_accuracy: float | None) -> bool:
    """Whether settings reach more of the objective beyond the noise, and lose nothing beyond the noise.

    Args:
        change: what they change.
        present: figures of the present settings.
        objective: see `TuneConfig`.
        real_accuracy: class accuracy of real images. A higher one counts for nothing.
    """
    can_gain = objective == "class_accuracy" and (present.accuracy or 0.0) < (real_accuracy or 0.0)
    return not change.is_worse and (change.is_nearer or (can_gain and change.is_clearer))


def ranked(
    figures: Sequence[Figures], objective: str, noise: float, count: int, real_accuracy: float | None
) -> list[int]:
    """The numbers of settings, the best first. The first figures are those of the present settings.

    Args:
        figures: of all settings, by the same real images.
        objective: see `TuneConfig`. For "class_accuracy", the settings with a distance not above the present one come
            first. Of these, each standard error that the accuracy lacks to the best one, or to that of real images,
            counts more than the distance.
        noise: standard error of the difference of two distances.
        count: N, by which the accuracy has a standard error.
        real_accuracy: class accuracy of real images.
    """
    present = figures[0]
    near = [one.distance <= present.distance + noise for one in figures]
    best = max((one.accuracy or 0.0 for one, is_near in zip(figures, near, strict=True) if is_near), default=0.0)
    target = min(best, real_accuracy or 1.0)
    least = (present.accuracy or 0.0) - standard_error(present.accuracy or 0.0, count)

    def key(number: int) -> tuple[float, ...]:
        distance, accuracy = figures[number].distance, figures[number].accuracy
        if accuracy is None:
            return (distance,)
        if objective == "distance":
            return accuracy < least, distance
        return not near[number], math.floor(max(0.0, target - accuracy) / standard_error(target, count)), distance

    return sorted(range(len(figures)), key=key)


def standard_error(share: float, count: int) -> float:
    """The standard error of a share of `count` images; if all or none have it, as if one were different."""
    return math.sqrt(max(share * (1 - share), 1 / count) / count)


def noise_of(sample: Sample, real: Gaussian, seed: int = 0) -> float:
    """The standard error of the difference of two distances by the chance of the generated images: a bootstrap."""
    rng, count = np.random.default_rng(seed), len(sample.components)
    found = [Figures.of(sample.rows(rng.integers(count, size=count)), real).distance for _ in range(RESAMPLES // 4)]
    return float(np.std(found, ddof=1)) * math.sqrt(2)
