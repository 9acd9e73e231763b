"""Translates names of tensors between two code bases."""

import re
from collections.abc import Iterable, Iterator, Sequence

# Pairs (part of a name in the other code base, the same part here). A star stands for a number. A tilde stands for the
# number of a level, which the other code base counts from the other end.
Rules = Sequence[tuple[str, str]]


def to_ours(name: str, rules: Rules, num_levels: int) -> str:
    """Translates a name of another code base into ours; parts that no rule matches stay unchanged."""
    for theirs, ours in rules:
        name = _replace(name, theirs, ours, num_levels)
    return name


def to_theirs(name: str, rules: Rules, num_levels: int) -> str:
    """The reverse of `to_ours`."""
    for theirs, ours in rules:
        name = _replace(name, ours, theirs, num_levels)
    return name


def count(names: Iterable[str], pattern: str) -> int:
    """Counts how many of the numbers 0, 1, 2, … a pattern finds without a gap.

    Args:
        names: names of tensors.
        pattern: regular expression for the start of a name; its group matches the number.
    """
    found = {int(match[1]) for name in names if (match := re.match(pattern, name))}
    return next(number for number in range(len(found) + 1) if number not in found)


def _replace(name: str, old: str, new: str, num_levels: int) -> str:
    pattern = "".join(r"(\d+)" if part in "*~" else re.escape(part) for part in re.split("([*~])", old) if part)
    match = re.search(rf"(?<![^.]){pattern}(?![^.])", name)
    if match is None:
        return name
    numbers = _numbers(match, old, num_levels)
    written = re.sub("[*~]", lambda _: next(numbers), new)
    return name[: match.start()] + written + name[match.end() :]


def _numbers(match: re.Match[str], pattern: str, num_levels: int) -> Iterator[str]:
    for mark, text in zip(re.findall("[*~]", pattern), match.groups(), strict=True):
        yield text if mark == "*" else str(num_levels - 1 - int(text))
