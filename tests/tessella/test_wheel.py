"""The wheel and the sdist: what they hold, and a run with the wheel in an environment and a folder of a user."""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
import tomllib
import venv
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).parents[2]
PACKAGES = ["configs", "stage1_vqgan", "stage2_prior", "pipelines", "tessella"]
SHIPPED = (".py", ".pyi", ".yaml", "py.typed", "README.md")
LONGEST = 900  # seconds; a busy machine takes a small part of this
TRAINING = {"max_steps": 30, "per_device_train_batch_size": 16, "dataloader_num_workers": 1, "report_to": []}


def files_of_packages() -> set[str]:
    found = (path for package in PACKAGES for path in (ROOT / package).rglob("*"))
    return {path.relative_to(ROOT).as_posix() for path in found if path.name.endswith(SHIPPED)}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder of wheel and sdist, built from a copy, because the build leaves files beside the sources."""
    folder = tmp_path_factory.mktemp("build")
    unneeded = shutil.ignore_patterns(".git", ".venv", "runs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, folder / "source", ignore=unneeded)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(folder / "source")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_the_wheel_holds_the_packages_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        fields = message_from_string(archive.read(metadata).decode())
    assert names == files_of_packages()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert fields["Name"] == project["name"] and fields["License-Expression"] == "Apache-2.0"
    assert fields["Description-Content-Type"] == "text/markdown"
    page = fields.get_payload()
    assert page == (ROOT / "tessella" / "README.md").read_text()
    assert "](" not in page  # a package index shows no picture and follows no link by a relative address


@pytest.mark.slow
def test_the_sdist_can_be_tested_and_built(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    others = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile", "tests/conftest.py"}
    assert names >= files_of_packages() | others | {".github/images/digits_samples.png", "benchmarks/run.py"}


def without_this_clone() -> dict[str, str]:
    """Environment variables with which neither Python nor pip finds the sources of this clone."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


@pytest.fixture(scope="module")
def tessella(built) -> Path:
    """The console script in a new environment, which has the wheel and borrows the libraries of this one."""
    folder = built / "environment"
    venv.create(folder, with_pip=False)
    libraries = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (wheel,) = built.glob("*.whl")
    install = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install"]
    subprocess.run([*install, "--quiet", "--no-deps", "--no-index", str(wheel)], env=without_this_clone(), check=True)
    (libraries / "libraries.pth").write_text(sysconfig.get_paths()["purelib"])
    return folder / "bin" / "tessella"


@pytest.fixture
def crowded(tmp_path) -> Path:
    """A folder with settings of two short trainings, and with modules that end Python when they are imported."""
    from configs.yaml_files import to_yaml

    for name in ("configs", "tests"):
        (tmp_path / name).mkdir()
    for path in ("configs/__init__.py", "tests/__init__.py", "pipelines.py", "accelerate.py", "yaml.py"):
        (tmp_path / path).write_text("raise SystemExit('a module of the user was run')")
    stage1 = {**TRAINING, "model": tiny.VQGAN, "loss": {"perceptual_weight": 0, "adversarial_weight": 0}}
    stage2 = {**TRAINING, "model": tiny.LLAMA}
    settings = {"data": "digits", "output_dir": "out", "stage1": "stage1.yaml", "stage2": "stage2.yaml"}
    for name, values in {"stage1": stage1, "stage2": stage2, "mine": settings}.items():
        (tmp_path / f"{name}.yaml").write_text(to_yaml(values))
    return tmp_path


@pytest.mark.slow
def test_the_wheel_runs_where_names_are_taken_is_stopped_and_goes_on(tessella, crowded):
    def start(*arguments: str) -> subprocess.Popen:
        words = [str(tessella), *arguments]
        return subprocess.Popen(
            words, cwd=crowded, env=without_this_clone(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip

    with start("run", "mine.yaml") as process:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        assert "[1/5] train-tokenizer\n" in lines
        time.sleep(1)
        os.killpg(process.pid, signal.SIGINT)
        output = "".join(lines)
    assert process.returncode == 130 and "Traceback" not in output, output
    assert output.rstrip().splitlines()[-1].startswith("stopped "), output

    output, _ = (process := start("run", "mine.yaml")).communicate(timeout=LONGEST)
    assert process.returncode == 0, output
    assert "[5/5] evaluate" in output and "a module of the user was run" not in output
    assert {"samples.png", "reconstructions.png", "metrics.json"} <= {path.name for path in (crowded / "out").iterdir()}

    output, _ = (process := start("run", "mine.yaml")).communicate(timeout=LONGEST)
    assert process.returncode == 0 and output.count("done before") == 5

    output, _ = (process := start("run", "mine.yaml", "--size", "8")).communicate(timeout=LONGEST)
    assert process.returncode == 2 and "model.image_size: the run was started with 16, now it is 8" in output
    assert "[1/5] train-tokenizer ended with exit code 2" in output
