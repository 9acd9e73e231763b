"""The problems of a configuration, in words."""

import difflib
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

# A message lists at most this many problems, which fill one screen with wrapped lines.
SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class Problem:
    """One problem of a configuration.

    Attributes:
        key: dotted key; empty if the problem concerns no single key.
        message: what was received, what is allowed, what to do.
    """

    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.key else self.message

    @classmethod
    def of_error(cls, error: Exception) -> "Problem":
        """The problem that an error of the form "key: message" states."""
        key, _, message = str(error).partition(": ")
        return cls(key, message)


class ConfigError(ValueError):
    """All problems of one configuration. The text lists as many as fit on a screen."""

    def __init__(self, problems: Sequence[Problem], source: str = "configuration"):
        self.problems = list(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        lines = [f"{source}: {count}", *(f"  - {problem}" for problem in self.problems[:SHOWN_PROBLEMS])]
        if len(self.problems) > SHOWN_PROBLEMS:
            lines.append(f"  and {len(self.problems) - SHOWN_PROBLEMS} more")
        super().__init__("\n".join(lines))


def shown(value: Any) -> str:
    """A value for a message: true, false and null as in YAML, and at most 60 characters."""
    text = str(value).lower() if isinstance(value, bool) else "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def unknown_key(key: str, allowed: Iterable[str]) -> str:
    """The message for an unknown key: the nearest known key, or all of them."""
    allowed = sorted(allowed)
    nearest = difflib.get_close_matches(str(key), allowed, n=1)
    if nearest:
        return f"unknown key; did you mean '{nearest[0]}'?"
    return f"unknown key; allowed: {textwrap.shorten(', '.join(allowed), 130, placeholder=' …')}"
