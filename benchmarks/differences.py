"""Figures over several seeds: mean and spread, paired differences from a base line, and tables of both."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student

from benchmarks.report import table

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """A figure of a variant, and its difference from the base line.

    Attributes:
        seeds: number of values.
        mean, spread: of the values; the spread is the sample standard deviation, None of one value.
        pairs: number of seeds that the base line has too.
        difference: mean difference from the base line of the same seed; None without pairs.
        error: standard error of this mean: the sample standard deviation of the differences, divided by the root of
            their number; None of one pair.
    """

    seeds: int
    mean: float
    spread: float | None
    pairs: int
    difference: float | None
    error: float | None

    @property
    def verdict(self) -> str:
        """ "=" if all differences are 0; the sign of a clear difference; "." if it is not clear; "?" of one pair.

        It is clear if 0 is outside its interval of 95 %, by Student's t.
        """
        if self.difference is None:
            return ""
        if self.error is None:
            return "?"
        if self.difference == self.error == 0:
            return "="
        is_clear = abs(self.difference) > errors_of_interval(self.pairs) * self.error
        return f"{self.difference:+}"[0] if is_clear else "."


def errors_of_interval(pairs: int) -> float:
    """How many standard errors the interval of 95 % reaches from the mean of so many differences, at least 2."""
    return float(student.ppf((1 + CONFIDENCE) / 2, pairs - 1))


def compare(values: Mapping[int, float], base: Mapping[int, float]) -> Comparison:
    """Compares the values of a variant with those of the base line, both by seed."""
    differences = [value - base[seed] for seed, value in values.items() if seed in base]
    pairs, spread = len(differences), sample_deviation(differences)
    return Comparison(
        seeds=len(values),
        mean=fmean(values.values()),
        spread=sample_deviation([*values.values()]),
        pairs=pairs,
        difference=fmean(differences) if differences else None,
        error=None if spread is None else spread / math.sqrt(pairs),
    )


def sample_deviation(values: Sequence[float]) -> float | None:
    """The sample standard deviation; None of fewer than 2 values."""
    return stdev(values) if len(values) > 1 else None


def figure_rows(figure: str, compared: Mapping[str, Comparison], digits: int) -> list[dict[str, Any]]:
    """The table of a figure: a line for each variant."""
    return [
        {
            figure: name,
            "seeds": one.seeds,
            "mean ± spread": with_error(one.mean, one.spread, f"z.{digits}f"),
            "difference ± error": ""
            if one.difference is None
            else with_error(one.difference, one.error, f"+z.{digits}f"),
        }
        for name, one in compared.items()
    ]


def with_error(value: float, error: float | None, form: str) -> str:
    """A value, with its error if that is known."""
    return format(value, form) + ("" if error is None else f" ± {format(error, form.lstrip('+'))}")


def verdict_rows(compared: Mapping[str, Mapping[str, Comparison]]) -> list[dict[str, str]]:
    """The table of what differs: a line for each variant, a column for each figure.

    Args:
        compared: by figure, then by variant.
    """
    names = dict.fromkeys(name for variants in compared.values() for name in variants)
    return [
        {"": name}
        | {figure: variants[name].verdict if name in variants else "" for figure, variants in compared.items()}
        for name in names
    ]


def all_tables(compared: Mapping[str, Mapping[str, Comparison]], digits: Mapping[str, int]) -> str:
    """A table for each figure, the one of the verdicts, and what these mean.

    Args:
        compared: by figure, then by variant.
        digits: of the figures; others have 3.
    """
    tables = [figure_rows(figure, variants, digits.get(figure, 3)) for figure, variants in compared.items()]
    pairs = max(one.pairs for variants in compared.values() for one in variants.values())
    return "\n\n".join(map(table, [*tables, verdict_rows(compared)])) + "\n" + "\n".join(meanings(pairs))


def meanings(pairs: int) -> list[str]:
    """What the verdicts mean, with so many pairs."""
    blank = "blank the base line, and figures that cannot be compared with it"
    if pairs < 2:
        return [blank, "?     one seed does not tell"]
    limit = f"{errors_of_interval(pairs):.2f} errors with {pairs} seeds"
    return [
        blank,
        "=     no difference: the variant changes nothing that this figure depends on",
        f"+, -  clear difference: above {limit} (Student's t, {CONFIDENCE:.0%}); by chance in 1 cell of 20",
        f".     no clear difference; one of up to |difference| + {limit} may exist",
    ]
