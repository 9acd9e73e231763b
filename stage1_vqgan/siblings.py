"""The packages of this project import each other, but a folder or file of the user may have one of their names.

`python -m` and `accelerate launch -m` look for packages in the current folder first. If a `configs` or a `pipelines.py`
lies there, `import configs` would run it. So each package imports those that it needs by `import_own` before all else.
"""

import os
import sys
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


def import_own(name: str) -> ModuleType:
    """Imports the package `name` that lies beside this one. Later imports of this name then find it too.

    Raises:
        ImportError: another module has been imported under this name.
    """
    module, spec = sys.modules.get(name), PathFinder.find_spec(name, [str(ROOT)])
    if spec is None or spec.loader is None:
        return import_module(name)
    if module is None:
        sys.modules[name] = module = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            sys.modules.pop(name, None)
            raise
    elif not _same_file(module.__file__, spec.origin):
        found = module.__file__ or next(iter(module.__path__))
        raise ImportError(f"{found} has the name of a package of tessella, `{name}`; rename it", name=name)
    return module


def _same_file(first: str | None, second: str | None) -> bool:
    return first is not None and second is not None and os.path.realpath(first) == os.path.realpath(second)
