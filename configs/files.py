"""Files that are whole or not there: written beside and renamed."""

import json
from pathlib import Path
from typing import Any


def write_text(path: str | Path, text: str) -> None:
    """Writes a file; until it is complete, one of this name that was there before stays as it is."""
    partial = Path(path).with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def write_json(path: str | Path, values: dict[str, Any]) -> None:
    """Writes a file of JSON, as `write_text`."""
    write_text(path, json.dumps(values, indent=2) + "\n")
