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
    there = gaussian(real)
    new, old = Figures.of(sample, there), Figures.of(present, there)
    return new.distance - old.distance, (new.accuracy or 0.0) - (old.accuracy or 0.0)


def is_better(change: Gain, present: Figures, real_accuracy: float | None) -> bool:
    """Whether one figure of some settings is better beyond the noise, and the other not worse beyond the noise.

    Args:
        change: what they change.
        present: figures of the present settings.
        real_accuracy: class accuracy of real images. A gain above it counts for nothing.
    """
    can_be_clearer = (present.accuracy or 0.0) < (real_accuracy or 0.0)
    return not change.is_worse and (change.is_nearer or (can_be_clearer and change.is_clearer))


def ranked(figures: Sequence[Figures], noise: float, count: int, real_accuracy: float | None) -> list[int]:
    """The numbers of settings, the best first. The first figures are those of the present settings.

    The smallest distance is the best, of the settings whose class accuracy is not below the present one. At an equal
    distance, the higher class accuracy is better, up to that of real images. Equal is what differs by the noise.

    Args:
        figures: of all settings, by the same real images.
        noise: standard error of the difference of two distances.
        count: N, by which an accuracy has a standard error.
        real_accuracy: class accuracy of real images.
    """
    accuracies = np.array([one.accuracy or 0.0 for one in figures])
    distances = np.array([one.distance for one in figures])
    clear = accuracies >= accuracies[0] - standard_error(accuracies[0], count)
    near = clear & (distances <= distances[clear].min() + noise)
    target = min(accuracies[near].max(), 1.0 if real_accuracy is None else real_accuracy)
    lacking = (target - accuracies).clip(min=0) // standard_error(target, count)
    steps = np.where(near, lacking, 0)
    return np.lexsort((distances, steps, ~near, ~clear)).tolist()


def standard_error(share: float, count: int) -> float:
    """The standard error of a share of `count` images; if all or none have it, as if one were different."""
    return math.sqrt(max(share * (1 - share), 1 / count) / count)


def noise_of(sample: Sample, real: Gaussian, seed: int = 0) -> float:
    """The standard error of the difference of two distances by the chance of generated images alone: a bootstrap."""
    rng, count = np.random.default_rng(seed), len(sample.components)
    found = [Figures.of(sample.rows(rng.integers(count, size=count)), real).distance for _ in range(RESAMPLES // 4)]
    return float(np.std(found, ddof=1)) * math.sqrt(2)
