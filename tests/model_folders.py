"""Damages the folder of a saved model, for tests that loading refuses it."""

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.checksums import CHECKSUMS_NAME

Weights = dict[str, Tensor]

PLANTED = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({mark!r}).touch()

class Planted(LlamaConfig):
    model_type = "planted"

class PlantedModel(LlamaForCausalLM):
    config_class = Planted
"""


def without_checksums(folder: Path) -> Path:
    """Removes checksums.json from a folder, its parent and its subfolders, as a stranger would. Returns the folder."""
    for path in [*folder.rglob(CHECKSUMS_NAME), folder.parent / CHECKSUMS_NAME]:
        path.unlink(missing_ok=True)
    return folder


def change_config(folder: Path, name: str = "config.json", **changes: object) -> None:
    """Changes fields of a JSON file."""
    path = without_checksums(folder) / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder: Path, change: Callable[[Weights], Weights]) -> None:
    """Changes the weights of a model."""
    weights = load_file(without_checksums(folder) / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


def without(part: str) -> Callable[[Weights], Weights]:
    """A change that removes all weights whose names contain `part`."""
    return lambda weights: {name: weight for name, weight in weights.items() if part not in name}


def plant_code(folder: Path, mark: Path) -> None:
    """Adds a Python file that touches `mark` when it runs, and names it in the config.json of a llama."""
    (folder / "planted.py").write_text(PLANTED.format(mark=str(mark)))
    names = {"AutoConfig": "planted.Planted", "AutoModelForCausalLM": "planted.PlantedModel"}
    change_config(folder, model_type="planted", auto_map=names, architectures=["PlantedModel"])
