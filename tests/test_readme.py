"""The README: its Python runs, and the commands, presets, keys and make targets it names exist."""

import re
import shlex
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest

from configs import load_config, parse_arguments
from configs.yaml_files import preset_names
from pipelines import VQGANPipeline
from pipelines.build import BuildConfig
from pipelines.evaluate import EvaluationConfig
from stage1_vqgan import Stage1Config, VQGANImageProcessor, VQGANModel
from stage1_vqgan.convert.command import ConvertConfig
from stage2_prior import Stage2Config, TokenLayout
from stage2_prior.prior import build_prior

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CONFIGS = {
    "stage1_vqgan.convert": ConvertConfig,
    "stage1_vqgan.train": Stage1Config,
    "stage2_prior.tokenize": Stage2Config,
    "stage2_prior.train": Stage2Config,
    "pipelines.build": BuildConfig,
    "pipelines.evaluate": EvaluationConfig,
}


def blocks(language: str) -> list[str]:
    pattern = rf"(<!-- not run -->\s*)?^```{language}\n(.*?)^```"
    found = re.findall(pattern, README, re.MULTILINE | re.DOTALL)
    return [text for not_run, text in found if not (not_run and language == "python")]


def command_lines() -> list[list[str]]:
    """Words of every shell command, without comments and prompts."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line.removeprefix("$ "), comments=True))]


def launched() -> list[tuple[str, list[str]]]:
    """Modules of ours that are launched, and their arguments."""
    pattern = re.compile(r"(configs|stage1_vqgan|stage2_prior|pipelines|benchmarks)\.\w+")
    return [
        (word, words[place + 2 :])
        for words in command_lines()
        for place, (flag, word) in enumerate(pairwise(words))
        if flag == "-m" and pattern.fullmatch(word)
    ]


@pytest.fixture
def runs(tmp_path, monkeypatch) -> None:
    """Makes the current folder one in which `make demo` might have run: its pipeline, untrained."""
    stage1, stage2 = (
        load_config(cls, f"digits/{name}") for cls, name in ((Stage1Config, "stage1"), (Stage2Config, "stage2"))
    )
    vqgan = VQGANModel(stage1.vqgan_config())
    names = tuple(str(digit) for digit in range(10))
    layout = TokenLayout(vqgan.config.num_embeddings, names, (4, 4), 4, vqgan.compute_fingerprint())
    prior, processor = build_prior(stage2.model, layout), VQGANImageProcessor(vqgan.config.image_size, 1)
    monkeypatch.chdir(tmp_path)
    VQGANPipeline(vqgan, prior, processor, layout).save_pretrained("runs/digits/pipeline")


def test_python_blocks_run(runs, monkeypatch):
    monkeypatch.setattr("PIL.Image.Image.show", lambda image: None)  # tests open no windows
    names: dict = {"__name__": "readme"}
    assert blocks("python"), "the README shows no Python"
    for text in blocks("python"):
        exec(compile(text, "README.md", "exec"), names)


def test_launched_modules_can_be_imported():
    assert launched(), "the README launches nothing"
    for module, _ in launched():
        import_module(module)


def test_launched_configurations_can_be_loaded():
    for module, arguments in launched():
        if module in CONFIGS:
            name, overrides, problems = parse_arguments(arguments)
            assert not problems
            if name is not None and name.removeprefix("configs/").removesuffix(".yaml") not in preset_names():
                pytest.fail(f"README.md: {module} is launched with {name!r}, which is no preset")
            load_config(CONFIGS[module], name, overrides)


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {word for words in command_lines() if words[0] == "make" for word in words[1:] if "=" not in word}
    named |= set(re.findall(r"`make ([\w-]+)`", README))
    assert named, "the README names no make target"
    assert named <= targets


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith(("http", "#"))]
    assert [link for link in links if not (ROOT / link.partition("#")[0]).exists()] == []


def test_the_map_names_files_that_exist():
    folder, missing, lines = "", [], re.findall(r"^    ( *)([\w/]+(?:\.py)?)  +\S", README, re.MULTILINE)
    for indent, name in lines:
        folder = name if not indent else folder
        path = ROOT / name if not indent else ROOT / folder / name
        missing += [] if path.exists() else [str(path.relative_to(ROOT))]
    assert lines, "the README has no map of the code"
    assert missing == []
