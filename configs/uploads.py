"""What an upload holds: the files of a model and no others, no local paths, no secrets."""

import os
import re
import shutil
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml

from configs.checksums import verify_checksums
from configs.files import write_text
from configs.secrets import SECRETS

# What a run leaves besides its model. A list of what is uploaded, because a user may put anything into the folder.
RUN_FILES = ("config.yaml", "train_results.json", "token_layout.json", "discriminator.safetensors")
MODEL_FILES = (
    "checksums.json",
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "adapter_config.json",
    "adapter_model.safetensors",
    "README.md",
    "configuration_*.py",
    "image_processing_*.py",
    "modeling_*.py",
    "quantizer*.py",
)

# A path begins with / or ~ or a drive, or has a / inside. These may have one too:
ADDRESS = re.compile(r"(?!file:)[a-z][a-z0-9+.-]+://", re.IGNORECASE)
REPO_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


def copy_run(source: Path, target: Path) -> None:
    """Copies the files of a run that are uploaded: the model, its settings and its results.

    Raises:
        Damaged: a file of the model has changed since it was saved.
    """
    verify_checksums(source)
    copy_files(source, target, RUN_FILES + MODEL_FILES)


def copy_files(source: Path, target: Path, patterns: Iterable[str]) -> None:
    """Copies the files directly in `source` whose names match one of the patterns. YAML files lose their local paths.

    Raises:
        ValueError: a file is a symbolic link, which may lead anywhere.
    """
    for path in sorted(source.iterdir()):
        if path.is_dir() or not any(fnmatch(path.name, pattern) for pattern in patterns):
            continue
        if path.is_symlink():
            raise ValueError(f"{path}: this file is a symbolic link; replace it by the file that it leads to")
        if path.suffix == ".yaml":
            values = without_paths(yaml.safe_load(path.read_text(encoding="utf-8")))
            write_text(target / path.name, yaml.safe_dump(values, sort_keys=False))
        else:
            shutil.copyfile(path, target / path.name)


def without_paths(value: Any) -> Any:
    """A copy of nested settings in which only the last component of each local path is left."""
    if isinstance(value, dict):
        return {key: without_paths(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_paths(entry) for entry in value]
    return public_name(value) if isinstance(value, str) else value


def public_name(text: str) -> str:
    """The last component of a local path. Hub ids, addresses and text without a path stay as they are.

    An `owner/name` is a local path if it exists here. The home folder becomes `~`.
    """
    is_path = "/" in text or re.match(r"~|[a-z]:\\|\\\\", text, re.IGNORECASE)
    if not is_path or ADDRESS.match(text) or (REPO_ID.fullmatch(text) and not os.path.exists(text)):
        return text
    name = PureWindowsPath(text).name  # splits at / and at \
    is_home = name.startswith("~") or os.path.abspath(text) == os.path.expanduser("~")
    return "~" if is_home else name


def public_dataset(name: str) -> dict[str, Any]:
    """What a card says of a data set: its public name, and whether this is its id on the Hub."""
    return {"data": public_name(name) or None, "on_hub": bool(REPO_ID.fullmatch(name)) and public_name(name) == name}


def check_upload(folder: str | Path, token: str | bool | None = None) -> None:
    """Refuses a folder to upload whose text files hold a secret or the path of the home folder.

    Args:
        folder: everything in it will be uploaded.
        token: token of the upload; by default that of the login.

    Raises:
        ValueError: names the file and the line, but not the secret.
    """
    from huggingface_hub import get_token

    searched = dict(SECRETS)
    token = token if isinstance(token, str) else get_token()
    if token:
        searched["your token"] = re.compile(re.escape(token))
    home = os.path.expanduser("~")  # "~" if it is unknown
    if len(Path(home).parts) > 1:
        searched["the path of your home folder"] = re.compile(rf"{re.escape(home)}(?![\w.-])")
    for path in sorted(Path(folder).rglob("*"), key=lambda path: (len(path.parts), path)):
        if path.is_file() and path.suffix != ".safetensors":
            text = path.read_text(encoding="utf-8", errors="replace")
            for number, line in enumerate(text.splitlines(), 1):
                _check_line(line, f"{path.relative_to(folder).as_posix()}: line {number}", searched)


def _check_line(line: str, where: str, searched: dict[str, re.Pattern[str]]) -> None:
    for what, pattern in searched.items():
        if pattern.search(line):
            key = re.match(r'\s*"?(\w+)"?\s*:', line)
            named = f" ({key[1]})" if key and not pattern.search(key[1]) else ""
            raise ValueError(f"{where}{named}: holds {what}; remove it, then upload again")
