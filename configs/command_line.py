"""What every command shares: `CONFIG --key value …` → a configuration, help, exit codes."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

import yaml

from configs.loader import ConfigError, Problem, YamlReader, load_config, preset_names

T = TypeVar("T")

USAGE = """usage: {command} [CONFIG] [--key value ...]

CONFIG is a YAML file, or the short name of a preset: {presets}
Any key can be given or overridden on the command line; nested keys are joined by dots (--data.image_column img).

"""


def parse_arguments(arguments: Sequence[str]) -> tuple[str | None, dict[str, Any]]:
    """Splits command-line arguments into the config's name and `{dotted key: value}`; values are read as YAML.

    Raises:
        ConfigError: an argument has no key, a key has no value, or a value is not YAML.
    """
    name: str | None = None
    overrides: dict[str, Any] = {}
    problems = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            if name is None and not overrides:
                name = argument
            else:
                problems.append(Problem("", f"'{argument}' follows no --key (only the first argument may be a config)"))
            continue
        key, equals, text = argument[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                problems.append(Problem(key, f"no value given; write --{key} VALUE"))
                continue
            text = rest.pop(0)
        try:
            overrides[key] = yaml.load(text, YamlReader)
        except yaml.YAMLError:
            problems.append(Problem(key, f"received {text!r}, which cannot be read as a YAML value"))
    if problems:
        raise ConfigError(problems, "command line")
    return name, overrides


def run(cls: type[T], main: Callable[[T], Any], command: str, arguments: Sequence[str] | None = None) -> None:
    """The body of every entry point: arguments → config → `main(config)`; a mistake of the user's exits with code 2."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if "--help" in arguments or "-h" in arguments:
        print(USAGE.format(command=command, presets=", ".join(preset_names())) + "\n".join(describe(cls)))
        return
    try:
        name, overrides = parse_arguments(arguments)
        config = load_config(cls, name, overrides)
        main(config)
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from what has been saved", file=sys.stderr)
        sys.exit(130)


def describe(cls: type, prefix: str = "") -> list[str]:
    """The lines of `--help`: each section's explanation, then its keys with their defaults."""
    documentation = [line.strip() for line in (cls.__doc__ or "").strip().splitlines()]
    lines = [*documentation, ""]
    sections = []
    hints = get_type_hints(cls)
    for field in fields(cls):  # type: ignore[arg-type]
        if is_dataclass(hints[field.name]):
            sections.append((hints[field.name], f"{prefix}{field.name}."))
            continue
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        lines.append(f"  --{prefix}{field.name:<32} {'(required)' if default is MISSING else default}")
    for section, name in sections:
        lines += ["", f"[{name.rstrip('.')}]", *describe(section, name)]
    return lines
