"""The text of `--help`: each key with its default and its meaning, from the docstrings of the configuration."""

import inspect
import re
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, get_type_hints

from configs.loader import key_of, to_dict
from configs.sections import Section
from configs.yaml_files import preset_names, read_yaml, to_yaml

USAGE = """usage: {command} {arguments}
{config}
A key sets one value and overrides CONFIG. Dots lead into a section: --section.key value.
Values are written as in YAML: --key 1e-4, --key true, --key null, --key '[a, b]'.
"""
CONFIG = """
CONFIG is a YAML file{presets}.
"""
POSITIONAL = """
{name} is the value of --{key}. A YAML file in its place is a CONFIG, which sets any of the keys.
"""


def help_text(cls: type, command: str) -> str:
    """The whole text for a command that reads a `cls`."""
    first, about = _first_argument(cls)
    usage = USAGE.format(command=command, arguments=f"{first} [--key value ...]", config=about)
    return "\n".join([usage, *describe(cls)])


def _first_argument(cls: type) -> tuple[str, str]:
    """The argument without a key, and what it means."""
    key = getattr(cls, "positional", None)
    if key is not None:
        return key.upper(), POSITIONAL.format(name=key.upper(), key=key)
    keys = {key_of(field) for field in fields(cls)}  # type: ignore[arg-type]
    presets = [name for name in preset_names() if read_yaml(name)[0].keys() <= keys]
    return "[CONFIG]", CONFIG.format(presets=", or one of these presets: " * bool(presets) + ", ".join(presets))


def describe(cls: type, prefix: str = "") -> list[str]:
    """The lines about a section: its description, its keys, then the sections in it."""
    hints = get_type_hints(cls)
    known = {key_of(field): field for field in fields(cls)}  # type: ignore[arg-type]
    sections = {key: hints[field.name] for key, field in known.items() if is_dataclass(hints[field.name])}
    lines: list[str] = []
    for part in (cls, *(base for base in cls.__mro__[1:] if is_dataclass(base) and base is not Section)):
        for block in re.split(r"\n+(?! )", inspect.cleandoc(part.__doc__ or "")):  # a line and its indented followers
            names, _, meaning = block.partition(":")
            keys = names.split(", ")
            if not set(keys) <= known.keys():
                if lines and lines[-1]:
                    lines.append("")
                lines += [*block.splitlines(), ""]
            elif not set(keys) <= sections.keys():
                lines.append("  " + "   ".join(f"--{prefix}{key} {_default(known[key])}" for key in keys))
                lines += [f"        {line.strip()}" for line in meaning.splitlines()]
        if lines[-1]:
            lines.append("")
    for key, section in sections.items():
        lines += [f"[{prefix}{key}]", *describe(section, f"{prefix}{key}.")]
    return lines


def _default(field: Field) -> str:
    if field.default is MISSING and field.default_factory is MISSING:
        return "(required)"
    default: Any = field.default_factory() if field.default_factory is not MISSING else field.default
    default = list(default) if isinstance(default, tuple) else to_dict(default) if is_dataclass(default) else default
    return to_yaml(default, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")
