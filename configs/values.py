"""Checks one value against the type of its field."""

import difflib
import math
import textwrap
from collections.abc import Iterable, Sequence
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from configs.problems import shown


def read_value(hint: Any, value: Any, strict: bool = False) -> Any:
    """Converts a plain value to the type of a field.

    Args:
        hint: type of the field, which may be annotated with bounds.
        value: a plain value.
        strict: refuse 2.0 and "2" for a whole number.

    Raises:
        ValueError: the value does not fit; the message says what was received and what is allowed.
    """
    from pydantic import ValidationError

    try:
        # A lax check would take true, also numpy's, for the number 1.
        result = _adapter(hint).validate_python(value, strict=strict or type(value).__name__ in ("bool", "bool_"))
        if not isinstance(value, str) or (value.strip() and value.isprintable()) or hint is Any:
            return result
    except ValidationError:
        pass
    message = f"received {shown(value)}; must be {allowed_values(hint, value)}"
    choices = [str(choice) for choice in _choices(hint)]
    nearest = difflib.get_close_matches(value, choices, n=1) if isinstance(value, str) else []
    raise ValueError(message + (f"; did you mean '{nearest[0]}'?" if nearest else ""))


def allowed_values(hint: Any, value: Any = None) -> str:
    """What a field accepts, in words; `value` is the one that does not fit."""
    origin, arguments = get_origin(hint), get_args(hint)
    if choices := [repr(choice) for choice in _choices(hint)]:
        return _either(choices) if len(choices) < 10 else textwrap.shorten(", ".join(choices), 100, placeholder=" …")
    if origin is Annotated:
        return f"{allowed_values(arguments[0], value)} {_range(arguments[1:])}"
    if origin in (Union, UnionType):
        kinds = [kind for kind in arguments if kind is not int or float not in arguments]
        return _either([allowed_values(kind, value) for kind in kinds])
    if origin in (list, tuple):
        example = f"; write [{value}]" if isinstance(value, str | int | float) else ""
        return f"a list in which every entry is {allowed_values(arguments[0])}{example}"
    finite = "finite " if isinstance(value, float) and not math.isfinite(value) else ""
    words = {
        bool: "true or false",
        int: "a whole number",
        float: f"a {finite}number",
        str: "printable text, not blank" if isinstance(value, str) else "text",
        NoneType: "null",
        list: "a list",
        tuple: "a list",
        dict: "a section of keys and values",
    }
    return words.get(origin or hint) or "a value of another kind"


def _either(parts: Sequence[str]) -> str:
    parts = list(dict.fromkeys(parts))
    return " or ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _choices(hint: Any) -> list[Any]:
    """The allowed values of a Literal or an Enum, alone or in a union."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return [member.value for member in hint]
    if get_origin(hint) in (Union, UnionType):
        return [choice for argument in get_args(hint) for choice in _choices(argument)]
    return []


def _range(bounds: Iterable[Any]) -> str:
    signs = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    limits = {
        sign: getattr(bound, sign) for bound in bounds for sign in signs if getattr(bound, sign, None) is not None
    }
    if "ge" in limits and "le" in limits:
        return f"from {limits['ge']} to {limits['le']}"
    if list(limits) == ["ge"]:
        return f"from {limits['ge']} up"
    return " and ".join(f"{signs[sign]} {limit}" for sign, limit in sorted(limits.items()))


@cache
def _adapter(hint: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    config = ConfigDict(coerce_numbers_to_str=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    return TypeAdapter(hint, config=config)
