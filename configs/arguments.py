"""Checks arguments of the Python API. A boolean, a text or a tensor is not a number."""

import math
import reprlib
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

from configs.problems import cut

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60


def described(value: Any) -> str:
    """A value for a message, in one short line: dtype and shape of an array or tensor, else the first characters."""
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and shape:
        return f"{type(value).__name__} {value.dtype} {tuple(shape)}"
    try:
        text = " ".join(_short.repr(value).split())
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        text = f"{type(value).__name__} of very many digits"
    return cut(text, 80)


def whole(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """A whole number from `least` to `most` as a Python integer; numpy's integers are whole numbers too.

    Raises:
        ValueError: the value is not a whole number, or outside the range.
    """
    if is_number(value, Integral) and least <= value and (most is None or value <= most):
        return int(value)
    limit = f"from {least} up" if most is None else f"from {least} to {most}"
    raise ValueError(f"{name}: received {described(value)}; must be a whole number {limit}")


def number(name: str, value: Any, holds: Callable[[float], bool], allowed: str) -> float:
    """A finite number for which `holds` is true, as a Python float; `allowed` states it in words.

    Raises:
        ValueError: the value is not a number, not finite, or outside the range.
    """
    if is_number(value, Real):
        try:
            plain = float(value)
        except OverflowError:
            plain = math.inf
        if math.isfinite(plain) and holds(plain):
            return plain
    raise ValueError(f"{name}: received {described(value)}; allowed is {allowed}")


def is_number(value: Any, kind: type = Real) -> bool:
    """Whether a value is a number of a kind. Python counts True as the number 1; here it is none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    """One of the allowed texts.

    Raises:
        ValueError: the value is another one.
    """
    if isinstance(value, str) and value in allowed:
        return value
    raise ValueError(f"{name}: received {described(value)}; allowed are {', '.join(map(repr, allowed))}")


def instance(name: str, value: Any, kinds: type | tuple[Any, ...], allowed: str) -> None:
    """Refuses a value of another type; `allowed` states the types in words.

    Raises:
        ValueError: the value has another type.
    """
    if not isinstance(value, kinds):
        raise ValueError(f"{name}: received {described(value)}; must be {allowed}")
