"""The parts that all commands share: parsing `CONFIG --key value …`, help, messages and exit codes."""

import os
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, fields
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from configs.checksums import Damaged
from configs.ctrl_c import ctrl_c
from configs.disk_space import DiskFull, naming_full_disk
from configs.files import NO_WRITING
from configs.interruption import Diverged, Stopped, sigterm_raises
from configs.loader import key_of, load_config, switches, to_dict
from configs.memory import OUT_OF_MEMORY, is_out_of_memory, out_of_memory_advice
from configs.problems import ConfigError, Problem, cut, printable, shown
from configs.restarts import use_new_store
from configs.secrets import ADVICE, names_secret
from configs.yaml_files import parse_yaml

T = TypeVar("T")

YAML_ENDINGS = (".yaml", ".yml")
started_as: str | None = None  # how the user started the command, if not by the module itself
MAKE_SPACE = "What was saved before is intact. Make space, then start the same command again: it goes on from there"


def parse_arguments(
    arguments: Sequence[str], positional: str | None = None, switches: Collection[str] = ()
) -> tuple[str | None, dict[str, Any], list[Problem]]:
    """Splits command-line arguments and reads their values as YAML.

    Args:
        arguments: the words of the command line.
        positional: key that the first argument sets if it follows no key; see `Section.positional`.
        switches: the keys that may stand without a value, which is then true.

    Returns:
        The name of the YAML file or preset, `{dotted key: value}`, and the problems: an argument without a key, a key
        without a value, or a value that is not YAML.

    Raises:
        ConfigError: a key is that of a secret. Other problems are not listed, because they could show the secret.
    """
    name: str | None = None
    overrides: dict[str, Any] = {}
    problems = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            is_first = len(rest) + 1 == len(arguments)
            if is_first and positional is not None and not argument.endswith(YAML_ENDINGS):
                overrides[positional] = argument
            elif is_first:
                name = argument
            else:
                reason = f"follows no --key (only the first argument may be a {positional or 'config'})"
                problems.append(Problem("", f"{shown(argument)} {reason}"))
            continue
        key, equals, text = argument[2:].partition("=")
        if names_secret(key):
            raise ConfigError([Problem(key, ADVICE)], "command line")
        if not equals:
            alone = not rest or rest[0].startswith("--")
            if alone and key in switches:
                overrides[key] = True
                continue
            if alone:
                problems.append(Problem(key, f"no value given; write --{cut(key, 100) or 'key'} VALUE"))
                continue
            text = rest.pop(0)
        if not key:
            problems.append(Problem("", f"{shown(argument)} names no key; write --key VALUE"))
            continue
        try:
            overrides[key], repeated = parse_yaml(text)
            problems += [Problem(f"{key}.{problem.key}", "is given twice; leave one out") for problem in repeated]
        except ValueError as error:
            problems.append(Problem(key, f"received {shown(text)}, which is not a valid value: {error}"))
    return name, overrides, problems


def run(cls: type[T], main: Callable[[T], Any], command: str, arguments: Sequence[str] | None = None) -> None:
    """The body of every entry point: arguments → configuration → `main(configuration)`.

    A `main` that needs torch or transformers imports them inside the function. The import takes seconds, and mistakes
    in the arguments are reported before it. configs/interruption.py lists the exit codes.

    Args:
        cls: dataclass of the configuration.
        main: called with the checked configuration.
        command: how users start the module, for `--help`; `started_as` replaces it.
        arguments: by default those of the command line.
    """
    ctrl_c.install()
    arguments, command = sys.argv[1:] if arguments is None else list(arguments), started_as or command
    if "--help" in arguments or "-h" in arguments:
        from configs.help_text import help_text

        try:
            print(help_text(cls, command, arguments), flush=True)
        except BrokenPipeError:  # the reader, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more at its end
        except ConfigError as error:
            _exit(error, 2)
        return
    if not arguments and (missing := required_keys(cls)):
        from configs.help_text import usage

        _exit(f"{usage(cls, command)}\nGive a CONFIG, or at least {', '.join(missing)}. --help explains all keys.", 2)
    config = None
    try:
        with sigterm_raises():
            words = parse_arguments(arguments, getattr(cls, "positional", None), switches(cls))
            config = load_config(cls, *words)
            use_new_store()
            try:
                with naming_full_disk(written_folder(config)):
                    main(config)
            except DiskFull:
                raise
            except OSError as error:
                refused = refused_path(config, error)
                if refused is None:
                    raise
                raise ConfigError([refused]) from error
    except ConfigError as error:
        _exit(error, 2)
    except Damaged as error:
        _exit(printable(str(error)), 2)
    except DiskFull as error:
        _exit(f"the disk is full: {error.strerror}. {MAKE_SPACE}", error.exit_code)
    except (Diverged, Stopped) as error:
        _exit(error, error.exit_code)
    except KeyboardInterrupt:
        ctrl_c.arrived()
        _exit(ctrl_c.message, ctrl_c.exit_code)
    except Exception as error:
        if ctrl_c.happened:  # a library has turned the KeyboardInterrupt into an error of its own
            ctrl_c.arrived()
            _exit(ctrl_c.message, ctrl_c.exit_code)
        if not is_out_of_memory(error):
            raise
        _exit(out_of_memory_advice(error, to_dict(config) if config else {}), OUT_OF_MEMORY)


def required_keys(cls: type) -> list[str]:
    """The keys without a default."""
    return [key_of(each) for each in fields(cls) if each.default is MISSING and each.default_factory is MISSING]  # type: ignore[arg-type]


def written_folder(config: Any) -> Path:
    """The folder in which a command writes its results; the current one if no key names it."""
    keys = ("output_dir", "output", "code_store")
    return Path(next((value for key in keys if isinstance(value := getattr(config, key, None), str)), "."))


def _exit(message: object, code: int) -> NoReturn:
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(2)  # All processes make the same mistake. When the first exits, the launcher ends the others.
        if code > 128:  # They were stopped, and the first has said so.
            sys.exit(code)
    print(f"\n{message}" if code > 2 else message, file=sys.stderr)
    sys.exit(code)


def refused_path(config: Any, error: OSError) -> Problem | None:
    """The key of the path that could not be created, opened or written; None if no key holds this path."""
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
            return Problem(key, f"received {shown(value)}; cannot be created or used ({reason}); choose another path")
    return None
