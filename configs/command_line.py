"""What every command shares: `CONFIG --key value …` → a configuration, help, exit codes."""

import errno
import inspect
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

from configs.interruption import Diverged, Stopped, sigterm_raises
from configs.loader import key_of, load_config, to_dict
from configs.problems import ConfigError, Problem, shown
from configs.sections import Section
from configs.yaml_files import parse_yaml, preset_names

T = TypeVar("T")

# What a folder that is there may still refuse.
NO_WRITING = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}

USAGE = """usage: {command} [CONFIG] [--key value ...]

CONFIG is a YAML file, or the short name of a preset: {presets}
Any key can be given or overridden on the command line; nested keys are joined by dots (--data.image_column img).

"""


def parse_arguments(arguments: Sequence[str]) -> tuple[str | None, dict[str, Any], list[Problem]]:
    """Splits command-line arguments; values are read as YAML.

    Returns:
        The config's name, `{dotted key: value}`, and the problems: an argument without a key, a key without a value,
        or a value that is not YAML.
    """
    name: str | None = None
    overrides: dict[str, Any] = {}
    problems = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            if name is None and len(rest) + 1 == len(arguments):
                name = argument
            else:
                problems.append(Problem("", f"'{argument}' follows no --key (only the first argument may be a config)"))
            continue
        key, equals, text = argument[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                problems.append(Problem(key, f"no value given; write --{key or 'key'} VALUE"))
                continue
            text = rest.pop(0)
        if not key:
            problems.append(Problem("", f"'{argument}' names no key; write --key {text}"))
            continue
        try:
            overrides[key], repeated = parse_yaml(text)
            problems += [Problem(f"{key}.{problem.key}", "is given twice; leave one out") for problem in repeated]
        except ValueError as error:
            problems.append(Problem(key, f"received {shown(text)}, which is not a valid value: {error}"))
    return name, overrides, problems


def run(cls: type[T], main: Callable[[T], Any], command: str, arguments: Sequence[str] | None = None) -> None:
    """The body of every entry point: arguments → config → `main(config)`; exit codes are in configs/interruption.py.

    Of the processes of a job on one machine, which all make the same mistakes, the first one tells.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if "--help" in arguments or "-h" in arguments:
        print(USAGE.format(command=command, presets=", ".join(preset_names())) + "\n".join(describe(cls)))
        return
    try:
        with sigterm_raises():
            config = load_config(cls, *parse_arguments(arguments))
            try:
                main(config)
            except OSError as error:
                refused = refused_path(config, error)
                if refused is None:
                    raise
                raise ConfigError([refused]) from error
    except ConfigError as error:
        _exit(error, 2)
    except (Diverged, Stopped) as error:
        _exit(error, error.exit_code)
    except KeyboardInterrupt:
        _exit("stopped at once; the same command goes on from what has been saved", 128 + signal.SIGINT)


def _exit(message: object, code: int) -> NoReturn:
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(2)  # if the first process makes the same mistake, the launcher ends this one meanwhile
    print(f"\n{message}" if code > 2 else message, file=sys.stderr)
    sys.exit(code)


def refused_path(config: Any, error: OSError) -> Problem | None:
    """The key whose path the system refused to make, to open or to write into; None if it was another one."""
    if not isinstance(error.filename, str | PathLike):
        return None
    failed = Path(error.filename).absolute()
    for key, value in to_dict(config).items():
        path = Path(value).absolute() if isinstance(value, str) else None
        if path is None or "\0" in str(path):
            continue
        into = path in failed.parents and error.errno in NO_WRITING
        if failed == path or failed in path.parents or into:
            reason = "there is a file of this name" if isinstance(error, FileExistsError) else error.strerror
            return Problem(key, f"received {shown(value)}; it cannot be made or used ({reason}); choose another path")
    return None


def describe(cls: type, prefix: str = "") -> list[str]:
    """The lines of `--help`: each section's explanation, then its keys with their defaults."""
    lines = []
    for part in (cls, *(base for base in cls.__mro__[1:] if is_dataclass(base) and base is not Section)):
        lines += [*inspect.cleandoc(part.__doc__ or "").splitlines(), ""]
    sections = []
    hints = get_type_hints(cls)
    for field in fields(cls):  # type: ignore[arg-type]
        if is_dataclass(hints[field.name]):
            sections.append((hints[field.name], f"{prefix}{key_of(field)}."))
            continue
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        lines.append(f"  --{prefix}{key_of(field):<32} {'(required)' if default is MISSING else default}")
    for section, name in sections:
        lines += ["", f"[{name.rstrip('.')}]", *describe(section, name)]
    return lines
