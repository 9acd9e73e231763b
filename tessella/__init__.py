"""Trains image generators in two stages, and uses them. Command line: `tessella --help`."""

import ast
from pathlib import Path
from typing import Any

from stage1_vqgan import import_own

__version__ = "0.1.0"

# __init__.pyi lists the public names and their packages. Python imports each one on first use, so `import tessella` is
# fast.
_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_PACKAGES = {
    alias.name: str(line.module) for line in _STUB.body if isinstance(line, ast.ImportFrom) for alias in line.names
}
__all__ = sorted(["__version__", *_PACKAGES])


def __getattr__(name: str) -> Any:
    if name not in _PACKAGES:
        raise AttributeError(f"module 'tessella' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = globals()[name] = getattr(import_own(_PACKAGES[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
