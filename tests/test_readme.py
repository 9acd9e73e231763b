"""The documentation: its Python runs; commands, presets, keys, options, links and files that it names exist."""

import ast
import re
import shlex
import sys
import tomllib
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import pytest
from transformers import LlamaConfig, TrainingArguments

from configs import load_config, parse_arguments
from configs.loader import key_of
from configs.yaml_files import preset_names, preset_of
from pipelines import VQGANPipeline
from pipelines.app import AppConfig
from pipelines.build import BuildConfig
from pipelines.clip_guidance import CLIPGuidanceConfig
from pipelines.evaluate import EvaluationConfig
from pipelines.generate import GenerateConfig
from pipelines.push import PushConfig
from pipelines.reconstruct import ReconstructConfig
from pipelines.score import ScoreConfig
from pipelines.tune import TuneConfig
from stage1_vqgan import Stage1Config, VQGANConfig, VQGANImageProcessor, VQGANModel
from stage1_vqgan.convert.config import ConvertConfig
from stage1_vqgan.data.__main__ import DataReportConfig
from stage1_vqgan.evaluate import ReconstructionConfig
from stage1_vqgan.features.config import FeaturesConfig
from stage1_vqgan.quantizers import QUANTIZERS
from stage2_prior import Stage2Config, TokenLayout
from stage2_prior.convert.config import ConvertConfig as PriorConvertConfig
from stage2_prior.prior import build_prior
from tessella.commands import BY_NAME
from tessella.config import RunConfig

ROOT = Path(__file__).parents[1]
PACKAGES = ["configs", "stage1_vqgan", "stage2_prior", "pipelines", "tessella", "benchmarks"]
MAPPED_FOLDERS = [*PACKAGES, "pipelines/evaluation", "pipelines/tuning"]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "configs/accelerate/README.md",
    *(f"{folder}/README.md" for folder in MAPPED_FOLDERS),
]
CONFIGS = {
    "stage1_vqgan.convert": ConvertConfig,
    "stage1_vqgan.data": DataReportConfig,
    "stage1_vqgan.evaluate": ReconstructionConfig,
    "stage1_vqgan.train": Stage1Config,
    "stage1_vqgan.train_features": FeaturesConfig,
    "stage2_prior.convert": PriorConvertConfig,
    "stage2_prior.tokenize": Stage2Config,
    "stage2_prior.train": Stage2Config,
    "pipelines.app": AppConfig,
    "pipelines.build": BuildConfig,
    "pipelines.clip_guidance": CLIPGuidanceConfig,
    "pipelines.evaluate": EvaluationConfig,
    "tessella.run": RunConfig,
    "pipelines.generate": GenerateConfig,
    "pipelines.reconstruct": ReconstructConfig,
    "pipelines.score": ScoreConfig,
    "pipelines.push": PushConfig,
    "pipelines.tune": TuneConfig,
}
# Sections whose keys are those of other classes.
FREE_SECTIONS = {
    "model": {field.name for kind in (VQGANConfig, LlamaConfig) for field in fields(kind)} | {"model_type"},
    "training_arguments": {field.name for field in fields(TrainingArguments)},
}


every_document = pytest.mark.parametrize("document", DOCUMENTS)


@cache
def text_of(document: str) -> str:
    return (ROOT / document).read_text()


class Block(NamedTuple):
    """A fenced block, and what the comment above it says: "not run: reason", for instance."""

    comment: str
    text: str


def blocks(document: str, language: str) -> list[Block]:
    pattern = rf"(?:<!-- (.*?) -->\s*)?^ *```{language}\n(.*?)^ *```"
    return [Block(*found) for found in re.findall(pattern, text_of(document), re.MULTILINE | re.DOTALL)]


def prose(document: str) -> str:
    """The text without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```", "", text_of(document), flags=re.MULTILINE | re.DOTALL)


def code_spans(document: str) -> list[str]:
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(document))]


def command_lines(document: str) -> list[list[str]]:
    """Words of every shell command in blocks and in the text, without comments."""
    in_blocks = "\n".join(block.text for block in blocks(document, "bash")).replace("\\\n", " ").splitlines()
    in_text = [
        span for span in code_spans(document) if re.match(r"(python|accelerate|tessella|make|pip|--)\b|--\w", span)
    ]
    return [words for line in in_blocks + in_text if (words := shlex.split(line, comments=True))]


def launched(document: str) -> list[tuple[str, list[str]]]:
    """Modules of ours that are launched, and their arguments."""
    by_module = [
        (word, words[place + 2 :])
        for words in command_lines(document)
        for place, (flag, word) in enumerate(pairwise(words))
        if flag == "-m" and word.partition(".")[0] in PACKAGES and word != "tessella"
    ]
    by_name = [
        (BY_NAME[name].module, words[place + 2 :])
        for words in command_lines(document)
        for place, (word, name) in enumerate(pairwise(words))
        if word == "tessella" and words[:place][-1:] in ([], ["-m"]) and name not in ("COMMAND", "--help")
    ]
    return by_module + by_name


def keys_of(section: type, prefix: str = "") -> set[str]:
    """All keys of a section and of those in it, with dots."""
    hints, keys = get_type_hints(section), set()
    for field in fields(section):
        key = prefix + key_of(field)
        keys |= {key, *(keys_of(hints[field.name], f"{key}.") if is_dataclass(hints[field.name]) else ())}
        keys |= {f"{key}.{name}" for name in FREE_SECTIONS.get(key, ())}
    return keys


ALL_KEYS = set().union(*map(keys_of, CONFIGS.values()))
SECTIONS = {key.partition(".")[0] for key in ALL_KEYS if "." in key}


def options_of(module: str) -> set[str]:
    """Options of a command that reads its arguments by argparse, or of our other commands their keys."""
    if module in CONFIGS:
        return keys_of(CONFIGS[module]) | {"help"}
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None, f"there is no module {module}"
    text = Path(spec.origin).read_text()
    shared = (
        ROOT / f"{name.replace('.', '/')}.py" for name in re.findall(r"^from (benchmarks\.\w+) import", text, re.M)
    )
    return set(re.findall(r'"--([\w-]+)"', text + "".join(path.read_text() for path in shared))) | {"help"}


@pytest.fixture
def runs(tmp_path, monkeypatch) -> None:
    """Enters a folder in which `make demo` might have run: it holds the demo's pipeline, untrained."""
    stage1, stage2 = (
        load_config(cls, f"digits/{name}") for cls, name in ((Stage1Config, "stage1"), (Stage2Config, "stage2"))
    )
    vqgan = VQGANModel(stage1.vqgan_config())
    names = tuple(str(digit) for digit in range(10))
    layout = TokenLayout(vqgan.config.num_embeddings, names, (4, 4), 4, vqgan.compute_fingerprint())
    prior, processor = build_prior(stage2.model, layout), VQGANImageProcessor(vqgan.config.image_size, 1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    # An earlier test may have imported modules from another cache, whose folder is then on the path.
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not Path(path, "transformers_modules").is_dir()])
    VQGANPipeline(vqgan, prior, processor, layout).save_pretrained("runs/digits/pipeline")


@pytest.mark.parametrize("document", [document for document in DOCUMENTS if blocks(document, "python")])
def test_python_blocks_run(document, runs):
    """A block that is marked as not run states a reason. Its imports run anyway."""
    names: dict[str, Any] = {"__name__": "readme"}
    for comment, text in blocks(document, "python"):
        tree = ast.parse(text)
        if comment.startswith("not run"):
            assert re.match(r"not run: \w.+", comment), f"{document}: a block is not run, and gives no reason"
            tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(tree, document, "exec"), names)


def test_the_front_page_runs_python_and_commands():
    assert [block for block in blocks("README.md", "python") if not block.comment.startswith("not run")]
    assert {"stage1_vqgan.data", "tessella.run", "pipelines.generate"} <= {
        module for module, _ in launched("README.md")
    }
    assert {"stage1_vqgan.train", "stage2_prior.tokenize", "stage2_prior.train", "pipelines.build"} <= {
        module for module, _ in launched("README.md")
    }


def test_the_front_page_is_short():
    assert len(text_of("README.md").splitlines()) <= 175


@every_document
def test_launched_modules_are_commands(document):
    for module, _ in launched(document):
        path = Path(str(import_module(module).__file__))
        is_command = path.name == "__init__.py" or "__main__" in path.read_text()
        assert is_command, f"{document}: {module} is no command"


@every_document
def test_launched_configurations_can_be_loaded(document):
    """CONFIG stands for a configuration of the reader's own."""
    for module, arguments in launched(document):
        if module not in CONFIGS:
            unknown = {word for word in arguments if word.startswith("--")} - {f"--{o}" for o in options_of(module)}
            assert not unknown, f"{document}: {module} has no {unknown}"
            continue
        name, overrides, problems = parse_arguments(
            [word for word in arguments if word != "--help"], CONFIGS[module].positional
        )
        assert not problems
        assert overrides.keys() <= keys_of(CONFIGS[module]), f"{document}: {module}"
        if name is not None and name != "CONFIG":
            preset = preset_of(CONFIGS[module].preset, name).removeprefix("configs/").removesuffix(".yaml")
            assert preset in preset_names(), f"{document}: {name}"
        if name != "CONFIG" and len(arguments) > 1 and "--help" not in arguments and "FOLDER" not in arguments:
            load_config(CONFIGS[module], name, overrides)


@every_document
def test_options_in_the_text_exist(document):
    """Of the commands of ours, and of those of others that the text names with them."""
    others = {"multi_gpu", "num_processes", "cpu", "config_file", "device", "dist", "mixed_precision"}
    known = ALL_KEYS | others | options_of("benchmarks.recipes") | options_of("benchmarks.run") | {"help"}
    spans = [span for span in code_spans(document) if span.startswith("--")]
    named = {word[2:].partition("=")[0] for span in spans for word in span.split() if word.startswith("--")}
    assert named <= known, f"{document}: {named - known}"


@every_document
def test_keys_in_the_text_exist(document):
    """Such as `loss.l1_weight`, also followed by a value."""
    spans = {span.split()[0] for span in code_spans(document)}
    dotted = {span for span in spans if re.fullmatch(rf"({'|'.join(SECTIONS)})(\.\w+)+", span)}
    dotted = {span for span in dotted if not span.endswith((".py", ".yaml", ".json", ".jsonl", ".safetensors"))}
    assert dotted <= ALL_KEYS, f"{document}: {dotted - ALL_KEYS}"


def table(document: str, *head: str) -> list[list[list[str]]]:
    """Code spans in the cells of the table with these names of columns, row by row."""
    lines = prose(document).splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(f"| {' | '.join(head)}"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([re.findall(r"`([^`]+)`", cell) for cell in line.strip("|").split(" | ")])
    return rows


def test_the_table_of_quantizers_is_complete():
    documented = {row[0][0]: row[2] for row in table("stage1_vqgan/README.md", "kind", "how")}
    assert documented == {name: [option.name for option in fields(kind.Options)] for name, kind in QUANTIZERS.items()}


def test_the_table_of_options_of_generate_is_complete():
    documented = [row[0][0] for row in table("pipelines/README.md", "argument")]
    assert documented == list(signature(VQGANPipeline.generate).parameters)[1:]


def test_the_table_of_options_of_from_pretrained_is_complete():
    documented = [name for row in table("pipelines/README.md", "option") for name in row[0]]
    assert sorted(documented) == sorted(list(signature(VQGANPipeline.from_pretrained).parameters)[1:])


def test_the_table_of_presets_is_complete():
    documented = [name for row in table("configs/README.md", "preset") for name in row[0]]
    assert sorted(documented) == sorted(preset_names())


@every_document
def test_tables_of_keys_name_keys_that_exist(document):
    heads = re.findall(r"^\| key \|.*$", prose(document), re.MULTILINE)
    for head in heads:
        named = {key.split()[0] for row in table(document, *head.strip("| ").split(" | ")) for key in row[0]}
        assert named <= ALL_KEYS, f"{document}: {named - ALL_KEYS}"


@every_document
def test_make_targets_and_extras_exist(document):
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = command_lines(document)
    named = {word for words in commands if words[0] == "make" for word in words[1:] if "=" not in word}
    assert named <= targets, f"{document}: {named - targets}"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = {extra for words in commands if words[0] == "pip" for extra in re.findall(r"\[([\w-]+)\]", words[-1])}
    assert asked <= extras.keys(), f"{document}: {asked - extras.keys()}"


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@every_document
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)]+)\)", prose(document)):
        if link.startswith("http"):
            continue
        path, _, place = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), f"{document}: {link}"
        assert target.resolve().is_relative_to(ROOT), f"{document}: {link} leaves the repository"
        if place:
            headings = re.findall(r"^#+ (.+)$", prose(str(target.resolve().relative_to(ROOT))), re.MULTILINE)
            assert place in map(anchor, headings), f"{document}: {link}"


@every_document
def test_files_in_the_text_exist(document):
    """A path starts at the root or in the folder of the document. Output files of runs are not checked."""
    folders = [ROOT, (ROOT / document).parent]
    ours = "|".join([*PACKAGES, "tests", "data", "training", "convert", "sampling"])
    for span in code_spans(document):
        if re.fullmatch(rf"[\w*]+\.py|({ours})/[\w./*]*", span) and not span.startswith("data/*"):
            assert any(list(folder.glob(span)) for folder in folders), f"{document}: {span}"


class Entry(NamedTuple):
    """A line of a map: its indentation, the names in it, and their description."""

    depth: int
    name: str
    words: str


def entries(text: str) -> list[Entry]:
    lines = [re.match(r"( *)(\S+)  +(\S.*)", line) for line in text.splitlines()]
    assert all(lines), "a line of a map has no name or no description"
    return [Entry(len(line[1]) // 2, line[2], line[3]) for line in lines if line]


def mapped(document: str) -> dict[Path, Entry]:
    """Files and folders that the map names."""
    (block,) = blocks(document, "text")
    found: dict[Path, Entry] = {}
    folder = start = (ROOT / document).parent
    for entry in entries(block.text):
        above = folder if entry.depth else start
        path = above / entry.name
        assert path not in found, f"{document}: the map names {entry.name} twice"
        found[path] = entry
        if not entry.depth:
            folder = path
    return found


MAPPED = [document for document in DOCUMENTS if blocks(document, "text")]


def test_every_package_has_a_map():
    assert set(MAPPED) == {"README.md", *(f"{folder}/README.md" for folder in MAPPED_FOLDERS)}


@pytest.mark.parametrize("document", MAPPED)
def test_maps_name_what_exists(document):
    wrong = [str(path.relative_to(ROOT)) for path in mapped(document) if not path.exists()]
    assert wrong == []
    assert [entry.name for path, entry in mapped(document).items() if path.is_dir() != entry.name.endswith("/")] == []


def rooms(folder: Path) -> set[Path]:
    """What a map of this folder must name: its Python files, and the folders that hold any or settings."""
    files = {path for path in folder.glob("*.py") if not path.name.startswith("__")}
    inside = (path for ending in ("py", "yaml") for path in folder.rglob(f"*/*.{ending}"))
    return files | {folder / path.relative_to(folder).parts[0] for path in inside}


@pytest.mark.parametrize("package", MAPPED_FOLDERS)
def test_maps_are_complete(package):
    """The map of a package names all that lies at its top; a folder is described by its line, or file by file."""
    found = mapped(f"{package}/README.md")
    opened = {path.parent for path, entry in found.items() if entry.depth}
    for folder in {ROOT / package, *opened}:
        listed = {path for path in found if path.parent == folder}
        assert listed == rooms(folder), f"{folder.name}: {sorted(p.name for p in listed ^ rooms(folder))}"


def test_the_front_page_maps_all_packages():
    found = {path for path, entry in mapped("README.md").items() if not entry.depth and path.is_dir()}
    assert found == {path.parent for path in ROOT.glob("*/__init__.py")}
