"""The presets that ship with the package: lists them, prints one, or copies one to be changed.

Usage: `python -m configs.presets [list]`, `… print NAME`, `… copy NAME PATH`.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from configs import ConfigError, Problem, Section, run
from configs.yaml_files import preset_names, preset_text, unknown_preset


@dataclass(kw_only=True)
class PresetsConfig(Section):
    """Lists, prints or copies the presets that ship with the package.

    action: "list" all presets with the first line of each, "print" one, or "copy" one to change it
    name: a preset, such as own/cpu/stage1, or a folder of presets, such as own/cpu
    path: of the copy: a file for one preset, a folder for a folder of presets; nothing is overwritten

    The names of the keys may be left out: `copy own/cpu mine`.
    """

    words = "[list | print NAME | copy NAME PATH]"  # the arguments without keys, in the usage

    action: Literal["list", "print", "copy"] = "list"
    name: str | None = None
    path: str | None = None

    def problems(self) -> Iterable[tuple[str, Any, str]]:
        if self.action != "list" and self.name is None:
            yield "name", self.name, f"name the preset to {self.action}, such as own/cpu/stage1"
        if self.action == "copy" and self.path is None:
            yield "path", self.path, "name the file or folder of the copy"


def main(config: PresetsConfig) -> None:
    """Does what `action` says.

    Raises:
        ConfigError: there is no such preset, or a file of the copy exists.
    """
    if config.action == "list":
        print("\n".join(listing()))
        return
    names = presets_called(str(config.name))
    if config.action == "print":
        print("\n".join(preset_text(name) for name in names), end="")
        return
    for path in copied(names, Path(str(config.path))):
        print(path)


def listing() -> list[str]:
    """A line for each preset: its name, and the first line of its header."""
    width = max(map(len, preset_names()))
    return [f"{name:{width}}  {summary(name)}" for name in preset_names()]


def summary(name: str) -> str:
    """The first line of the header of a preset."""
    return preset_text(name).partition("\n")[0].removeprefix("# ")


def presets_called(name: str) -> list[str]:
    """The preset of this name, or all presets in the folder of this name.

    Raises:
        ConfigError: there is none.
    """
    name = name.removeprefix("configs/").removesuffix(".yaml").rstrip("/")
    found = [each for each in preset_names() if each == name or each.startswith(f"{name}/")]
    if not found:
        raise ConfigError([Problem("name", unknown_preset(name, "no preset"))], "presets")
    return found


def copied(names: Sequence[str], target: Path) -> list[Path]:
    """Copies one preset to a file, or into a folder that exists. Several presets go into a folder.

    Raises:
        ConfigError: a file of the copy exists.
    """
    one_file = len(names) == 1 and not target.is_dir()
    paths = [target] if one_file else [target / f"{name.rpartition('/')[2]}.yaml" for name in names]
    if existing := [path for path in paths if path.exists()]:
        raise ConfigError([Problem("path", f"{existing[0]} exists, and nothing is overwritten; choose another path")])
    for name, path in zip(names, paths, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "x", encoding="utf-8") as file:
            file.write(preset_text(name))
    return paths


def with_keys(arguments: Sequence[str]) -> list[str]:
    """The arguments, with the keys of the first three if they have none."""
    words = next((count for count, each in enumerate(arguments) if each.startswith("-")), len(arguments))
    keys = ("action", "name", "path")[:words]
    named = [f"--{key}={json.dumps(word)}" for key, word in zip(keys, arguments, strict=False)]
    return [*named, *arguments[len(keys) :]]


if __name__ == "__main__":
    run(PresetsConfig, main, "python -m configs.presets", with_keys(sys.argv[1:]))
