"""Names of the same tensors in two code bases."""

import re
from collections.abc import Iterable, Iterator, Sequence

# (parts of a name elsewhere, the same parts here). A star is a number, a tilde the number of a level counted from the
# other end.
Rules = Sequence[tuple[str, str]]


def to_ours(name: str, rules: Rules, num_levels: int) -> str:
    """A name of another code base as it is here; what no rule names stays as it is."""
    for theirs, ours in rules:
        name = _replace(name, theirs, ours, num_levels)
    return name


def to_theirs(name: str, rules: Rules, num_levels: int) -> str:
    """The reverse of `to_ours`."""
    for theirs, ours in rules:
        name = _replace(name, ours, theirs, num_levels)
    return name


def count(names: Iterable[str], pattern: str) -> int:
    """How many numbers, from 0 up without a gap, the group of a regular expression meets at the start of names."""
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
