"""Checks one value against the type of its field."""

import math
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from configs.problems import did_you_mean, listed, nearest, shown

# The largest numbers of int64 and float32, for values that go to a library; our own fields have narrower ranges.
LARGEST: dict[type, float] = {int: 2**63 - 1, float: 3.4e38}


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

    leaves = list(_leaves(value))
    # A lax check would take true, also numpy's, for the number 1.
    strict = strict or any(type(leaf).__name__ in ("bool", "bool_") for leaf in leaves)
    try:
        result = _adapter(hint).validate_python(value, strict=strict)
    except (ValidationError, OverflowError):
        raise ValueError(_refusal(hint, value)) from None
    if isinstance(value, float) and value == 1 and type(result) is int and float in _numbers(hint):
        raise ValueError("received 1.0, which is one step or the whole run; write 1, or the number of steps of the run")
    is_blank = isinstance(value, str) and not value.strip()
    is_number_as_text = isinstance(value, float) and isinstance(result, str)  # 2024.10 would become "2024.1"
    if (is_blank or is_number_as_text) and hint is not Any:
        raise ValueError(_refusal(hint, value))
    for leaf in [*(leaf for leaf in leaves if type(leaf) in LARGEST), *_leaves(result)]:
        if allowed := _leaf_problem(leaf):
            raise ValueError(f"received {shown(leaf)}; {allowed}")
    return result


def _numbers(hint: Any) -> list[Any]:
    """The types of a union without their bounds: int and float of a number of steps that may be a share of the run."""
    return [get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in get_args(hint)]


def _leaves(value: Any) -> Iterable[Any]:
    """The single values in nested lists and sections."""
    if isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(item)
    else:
        yield value


def _leaf_problem(leaf: Any) -> str | None:
    """What must be otherwise in a single value that has the type of its field."""
    if isinstance(leaf, str):
        return None if leaf.isprintable() else "must be printable text"
    if leaf is None or isinstance(leaf, bool):
        return None
    if type(leaf) not in LARGEST:
        return "must be text, a number, true, false or null"
    largest = LARGEST[type(leaf)]
    return None if abs(leaf) <= largest else f"must be a finite number from -{largest} to {largest}"


def _refusal(hint: Any, value: Any) -> str:
    message = f"received {shown(value)}; must be {allowed_values(hint, value)}"
    choices = [str(choice) for choice in _choices(hint)]
    return message + _as_list(hint, value) + did_you_mean(nearest(value, choices))


def _as_list(hint: Any, value: Any) -> str:
    """Advice for a single value in place of a list of such values."""
    if not isinstance(value, str | int | float) or len(shown(value)) >= 30:
        return ""
    for kind in (hint, *get_args(hint)):
        if get_origin(kind) in (list, tuple):
            try:
                read_value(get_args(kind)[0], value, strict=True)
            except ValueError:
                continue
            return f"; write [{value}]"
    return ""


def allowed_values(hint: Any, value: Any = None) -> str:
    """What a field accepts, in words; `value` is the one that does not fit."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{allowed_values(arguments[0], value)} {_range(arguments[1:])}"
    if origin not in (Union, UnionType) and (choices := [repr(choice) for choice in _choices(hint)]):
        return _either(choices) if len(choices) < 10 else listed(choices, 5)
    if origin in (Union, UnionType):
        kinds = [kind for kind in arguments if kind is not int or float not in arguments]
        return _either([allowed_values(kind, value) for kind in kinds])
    if origin in (list, tuple):
        return f"a list in which every entry is {allowed_values(arguments[0])}"
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
