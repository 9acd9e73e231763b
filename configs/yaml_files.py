"""YAML files and presets → plain values, and back.

The reader bounds its time and memory: by the length of the text, and by the number of values with every alias written
out. It refuses a text before it builds any of its values.
"""

import re
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from configs.problems import ConfigError, Problem, did_you_mean, nearest, shown

# Far above any configuration: the longest preset has 2,000 characters and 60 values.
MOST_CHARACTERS = 100_000
MOST_VALUES = 10_000
DEEPEST = 20  # levels of sections and lists

# Messages of the YAML parser, and their cause in plain words.
PLAIN_REASONS = {
    "'\\t'": "a tab; YAML is indented by spaces",
    "<stream end>": "it ends before a bracket or quote is closed",
    "end of stream": "it ends before a bracket or quote is closed",
    "mapping values are not allowed": "a second ':' in a line, or a key at the wrong depth; quote text that holds ': '",
    "could not find expected ':'": "a line without ': ', or one at the wrong depth",
    "could not determine a constructor": "'<<' in place of a value; quote it",
    "found another document": "'---' starts a second document; only one is read",
}

# What is not text: a pattern, and the letters with which it begins.
TAG = "tag:yaml.org,2002:"
FLOAT = r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
PATTERNS = {
    "int": (r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    "float": (FLOAT, "-+.0123456789"),
    "bool": (r"true|True|false|False", "tTfF"),
    "null": (r"~|null|Null|NULL|", ("~", "n", "N", "")),
    "merge": (r"<<", "<"),
}


class YamlReader(yaml.SafeLoader):
    """YAML in which `1e-4` is a number, only true and false are booleans, and keys are text.

    Dates, `no`, `010` and `1:30` are text: YAML 1.1 would read a boolean, an octal number and a number of base 60.
    `repeated` collects a problem for each key that is given twice.
    """

    def __init__(self, text: str):
        super().__init__(text)
        self.repeated: list[Problem] = []
        self._values = self._level = 0
        self._sizes: dict[Any, int] = {}

    def fetch_tag(self) -> None:
        raise refused("a tag (a word after '!'); tags are not allowed", self.get_mark())

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Composes a value, and counts it and the values in it; an alias counts as much as its value."""
        before, mark, is_alias = self._values, self.peek_event().start_mark, self.check_event(yaml.AliasEvent)
        self._values += 1
        self._level += 1
        if self._level > DEEPEST:
            raise refused("it is nested too deeply", mark)
        node = super().compose_node(parent, index)
        self._level -= 1
        if is_alias and node not in self._sizes:
            raise refused("an alias inside of the value that it repeats", mark)
        if is_alias:
            self._values += self._sizes[node]
        else:
            self._sizes[node] = self._values - before
        if self._values > MOST_VALUES:
            raise refused(f"more than {MOST_VALUES:,} values, if every alias is written out", mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag not in (f"{TAG}str", f"{TAG}merge"):
                received = (
                    f"the key {key.value[:20] or 'null'}"
                    if isinstance(key, yaml.ScalarNode)
                    else "a list or section as key"
                )
                raise refused(f"{received}; keys must be words", key.start_mark)
            line = key.start_mark.line + 1
            if key.value in lines:
                message = f"is given twice, in line {lines[key.value]} and in line {line}; leave one out"
                self.repeated.append(Problem(key.value, message))
            lines.setdefault(key.value, line)
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        try:
            return int(node.value)
        except ValueError:  # Python reads at most 4,300 digits
            raise refused(f"a number of {len(node.value):,} digits", node.start_mark) from None


class YamlWriter(yaml.SafeDumper):
    """Writes text in quotes if a reader of YAML 1.1 or `YamlReader` would take it for a number or the like."""


def refused(reason: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    """The error that stops the reader at a place."""
    return yaml.MarkedYAMLError(problem=reason, problem_mark=mark)


YamlReader.yaml_implicit_resolvers = {}
for _name, (_pattern, _first) in PATTERNS.items():
    YamlReader.add_implicit_resolver(f"{TAG}{_name}", re.compile(rf"(?:{_pattern})\Z"), list(_first))
YamlReader.add_constructor(f"{TAG}int", YamlReader.construct_yaml_int)
YamlWriter.add_implicit_resolver(f"{TAG}float", re.compile(rf"(?:{FLOAT})\Z"), list(PATTERNS["float"][1]))


@cache
def preset_names() -> list[str]:
    """Short names of the presets that ship with the package, such as `digits/stage1`."""
    folders = (entry for entry in files("configs").iterdir() if entry.is_dir())
    return sorted(name for folder in folders if folder.name != "accelerate" for name in _presets_in(folder))


def _presets_in(folder: Any) -> Iterator[str]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from (f"{folder.name}/{name}" for name in _presets_in(entry))
        elif entry.name.endswith(".yaml"):
            yield f"{folder.name}/{entry.name.removesuffix('.yaml')}"


def preset_text(name: str) -> str:
    """The YAML of a preset."""
    return files("configs").joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def preset_of(kind: str, name: str) -> str:
    """`own/cpu/stage1` for the kind "stage1" and the name `own/cpu`, if there is this preset; else the name itself."""
    preset = f"{name.removeprefix('configs/').rstrip('/')}/{kind}"
    return preset if preset in preset_names() and not Path(name).is_file() else name


def parse_yaml(text: str) -> tuple[Any, list[Problem]]:
    """Reads a YAML text.

    Returns:
        The value, and a problem for each key that is given twice.

    Raises:
        ValueError: the text is too long or not valid YAML; the message says where.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"it has more than {MOST_CHARACTERS:,} characters")
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
        raise ValueError(f"line {line}: a control character, or a byte that is not UTF-8") from None


def to_yaml(values: Any, **options: Any) -> str:
    """Writes plain values as YAML; `options` are those of `yaml.dump`."""
    return yaml.dump(values, Dumper=YamlWriter, sort_keys=False, **options)


def as_code(values: Any) -> str:
    """Plain values as a block of YAML in Markdown, which TensorBoard shows as text."""
    return f"```yaml\n{to_yaml(values)}```"


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
        with open(path, encoding="utf-8") as file:
            return file.read(MOST_CHARACTERS + 1)
    if preset in preset_names():
        return preset_text(preset)
    if path.is_dir():
        images = "images are a value of --data.dataset (--data of `tessella run`)"
        advice = f"{images}; a CONFIG is a YAML file, or a preset: {_all_presets()}"
        raise ConfigError([Problem("", f"is a folder; {advice}")], name)
    raise ConfigError([Problem("", unknown_preset(name, "no file and no preset"))], name)


def unknown_preset(name: str, what: str) -> str:
    """The message for an unknown name: the nearest preset, or all of them. `what` says what nothing is called so."""
    preset = name.removeprefix("configs/").removesuffix(".yaml").removesuffix(".yml")
    folders = {known.rpartition("/")[0] for known in preset_names()}
    if inside := [known for known in preset_names() if known.startswith(f"{preset.rstrip('/')}/")]:
        return f"{shown(name)} is a folder of presets; this command needs one of them: {', '.join(inside)}"
    if "=" in name:
        return f"{shown(name)} is no CONFIG; a key begins with two dashes: --{name.lstrip('-')}"
    hint = did_you_mean(nearest(preset, [*preset_names(), *folders]), "the preset ")
    return f"{what} is called {shown(name)}{hint or f' (presets: {_all_presets()})'}"


def _all_presets() -> str:
    """The folders of presets, each of which stands for the preset of the command; not the folders within them."""
    folders = dict.fromkeys(name.rpartition("/")[0] for name in preset_names())
    return ", ".join(folder for folder in folders if folder.rpartition("/")[0] not in folders)
