"""Weights of loss terms that change during a run."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from configs import unknown_key
from configs.sections import NonNegative, NonNegativeFloat, Positive, Share, in_steps
from configs.values import read_value


@dataclass(kw_only=True)
class Schedule:
    """How the weight of one term changes: 0 until `start`, a linear ramp to its value, a linear change to `end_weight`.

    start: first step with the term; below 1 a share of the run. The adversarial term starts at
        loss.adversarial_start_step, and penalties at loss.discriminator_start_step
    ramp: steps in which the weight grows from 0 to its value; below 1 a share of the run
    end_weight: the weight at the end; null keeps the value
    anneal: steps after the ramp in which the weight changes to end_weight; below 1 a share of the run; null takes all
        that are left
    """

    start: NonNegative | Share = 0
    ramp: NonNegative | Share = 0
    end_weight: NonNegativeFloat | None = None
    anneal: Positive | Share | None = None

    def weight(self, value: float, step: int) -> float:
        """The weight at a step (from 0) of a term whose weight has this value. Needs whole numbers of steps."""
        since_start = step + 1 - self.start
        if since_start <= 0:
            return 0.0
        if since_start < self.ramp:
            return value * since_start / self.ramp
        if self.end_weight is None or self.anneal is None:
            return value
        return value + (self.end_weight - value) * min(1.0, max(0.0, since_start - self.ramp) / self.anneal)

    def in_steps(self, max_steps: int) -> "Schedule":
        """The same schedule in whole numbers of steps, for a run of `max_steps`."""
        start, ramp = in_steps(self.start, max_steps), in_steps(self.ramp, max_steps)
        anneal = max(1, max_steps - start - ramp) if self.anneal is None else in_steps(self.anneal, max_steps)
        changes = self.end_weight is not None
        return Schedule(start=start, ramp=ramp, end_weight=self.end_weight, anneal=anneal if changes else None)


def schedule_problems(values: Mapping[str, Any]) -> Iterable[tuple[str, Any, str]]:
    """Every unknown key and wrong value of a schedule, in the form of `Section.problems`."""
    types = {field.name: field.type for field in fields(Schedule)}
    for name, value in values.items():
        if name not in types:
            yield name, None, unknown_key(name, types)
            continue
        try:
            read_value(types[name], value, strict=True)
        except ValueError as error:
            yield name, None, str(error)
        else:
            if name == "anneal" and value is not None and values.get("end_weight") is None:
                yield name, value, "it leads to end_weight; set that too, or leave this out"
