"""The import rules of the architecture, checked in the syntax tree of every file."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ["configs", "stage1_vqgan", "stage2_prior", "pipelines", "tessella", "benchmarks"]  # lowest first
MODEL_FILES = ("configuration_", "modeling_", "quantizer", "image_processing_")
FORBIDDEN_IN_MODEL_FILES = {"accelerate", "datasets", *LAYERS}
FILES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imports(source, module, is_package=False, for_types=True):
    """`(module imported, name taken from it or None, level of a relative import)` for every import anywhere."""
    tree = ast.parse(source)
    if not for_types:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = []
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((target, alias.name, node.level) for alias in node.names)


def violations(source, module, is_package=False):
    """The import rules that a source breaks, in words."""
    layer, _, stem = module.rpartition(".")
    layer = layer.split(".")[0] or module
    is_model_file = layer == "stage1_vqgan" and stem.startswith(MODEL_FILES)
    found = []
    for target, name, level in imports(source, module, is_package):
        top, full = target.split(".")[0], f"{target}.{name}" if name else target
        imported = full if full in MODULES else target  # `from package import module` imports the module
        if top in LAYERS and LAYERS.index(top) > LAYERS.index(layer):
            found.append(f"{full} points up")
        if layer == "stage2_prior" and top == "stage1_vqgan" and (imported != top or name is None):
            found.append(f"{full} is not a package-level name")
        if top in LAYERS and imported.endswith(".train"):
            found.append(f"{full} is an entry point")
        if is_model_file and not level and top in FORBIDDEN_IN_MODEL_FILES:
            found.append(f"{full} in a model file")
        if is_model_file and level:
            folder, _, sibling = target.rpartition(".")
            if folder != module.rpartition(".")[0] or not sibling.startswith(MODEL_FILES):
                found.append(f"{full} is no flat sibling of a model file")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_keep_the_layers(module):
    path = MODULES[module]
    assert violations(path.read_text(), module, path.name == "__init__.py") == []


def test_every_layer_is_looked_at():
    assert {module.split(".")[0] for module in MODULES} == set(LAYERS)
    models = [module for module in MODULES if module.split(".")[-1].startswith(MODEL_FILES)]
    assert len(models) >= 4


@pytest.mark.parametrize(
    "module, source, word",
    [
        ("stage1_vqgan.data.dataset", "from stage2_prior import CodeStore", "points up"),
        ("configs.loader", "def f():\n    import pipelines.evaluate", "points up"),
        ("stage2_prior.data", "from stage1_vqgan.data.dataset import DataConfig", "package-level"),
        ("stage2_prior.data", "from stage1_vqgan import data", "package-level"),
        ("stage2_prior.data", "import stage1_vqgan.data", "package-level"),
        ("pipelines.build", "from stage1_vqgan.train import main", "entry point"),
        ("pipelines.build", "from stage2_prior import train", "entry point"),
        ("stage1_vqgan.modeling_x", "from accelerate import Accelerator", "in a model file"),
        ("stage1_vqgan.modeling_x", "import datasets", "in a model file"),
        ("stage1_vqgan.modeling_x", "from stage1_vqgan.quantizers import VectorQuantizer", "in a model file"),
        ("stage1_vqgan.modeling_x", "from .data import DataConfig", "flat sibling"),
        ("stage1_vqgan.modeling_x", "from .inner.quantizers import VectorQuantizer", "flat sibling"),
        ("stage1_vqgan.modeling_x", "from ..configs import Section", "flat sibling"),
    ],
)
def test_the_checker_catches(module, source, word):
    assert any(word in found for found in violations(source, module))


def test_the_checker_accepts_good_imports():
    assert violations("from stage1_vqgan import DataConfig\nfrom configs import run", "stage2_prior.data") == []
    assert violations("import torch\nfrom .quantizers import VectorQuantizer", "stage1_vqgan.modeling_x") == []
    assert violations("from stage1_vqgan.training.run import train", "stage1_vqgan.train") == []


def test_imports_have_no_cycle():
    graph = {}
    for module, path in MODULES.items():
        edges = graph.setdefault(module, set())
        for target, name, _ in imports(path.read_text(), module, path.name == "__init__.py", for_types=False):
            full = f"{target}.{name}"
            edges |= {full} if full in MODULES else {target} & MODULES.keys()
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)  # raises CycleError with the cycle


def test_importing_the_packages_loads_nothing_heavy():
    heavy = ["torch", "numpy", "transformers", "accelerate", "datasets", "lpips", "torchvision", "gradio", "PIL"]
    code = (
        f"import sys, tessella, pipelines, stage1_vqgan, stage2_prior; print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
