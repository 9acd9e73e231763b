"""The problems of a configuration, in words."""

import difflib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from configs.secrets import redacted, redacted_value

# A message lists at most this many problems, which fill one screen with wrapped lines.
SHOWN_PROBLEMS = 20
# No message of ours is longer, except with a long list or name in it.
SHOWN_CHARACTERS = 1000
# Names that a message lists of each kind.
SHOWN_NAMES = 3


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
        return f"{_name(self.key, 100)}: {printable(self.message)}" if self.key else printable(self.message)

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
        lines = [
            f"{_name(source, 200)}: {count}",
            *(f"  - {problem}" for problem in self.problems[:SHOWN_PROBLEMS]),
        ]
        if len(self.problems) > SHOWN_PROBLEMS:
            lines.append(f"  and {len(self.problems) - SHOWN_PROBLEMS} more")
        super().__init__("\n".join(lines))


def shown(value: Any) -> str:
    """A value for a message: true, false and null as in YAML, secrets redacted, and at most 60 characters."""
    try:
        text = str(value).lower() if isinstance(value, bool) else "null" if value is None else repr(value)
    except (ValueError, RecursionError):  # a number of more than 4,300 digits; a value that contains itself
        text = f"a {type(value).__name__} that is too long to show"
    return cut(redacted_value(text), 60)


def printable(text: str) -> str:
    """A text for the terminal: secrets redacted, control characters escaped, and at most SHOWN_CHARACTERS."""
    escaped = (letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in redacted(text))
    return cut("".join(escaped), SHOWN_CHARACTERS)


def _name(text: str, length: int) -> str:
    return printable(cut(text, length)).replace("\n", "\\n")


def cut(text: str, length: int) -> str:
    """The beginning of a text that is longer than `length`."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def one_line(error: object, length: int = 300) -> str:
    """What an error says, without secrets, in one line of at most `length` characters; its type, if it says nothing."""
    return cut(" ".join(redacted(str(error)).split()) or type(error).__name__, length)


def listed(names: Collection[str], most: int = SHOWN_NAMES) -> str:
    """Names for a message: the first `most` of them, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(list(names)[:most]) + more


def in_bytes(count: int) -> str:
    """A number of bytes for a message, such as "1.5 GB"."""
    if count >= 10**21:
        return "more than a billion TB"
    power = min((len(str(count)) - 1) // 3, 4)
    return f"{count / 1000**power:,.1f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def unknown_key(key: str, allowed: Iterable[str], nested: str | None = None) -> str:
    """The message for an unknown key: `nested`, the same key in a section, or the nearest known key, or all of them."""
    allowed = sorted(allowed)
    if found := [nested] if nested else nearest(str(key), allowed):
        return f"unknown key{did_you_mean(found)}"
    return f"unknown key; allowed: {listed(allowed, 10)}"


def nearest(received: Any, known: Iterable[str], most: int = 1) -> list[str]:
    """At most `most` of the known names that resemble what was received, the most similar first."""
    return difflib.get_close_matches(received, list(known), n=most) if isinstance(received, str) else []


def did_you_mean(names: Sequence[str], what: str = "") -> str:
    """The end of a message, which suggests names; empty without any. `what` says what they are."""
    return f"; did you mean {what}{' or '.join(map(repr, names))}?" if names else ""
