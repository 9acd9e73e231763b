"""The command `tessella`: its table, its answers without a command, its public names, and folders that share names."""

import ast
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import tessella
from tessella.commands import COMMANDS, Command
from tests.test_cli import HEAVY

HEAVY_ONES = f"print([name for name in {HEAVY} if name in sys.modules])"


def python(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True)


def ask(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Starts `tessella`; the last line of the output lists the heavy modules that it has imported."""
    code = f"import atexit, sys\natexit.register(lambda: {HEAVY_ONES})\nfrom tessella.commands import main\nmain()"
    return python("-c", code, *arguments, folder=folder)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_is_a_module_that_starts(command: Command):
    spec = find_spec(command.module)
    assert spec is not None, f"there is no module {command.module}"
    if spec.submodule_search_locations is not None:
        spec = find_spec(f"{command.module}.__main__")
        assert spec is not None, f"{command.module} is a package without __main__.py"
    assert 'if __name__ == "__main__":' in Path(str(spec.origin)).read_text()


def test_help_lists_the_commands(tmp_path):
    done = ask(tmp_path, "--help")
    *lines, heavy = done.stdout.splitlines()
    assert done.returncode == 0 and heavy == "[]"
    assert [line.split()[0] for line in lines if line.startswith("  ")] == [command.name for command in COMMANDS]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: tessella COMMAND"),
        (
            ["trian"],
            "there is no command 'trian'; did you mean 'train-tokenizer' or 'train-features' or 'train-prior'?",
        ),
        (["stage2_prior.train"], "did you mean 'train-prior'?"),
        (["zzz"], "there is no command 'zzz'; commands: run, data, train-tokenizer"),
        pytest.param(["train-tokenizer"], "usage: tessella train-tokenizer [CONFIG]", marks=pytest.mark.slow),
        (["train-tokenizer"], "digits/stage1"),
        pytest.param(["build"], "Give a CONFIG, or at least tokenizer, prior, output_dir.", marks=pytest.mark.slow),
        (["run", "--dta", "x"], "did you mean 'data'?"),
    ],
)
def test_what_is_missing_or_wrong_is_said(arguments, message, tmp_path):
    done = ask(tmp_path, *arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == "[]\n"


def test_the_version_is_told(tmp_path):
    assert ask(tmp_path, "--version").stdout == f"tessella {tessella.__version__}\n[]\n"


def test_all_public_names_are_listed_and_found():
    stub = ast.parse(Path(tessella.__file__).with_suffix(".pyi").read_text())
    homes = {alias.name: line.module for line in stub.body if isinstance(line, ast.ImportFrom) for alias in line.names}
    assert dir(tessella) == sorted([*homes, "__version__"]) and len(homes) > 10
    for name, home in homes.items():
        assert getattr(tessella, name) is getattr(import_module(str(home)), name)
    with pytest.raises(AttributeError, match=r"has no attribute 'VQGAN'; it has .*VQGANPipeline"):
        tessella.VQGAN  # noqa: B018


@pytest.fixture
def crowded(tmp_path) -> Path:
    """A folder with the names of packages of ours, each of which ends Python when it is imported."""
    for name in ("configs", "tests", "own"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('a module of the user was run')")
    (tmp_path / "pipelines.py").write_text("raise SystemExit('a module of the user was run')")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["-m", "tessella", "evaluate", "--help"], "usage: tessella evaluate [CONFIG]"),
        pytest.param(
            ["-m", "stage1_vqgan.train", "--help"],
            "usage: accelerate launch -m stage1_vqgan.train [CONFIG]",
            marks=pytest.mark.slow,
        ),
        (["-m", "stage2_prior.tokenize", "--help"], "usage: accelerate launch -m stage2_prior.tokenize [CONFIG]"),
        (["-c", "import tessella; print(tessella.DataConfig, tessella.Stage2Config)"], "stage1_vqgan.data.config"),
        (["-c", "import stage2_prior, configs.loader; print(configs.loader.build)"], "function build"),
        (["-c", "from stage1_vqgan import import_own; print(import_own('pipelines').__all__)"], "VQGANPipeline"),
    ],
)
def test_names_of_a_users_folder_are_no_matter(arguments, answer, crowded):
    done = python(*arguments, folder=crowded)
    assert done.returncode == 0 and answer in done.stdout, done.stderr


def test_another_module_of_the_same_name_is_an_error_that_names_it(tmp_path):
    (tmp_path / "pipelines.py").write_text("")
    done = python("-c", "import pipelines, tessella; tessella.VQGANPipeline", folder=tmp_path)
    path = tmp_path / "pipelines.py"
    assert f"ImportError: {path} has the name of a package of tessella, `pipelines`; rename it" in done.stderr
