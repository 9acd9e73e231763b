"""What is wrong with a configuration, in words."""

import difflib
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

# Problems that a message lists; with their wrapped lines they fill one screen.
SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration: where, what was received, and what is allowed."""

    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.key else self.message


class ConfigError(ValueError):
    """Every problem of one configuration; the text is cut where it would fill more than a screen."""

    def __init__(self, problems: Sequence[Problem], source: str = "configuration"):
        self.problems = list(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        lines = [f"{source}: {count}", *(f"  - {problem}" for problem in self.problems[:SHOWN_PROBLEMS])]
        if len(self.problems) > SHOWN_PROBLEMS:
            lines.append(f"  and {len(self.problems) - SHOWN_PROBLEMS} more")
        super().__init__("\n".join(lines))


def shown(value: Any) -> str:
    """A value as it is written in YAML, shortened for a message."""
    text = (
        {True: "true", False: "false"}[value] if isinstance(value, bool) else "null" if value is None else repr(value)
    )
    return text if len(text) <= 60 else f"{text[:57]}..."


def unknown_key(key: str, allowed: Iterable[str]) -> str:
    """The message for a key that does not exist, with the nearest one that does."""
    allowed = sorted(allowed)
    nearest = difflib.get_close_matches(str(key), allowed, n=1)
    if nearest:
        return f"unknown key; did you mean '{nearest[0]}'?"
    return f"unknown key; allowed: {textwrap.shorten(', '.join(allowed), 130, placeholder=' …')}"
