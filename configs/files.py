"""Atomic writes: a file is complete or absent, because it is written under another name and then renamed."""

import json
from pathlib import Path
from typing import Any


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file atomically: until the new file is complete, an older one of the same name stays."""
    partial = Path(path).with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def write_json(path: str | Path, values: dict[str, Any]) -> None:
    """Writes a JSON file atomically."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """Reads a file that holds a JSON object.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file holds something else.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: this file is not JSON ({error}); download or save it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: received a {type(values).__name__}; the file must hold a JSON object")
    return values
