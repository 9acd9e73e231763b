"""YAML files and presets → plain values."""

import difflib
import re
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from configs.problems import ConfigError, Problem, shown

# Messages of the YAML parser, and their cause in plain words.
PLAIN_REASONS = {
    "'\\t'": "a tab; YAML is indented by spaces",
    "<stream end>": "it ends before a bracket or quote is closed",
    "end of stream": "it ends before a bracket or quote is closed",
    "could not determine a constructor": "a tag (a word after '!'); tags are not allowed",
    "mapping values are not allowed": "a second ':' in a line, or a key at the wrong depth; quote text that holds ': '",
    "could not find expected ':'": "a line without ': ', or one at the wrong depth",
}


class YamlReader(yaml.SafeLoader):
    """YAML in which `1e-4` is a number, `no` and dates are text, and only true and false are booleans.

    `repeated` collects a problem for each key that is given twice.
    """

    def __init__(self, text: str):
        super().__init__(text)
        self.repeated: list[Problem] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                message = f"is given twice, in line {lines[key.value]} and in line {line}; leave one out"
                self.repeated.append(Problem(key.value, message))
            elif isinstance(key, yaml.ScalarNode):
                lines[key.value] = line
        return super().construct_mapping(node, deep)


YamlReader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("timestamp", "bool")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
YamlReader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"true|True|false|False"), list("tTfF"))
YamlReader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def preset_names() -> list[str]:
    """Short names of the presets that ship with the package, such as `digits/stage1`."""
    root = files("configs")
    return sorted(
        f"{folder.name}/{Path(entry.name).stem}"
        for folder in root.iterdir()
        if folder.is_dir() and folder.name != "accelerate"  # It holds settings of accelerate.
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    )


def parse_yaml(text: str) -> tuple[Any, list[Problem]]:
    """Reads a YAML text.

    Returns:
        The value, and a problem for each key that is given twice.

    Raises:
        ValueError: the text is not valid YAML; the message says where.
    """
    try:
        reader = YamlReader(text)
        return reader.get_single_data(), reader.repeated
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark and "\n" in text else ""
        reason = str(error.problem or error.context)
        for words, plain in PLAIN_REASONS.items():
            if words in reason:
                reason = plain
        raise ValueError(f"{where}{reason}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"line {line}: a control character; YAML holds text only") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_yaml(name: str) -> tuple[dict[str, Any], list[Problem]]:
    """Reads a YAML file, or a preset by its short name or by its path in the repository.

    Returns:
        The values, and a problem for each key that is given twice.

    Raises:
        ConfigError: neither a file nor a preset has this name, or the file is not a YAML mapping.
    """
    try:
        text = _read_text(name)
    except UnicodeDecodeError:
        raise ConfigError([Problem("", "is not a text file; a YAML file is needed")], name) from None
    except OSError as error:
        raise ConfigError([Problem("", f"cannot be read: {error.strerror}")], name) from None
    try:
        values, problems = parse_yaml(text)
    except ValueError as error:
        raise ConfigError([Problem("", f"not valid YAML: {error}")], name) from None
    if values is None:
        return {}, problems
    if not isinstance(values, dict):
        kind = "a list" if isinstance(values, list) else shown(values)
        raise ConfigError([Problem("", f"holds {kind}; needed are lines of 'key: value'")], name)
    return values, problems


def _read_text(name: str) -> str:
    path = Path(name)
    preset = str(path.with_suffix("") if path.suffix in {".yaml", ".yml"} else path).removeprefix("configs/")
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if preset in preset_names():
        return files("configs").joinpath(f"{preset}.yaml").read_text()
    by_folder = groupby(preset_names(), lambda preset: preset.partition("/")[0])
    known = ", ".join(f"{folder}/{{{','.join(Path(preset).name for preset in found)}}}" for folder, found in by_folder)
    if path.is_dir():
        raise ConfigError([Problem("", f"is a folder; give a YAML file or a preset ({known})")], name)
    nearest = difflib.get_close_matches(preset, preset_names(), n=1)
    hint = f"; did you mean the preset '{nearest[0]}'?" if nearest else f" (presets: {known})"
    raise ConfigError([Problem("", f"no file and no preset is called '{name}'{hint}")], name)
