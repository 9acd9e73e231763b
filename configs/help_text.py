"""The text of `--help`: each key with its default and its meaning, from the docstrings of the configuration."""

import inspect
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, get_type_hints

from configs.loader import key_of, to_dict
from configs.sections import Section
from configs.yaml_files import preset_names, preset_of, read_yaml, to_yaml

USAGE = """usage: {command} {arguments}
{config}
A key sets one value and overrides CONFIG. Dots lead into a section: --section.key value.
Values are written as in YAML: --key 1e-4, --key true, --key null, --key '[a, b]'.
A switch without a value means true: --push_to_hub.
"""
CONFIG = """
CONFIG is a YAML file{presets}.
"""
POSITIONAL = """
{name} is the value of --{key}. A YAML file in its place is a CONFIG, which sets any of the keys.
"""


def help_text(cls: type, command: str, arguments: Sequence[str] = ()) -> str:
    """The whole text for a command that reads a `cls`.

    Args:
        cls: the dataclass of the configuration.
        command: how users start the command.
        arguments: those of the command; if the first one is a CONFIG, the text shows its values.

    Raises:
        ConfigError: the CONFIG cannot be read.
    """
    values: dict[str, Any] = {}
    lines = [usage(cls, command)]
    for name in arguments[:1]:
        if name.startswith("-") or getattr(cls, "positional", None) is not None:
            break
        preset = preset_of(getattr(cls, "preset", ""), name)
        values = read_yaml(preset)[0]
        lines.append(f"The values are those of {preset}. A key that it does not set has its default.\n")
    return "\n".join([*lines, *describe(cls, values=values)])


def usage(cls: type, command: str) -> str:
    """How to call a command that reads a `cls`, and the presets that it accepts."""
    first, about = _first_argument(cls)
    return USAGE.format(command=command, arguments=f"{first} [--key value ...]", config=about)


def _first_argument(cls: type) -> tuple[str, str]:
    """The argument without a key, and what it means."""
    words = getattr(cls, "words", None)
    if words is not None:
        return words, ""
    key = getattr(cls, "positional", None)
    if key is not None:
        return key.upper(), POSITIONAL.format(name=key.upper(), key=key)
    keys = {key_of(field) for field in fields(cls)}  # type: ignore[arg-type]
    presets = [name for name in preset_names() if read_yaml(name)[0].keys() <= keys]
    return "[CONFIG]", CONFIG.format(presets=", or one of these presets: " * bool(presets) + ", ".join(presets))


def describe(cls: type, prefix: str = "", values: Any = None) -> list[str]:
    """The lines about a section: its description, its keys, then the sections in it.

    Args:
        cls: the dataclass of the section.
        prefix: the section's name with a dot; empty at the top.
        values: the values to show; a key without a value has its default.
    """
    values = values if isinstance(values, Mapping) else {}
    hints = get_type_hints(cls)
    known = {key_of(field): field for field in fields(cls)}  # type: ignore[arg-type]
    sections = {key: hints[field.name] for key, field in known.items() if is_dataclass(hints[field.name])}
    lines: list[str] = []
    for part in (cls, *(base for base in cls.__mro__[1:] if is_dataclass(base) and base is not Section)):
        for block in re.split(r"\n+(?! )", _documentation(part)):  # a line and its indented followers
            names, _, meaning = block.partition(":")
            keys = names.split(", ")
            if not set(keys) <= known.keys():
                if lines and lines[-1]:
                    lines.append("")
                lines += [*block.splitlines(), ""]
            elif not set(keys) <= sections.keys():
                shown = (f"--{prefix}{key} {_value(known[key], values)}" for key in keys)
                lines.append("  " + "   ".join(shown))
                lines += [f"        {line.strip()}" for line in meaning.splitlines()]
        if lines[-1]:
            lines.append("")
    for key, section in {**sections, **getattr(cls, "fields_of", {})}.items():
        lines += [f"[{prefix}{key}]", *describe(section, f"{prefix}{key}.", values.get(key))]
    return lines


def _documentation(cls: type) -> str:
    """The docstring of a section. The arguments of a plain dataclass stand below the line "Args:"."""
    text, _, arguments = inspect.cleandoc(cls.__doc__ or "").partition("\nArgs:\n")
    return f"{text}\n{textwrap.dedent(arguments)}".rstrip()


def _value(field: Field, values: Mapping[str, Any]) -> str:
    if key_of(field) in values:
        return _one_line(values[key_of(field)])
    if field.default is MISSING and field.default_factory is MISSING:
        return "(required)"
    default: Any = field.default_factory() if field.default_factory is not MISSING else field.default
    return _one_line(to_dict(default) if is_dataclass(default) else default)


def _one_line(value: Any) -> str:
    value = list(value) if isinstance(value, tuple) else value
    return to_yaml(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")
