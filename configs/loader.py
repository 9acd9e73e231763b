"""YAML and overrides → a dataclass. Reports all problems together, and the nearest valid key for each unknown one."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from configs.files import write_text
from configs.problems import ConfigError, Problem, cut, listed, nearest, shown, unknown_key
from configs.secrets import ADVICE, secret_keys
from configs.values import read_value
from configs.yaml_files import DEEPEST, preset_of, read_yaml, to_yaml

T = TypeVar("T")

NOT_GIVEN = "is required and was not given"


def load_config(
    cls: type[T],
    name: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    found: Sequence[Problem] = (),
) -> T:
    """Loads a configuration from a YAML file or preset, with dotted overrides.

    Args:
        cls: dataclass of the configuration.
        name: path of a YAML file or short name of a preset; None starts with the defaults.
        overrides: `{dotted key: value}`.
        found: earlier problems, to report with the others.

    Raises:
        ConfigError: with every problem found.
    """
    problems = list(found)
    values: dict[str, Any] = {}
    if name:
        name = preset_of(getattr(cls, "preset", ""), name)
        try:
            values, repeated = read_yaml(name)
        except ConfigError as error:
            raise ConfigError([*error.problems, *problems], name) from None
        problems += repeated
    values = plain(values)  # an alias in the file then has a copy of its own, which an override does not share
    for key, displaced in getattr(cls, "displaces", {}).items():
        if key in (overrides or {}):
            values.pop(displaced, None)
    problems += merge(values, plain(dict(overrides or {})))
    return build(cls, values, name or "command line", problems)


def check(config: T, source: str = "configuration") -> T:
    """Checks types and rules of a configuration that was made in Python.

    Returns:
        A copy whose values have the types of their fields.

    Raises:
        ConfigError: with every problem found.
    """
    return build(type(config), to_dict(config), source)


def build(cls: type[T], values: Mapping[str, Any], source: str = "configuration", found: Sequence[Problem] = ()) -> T:
    """Builds a `cls` from nested plain values.

    Also checks the rules across keys when some keys are wrong. The wrong keys then have their defaults, and a broken
    rule about one of them is not reported. Rules that need a slow import are checked only if there is no other problem.

    Args:
        cls: dataclass of the configuration.
        values: nested plain values.
        source: where the values come from, for the message.
        found: earlier problems, to report with the others.

    Raises:
        ConfigError: with every problem found. If there is a secret, only this problem is listed.
    """
    values, problems = plain(values), list(found)
    if secrets := sorted(set(secret_keys(values))):
        raise ConfigError([Problem(key, ADVICE) for key in secrets], source)
    foreign = _foreign_keys(cls, values)
    if foreign:
        about = (cls.__doc__ or "").strip().partition("\n")[0].rstrip(".")
        question = "is this configuration for another command?"
        problems.append(Problem("", f"unknown keys {listed(foreign, 4)}: {question} This one is {about}"))
        values = {key: value for key, value in values.items() if key not in foreign}
    config = _read_section(cls, values, "", problems)
    getattr(config, "settle", tuple)()
    if foreign:  # Missing keys and broken rules follow from the wrong file.
        problems = [problem for problem in problems if not problem.message.startswith(NOT_GIVEN)]
    else:
        wrong = {problem.key for problem in problems} - {""}
        rules = [problem for problem in _broken_rules(config, "problems") if not _concerns(problem, wrong)]
        problems = problems + rules or _broken_rules(config, "library_problems")
    if problems:
        raise ConfigError(problems, source)
    return config


def merge(values: dict[str, Any], overrides: Mapping[str, Any]) -> list[Problem]:
    """Writes dotted `overrides` into nested `values`, in place.

    Returns:
        A problem for each override that leads into a single value instead of a section.
    """
    problems = []
    for dotted, value in overrides.items():
        *parents, last = str(dotted).split(".")
        node = values
        for depth, parent in enumerate(parents, 1):
            if node.get(parent) is not None and not isinstance(node[parent], dict):
                message = f"received {shown(node[parent])}; a single value has no key such as {cut(dotted, 100)}"
                problems.append(Problem(".".join(parents[:depth]), message))
            if not isinstance(node.get(parent), dict):
                node[parent] = {}
            node = node[parent]
        node[last] = value
    return problems


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as nested plain values, ready for YAML: tuples become lists."""
    return {key_of(field): plain(getattr(config, field.name), key_of(field)) for field in fields(config)}


def defaults(cls: type) -> dict[str, Any]:
    """The defaults of a configuration as nested plain values, without the keys that are required."""
    hints, found = get_type_hints(cls), {}
    for field in fields(cls):
        if is_dataclass(section := hints[field.name]) and isinstance(section, type):
            found[key_of(field)] = defaults(section)
        elif field.default is not MISSING or field.default_factory is not MISSING:
            value = field.default_factory() if field.default_factory is not MISSING else field.default
            found[key_of(field)] = plain(value)
    return found


def key_of(field: Field) -> str:
    """The key that sets a field: its name, or `metadata["key"]` where the key is a keyword of Python."""
    return field.metadata.get("key", field.name)


def plain(value: Any, key: str = "", level: int = 0) -> Any:
    """A copy of nested values in which sections are dictionaries and tuples are lists.

    Raises:
        ConfigError: a key is no text, or the values are nested more than DEEPEST levels deep.
    """
    if level > DEEPEST:
        raise ConfigError([Problem(key, f"is nested too deeply; at most {DEEPEST} levels are allowed")])
    if is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Mapping):
        if wrong := [name for name in value if not isinstance(name, str)]:
            raise ConfigError([Problem(key, f"received the key {shown(wrong[0])}; keys must be words")])
        return {name: plain(item, f"{key}.{name}".lstrip("."), level + 1) for name, item in value.items()}
    return [plain(item, key, level + 1) for item in value] if isinstance(value, list | tuple) else value


def switches(cls: type, prefix: str = "") -> set[str]:
    """The dotted keys of a configuration that may be true or false."""
    hints, found = get_type_hints(cls, include_extras=True), set()
    for field in fields(cls):
        key, hint = f"{prefix}{key_of(field)}", hints[field.name]
        if is_dataclass(hint) and isinstance(hint, type):
            found |= switches(hint, f"{key}.")
        elif bool in (hint, *get_args(hint)):
            found.add(key)
    return found


def save_config(config: Any, path: str | Path) -> None:
    """Writes all settings as YAML."""
    write_text(path, to_yaml(to_dict(config)))


def _read_section(cls: type[T], values: Mapping[str, Any], prefix: str, problems: list[Problem]) -> T:
    """Builds a section and appends its problems. A wrong or missing value is replaced by the default or a stand-in."""
    hints = get_type_hints(cls, include_extras=True)
    known = {key_of(field): field for field in fields(cls)}  # type: ignore[arg-type]
    reported = {problem.key for problem in problems}
    for name, value in values.items():
        if name not in known and f"{prefix}{name}" not in reported:
            refused = getattr(cls, "refused", {}).get(name)
            nested = next((key for key in _nested_keys(cls) if not prefix and key.endswith(f".{name}")), None)
            message = f"received {shown(value)}; {refused}" if refused else unknown_key(name, known, nested)
            problems.append(Problem(f"{prefix}{name}", message))
    good: dict[str, Any] = {}
    for own_key, field in known.items():
        name, key, hint = field.name, f"{prefix}{own_key}", hints[field.name]
        if is_dataclass(hint) and isinstance(hint, type):
            section = values.get(own_key, {})
            if not isinstance(section, Mapping):
                keys = listed([key_of(field) for field in fields(hint)])
                problems.append(Problem(key, f"received {shown(section)}; must be a section with keys such as {keys}"))
                good[name] = _read_section(hint, {}, f"{key}.", [])
            else:
                good[name] = _read_section(hint, section, f"{key}.", problems)
            continue
        if (section := section_in_dict(hint)) is not None and isinstance(values.get(own_key), Mapping):
            good[name] = _read_sections(section, values[own_key], f"{key}.", problems)
            continue
        if own_key in values:
            try:
                good[name] = read_value(hint, values[own_key])
                continue
            except ValueError as error:
                if key not in reported:
                    problems.append(Problem(key, str(error)))
        elif field.default is MISSING and field.default_factory is MISSING and key not in reported:
            problems.append(Problem(key, f"{NOT_GIVEN}; write --{key} VALUE"))
        if field.default is MISSING and field.default_factory is MISSING:
            good[name] = _stand_in(hint)
    return cls(**good)


def _read_sections(cls: type[T], values: Mapping[str, Any], prefix: str, problems: list[Problem]) -> dict[str, T]:
    """Builds the sections of a field of type `dict[str, cls]`, and appends their problems."""
    found: dict[str, T] = {}
    for name, section in values.items():
        if isinstance(section, Mapping):
            found[name] = _read_section(cls, section, f"{prefix}{name}.", problems)
        else:
            keys = listed([key_of(field) for field in fields(cls)])  # type: ignore[arg-type]
            message = f"received {shown(section)}; must be a section with keys such as {keys}"
            problems.append(Problem(f"{prefix}{name}", message))
    return found


def section_in_dict(hint: Any) -> type | None:
    """The dataclass of a field of type `dict[str, dataclass]`; None for other types."""
    is_dict = get_origin(hint) is dict and is_dataclass(get_args(hint)[1])
    return get_args(hint)[1] if is_dict else None


def _nested_keys(cls: type, prefix: str = "") -> Iterator[str]:
    """The dotted keys in the sections of a configuration."""
    hints = get_type_hints(cls)
    sections = {key_of(field): hints[field.name] for field in fields(cls) if is_dataclass(hints[field.name])}
    for key, section in {**sections, **getattr(cls, "fields_of", {})}.items():
        yield from (f"{prefix}{key}.{key_of(field)}" for field in fields(section))
        yield from _nested_keys(section, f"{prefix}{key}.")


def _stand_in(hint: Any) -> Any:
    """Any value of a type, so that the rules across keys can run."""
    candidates: list[Any] = [1, 0.5, "-", True, [], {}]
    for value in candidates:
        try:
            return read_value(hint, value)
        except ValueError:
            continue
    return None


def _foreign_keys(cls: type, values: Mapping[str, Any]) -> list[str]:
    """The unknown keys of a configuration that is probably for another command; empty if it is for this one.

    A configuration is for another command if it has three unknown keys or two unknown sections, and most of these
    resemble no key of `cls`.
    """
    known = [key_of(field) for field in fields(cls)]  # type: ignore[arg-type]
    nested = {key.rpartition(".")[2] for key in _nested_keys(cls)}
    elsewhere = nested | getattr(cls, "refused", {}).keys()
    unknown = [str(key) for key in values if key not in known and key not in elsewhere]
    far = [key for key in unknown if not nearest(key, known)]
    sections = [key for key in far if isinstance(values[key], Mapping)]
    many = len(unknown) >= 3 or len(sections) >= 2
    return unknown if many and 2 * len(far) >= len(unknown) else []


def _concerns(problem: Problem, wrong: Iterable[str]) -> bool:
    """Whether a broken rule is about, or names, one of the wrong keys."""
    return any(
        f"{problem.key}.".startswith(f"{other}.")
        or re.search(rf"\b{re.escape(other.rpartition('.')[2])}\b", problem.message)
        for other in wrong
    )


def _broken_rules(config: Any, kind: str, prefix: str = "") -> list[Problem]:
    """The problems that the method `kind` of a section, and of all sections in it, yields; see `Section`."""
    found = [
        Problem(f"{prefix}{key}", message if value is None else f"received {shown(value)}; {message}")
        for key, value, message in getattr(config, kind, tuple)()
    ]
    for field in fields(config):
        value, key = getattr(config, field.name), f"{prefix}{key_of(field)}"
        if is_dataclass(value):
            found += _broken_rules(value, kind, f"{key}.")
        elif isinstance(value, dict):
            sections = {name: section for name, section in value.items() if is_dataclass(section)}
            found += [
                problem
                for name, section in sections.items()
                for problem in _broken_rules(section, kind, f"{key}.{name}.")
            ]
    return found
