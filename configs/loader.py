"""YAML and overrides → the dataclass it is handed. All problems are reported at once, the nearest valid key named."""

import copy
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration: where, what was received, and what is allowed."""

    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.key else self.message


class YamlReader(yaml.SafeLoader):
    """YAML as people mean it: `1e-4` is a number, `no` and dates are text, only true and false are booleans."""


YamlReader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("timestamp", "bool")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
YamlReader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"true|True|false|False"), list("tTfF"))
YamlReader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


class ConfigError(ValueError):
    """Every problem of one configuration."""

    def __init__(self, problems: Sequence[Problem], source: str = "configuration"):
        self.problems = list(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        super().__init__("\n".join([f"{source}: {count}", *(f"  - {problem}" for problem in self.problems)]))


def preset_names() -> list[str]:
    """Short names of the presets that ship with the package, such as `digits/stage1`."""
    root = files("configs")
    return sorted(
        f"{folder.name}/{Path(entry.name).stem}"
        for folder in root.iterdir()
        if folder.is_dir()
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    )


def read_yaml(name: str) -> dict[str, Any]:
    """Reads a YAML file, or a preset by its short name or by its path in the repository.

    Raises:
        ConfigError: neither a file nor a preset has this name, or the file is not a YAML mapping.
    """
    path = Path(name)
    if path.is_file():
        text = path.read_text()
    else:
        preset = str(path.with_suffix("") if path.suffix in {".yaml", ".yml"} else path).removeprefix("configs/")
        if preset not in preset_names():
            nearest = difflib.get_close_matches(preset, preset_names(), n=1)
            hint = f"; did you mean the preset '{nearest[0]}'?" if nearest else ""
            known = ", ".join(preset_names())
            raise ConfigError([Problem("", f"no file and no preset is called '{name}'{hint} (presets: {known})")], name)
        text = files("configs").joinpath(f"{preset}.yaml").read_text()
    try:
        values = yaml.load(text, YamlReader)
    except yaml.YAMLError as error:
        raise ConfigError([Problem("", f"not valid YAML: {error}")], name) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            [Problem("", f"a mapping of keys to values is needed, this is a {type(values).__name__}")], name
        )
    return values


def merge(values: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Puts dotted `overrides` into nested `values` (changed in place and returned)."""
    for dotted, value in overrides.items():
        *parents, last = dotted.split(".")
        node = values
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                node[parent] = {}
            node = node[parent]
        node[last] = value
    return values


def unknown_key(key: str, allowed: Iterable[str]) -> str:
    """The message for a key that does not exist, with the nearest one that does."""
    allowed = sorted(allowed)
    nearest = difflib.get_close_matches(str(key), allowed, n=1)
    listed = ", ".join(allowed[:40]) + (", …" if len(allowed) > 40 else "")
    return "unknown key; " + (f"did you mean '{nearest[0]}'?" if nearest else f"allowed: {listed}")


def check(config: T, source: str = "configuration") -> T:
    """Validates a configuration object, types and cross-field rules, and returns a clean copy.

    Raises:
        ConfigError: with every problem found.
    """
    return build(type(config), to_dict(config), source)


def build(cls: type[T], values: Mapping[str, Any], source: str = "configuration") -> T:
    """Makes a `cls` of nested plain values.

    Raises:
        ConfigError: with every problem found.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        config = TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        problems = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            if item["type"] == "unexpected_keyword_argument":
                problems.append(Problem(key, unknown_key(str(item["loc"][-1]), _keys_at(cls, item["loc"][:-1]))))
            elif item["type"] == "missing":
                problems.append(Problem(key, "is required and was not given"))
            else:
                problems.append(Problem(key, f"received {item['input']!r}; {item['msg'][0].lower()}{item['msg'][1:]}"))
        raise ConfigError(problems, source) from None
    problems = [
        Problem(key, message if value is None else f"received {value!r}; {message}")
        for key, value, message in _cross_field_problems(config)
    ]
    if problems:
        raise ConfigError(problems, source)
    return config


def load_config(cls: type[T], name: str | None = None, overrides: Mapping[str, Any] | None = None) -> T:
    """Loads a configuration from a YAML file or preset, with dotted overrides.

    Args:
        cls: the dataclass to make.
        name: path of a YAML file or short name of a preset; None starts from nothing.
        overrides: `{dotted key: value}`.

    Raises:
        ConfigError: with every problem found.
    """
    values = merge(read_yaml(name) if name else {}, copy.deepcopy(dict(overrides or {})))
    return build(cls, values, name or "command line")


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as nested plain values, as written to YAML: tuples become lists."""
    return _plain(asdict(config))


def save_config(config: Any, path: str | Path) -> None:
    """Writes the resolved configuration as YAML."""
    Path(path).write_text(yaml.safe_dump(to_dict(config), sort_keys=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _keys_at(cls: type, location: Sequence[Any]) -> list[str]:
    for part in location:
        cls = get_type_hints(cls)[part]
    return [field.name for field in fields(cls)]  # type: ignore[arg-type]


def _cross_field_problems(config: Any, prefix: str = "") -> Iterable[tuple[str, Any, str]]:
    if hasattr(config, "problems"):
        for key, value, message in config.problems():
            yield f"{prefix}{key}", value, message
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from _cross_field_problems(value, f"{prefix}{field.name}.")
