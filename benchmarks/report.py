"""Tables and files of results."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as lines of aligned columns; words are aligned at their left, numbers at their right."""
    columns = list(rows[0])
    cells = [columns, *([str(row[column]) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    words = [all(isinstance(row[column], str) and not row[column][:1].isdigit() for row in rows) for column in columns]
    aligned = [
        "  ".join(cell.ljust(width) if is_words else cell.rjust(width) for cell, width, is_words in parts)
        for parts in (zip(line, widths, words, strict=True) for line in cells)
    ]
    return "\n".join(line.rstrip() for line in aligned)


def write(path: str | Path, result: Mapping[str, Any]) -> None:
    """Saves a result as JSON."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {path}", flush=True)
