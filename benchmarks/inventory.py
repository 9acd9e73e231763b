"""What a machine has for the benchmarks: the cards, the versions, a compiler; and what is missing."""

import os
import platform
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]

# What wheels.txt leaves out: torch, transformers and what they require, and packages that are large.
ASSUMED = {
    *("torch", "torchvision", "transformers", "filelock", "huggingface_hub", "jinja2", "numpy", "pillow", "pyyaml"),
    *("safetensors", "tqdm", "pyarrow", "scikit-learn", "scipy", "tensorboard"),
}

# Triton and torch.compile call the first of these.
COMPILERS = "gcc", "clang", "cc"


class Package(NamedTuple):
    """A requirement, whether the package itself has it, and the installed version; None if it is not installed."""

    requirement: Requirement
    is_needed: bool
    version: str | None

    @property
    def is_other(self) -> bool:
        """Whether another version is installed than is asked for."""
        return self.version is not None and not self.requirement.specifier.contains(self.version, prereleases=True)


def inventory() -> tuple[dict[str, Any], list[str]]:
    """What the machine has, by name; and what is missing, a line each. Other versions are named, and not missing."""
    known = list(packages())
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    facts, imports = (
        torch_facts(),
        {name: imported(name) for name in ("tessella", "benchmarks.run", "benchmarks.recipes")},
    )
    missing = [str(one.requirement) for one in known if one.version is None and one.is_needed]
    missing += [f"{name}: {reason}" for name, reason in imports.items() if reason]
    missing += [] if compiler else [f"a compiler, one of {', '.join(COMPILERS)}"]
    missing += [] if facts.get("cards") else ["a card that torch finds"]
    found = {
        "python": f"{platform.python_version()}, {os.cpu_count()} cores",
        "driver": printed("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"),
        "compiler": compiler,
        "torch": facts,
        "versions": {one.requirement.name: one.version for one in known if one.version is not None},
        "other versions": [
            f"{one.requirement.name} {one.version}, asked for {one.requirement}" for one in known if one.is_other
        ],
        "optional, missing": [str(one.requirement) for one in known if one.version is None and not one.is_needed],
    }
    return found, missing


def packages() -> Iterator[Package]:
    """The requirements of the package and of wheels.txt."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    carried = [
        line for line in (ROOT / "benchmarks" / "wheels.txt").read_text().splitlines() if line[:1] not in ("", "#")
    ]
    needed = {Requirement(line).name for line in project}
    for name, requirement in {one.name: one for one in map(Requirement, carried + project)}.items():
        try:
            version: str | None = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = None
        yield Package(requirement, name in needed, version)


def torch_facts() -> dict[str, Any]:
    """What torch says about itself and the cards, or the reason why it cannot be imported."""
    if reason := imported("torch"):
        return {"error": reason}
    import torch

    cards = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "cards": [f"{card.name}, {card.total_memory / 2**30:.0f} GiB, sm_{card.major}{card.minor}" for card in cards],
    }


def imported(module: str) -> str:
    """Imports a module; returns the reason why this fails, or ""."""
    try:
        import_module(module)
    except Exception as error:  # a module of another version can raise any exception
        return f"{type(error).__name__}: {error}"
    return ""


def printed(*command: str) -> str:
    """What a command prints, or why it does not run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (done.stdout or done.stderr).strip()
