"""Fixtures that several test files share: a tiny run of both stages, and tiny random priors."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import PreTrainedModel

from configs import load_config
from pipelines import VQGANPipeline
from pipelines.build import BuildConfig, build
from stage1_vqgan import Stage1Config
from stage1_vqgan.training.run import train as train_stage1
from stage2_prior import Stage2Config, TokenLayout
from stage2_prior.prior import build_prior
from stage2_prior.tokenize import tokenize
from stage2_prior.training.run import train as train_stage2
from tests import kill_runs, tiny
from tests.devices import DEVICE


@dataclass(frozen=True)
class TinyRuns:
    """The folders of a complete run on the digits. Tests only read them."""

    root: Path
    stage1: Stage1Config
    stage2: Stage2Config

    vqgan = property(lambda self: self.root / "vqgan")
    codes = property(lambda self: self.root / "codes")
    prior = property(lambda self: self.root / "prior")
    pipeline = property(lambda self: self.root / "pipeline")


@pytest.fixture
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches the data sets of a test in the folder of this test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def stage2_values() -> Callable[..., dict]:
    """Returns a function that makes the settings of a tiny run of stage 2."""

    def make(root: Path, vqgan: Path, **changes: object) -> dict:
        return {
            "tokenizer": str(vqgan),
            "code_store": str(root / "codes"),
            "output_dir": str(root / "prior"),
            "data": dict(tiny.DATA),
            "num_views": 2,
            "tokenize_batch_size": 512,
            "max_steps": 20,
            "per_device_train_batch_size": 64,
            "per_device_eval_batch_size": 100,
            "learning_rate": 3e-3,
            "logging_steps": 10,
            "num_sample_images": 0,
            "model": dict(tiny.LLAMA),
            "report_to": [],
            **changes,
        }

    return make


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory, stage2_values: Callable[..., dict]) -> TinyRuns:
    """Trains a tokenizer and a prior for a few steps, and saves tokenizer, code store, prior and pipeline."""
    root = tmp_path_factory.mktemp("tiny_runs")
    stage1 = load_config(
        Stage1Config,
        overrides={
            "output_dir": str(root / "vqgan"),
            "max_steps": 10,
            "per_device_train_batch_size": 32,
            "per_device_eval_batch_size": 180,
            "learning_rate": 2e-3,
            "report_to": [],
            "data": dict(tiny.DATA),
            "model": dict(tiny.VQGAN),
            "loss": {"perceptual_weight": 0, "adversarial_weight": 0.1, "adversarial_start_step": 5},
            "discriminator": {"base_channels": 8, "num_layers": 2},
        },
    )
    stage2 = load_config(Stage2Config, overrides=stage2_values(root, root / "vqgan"))
    runs = TinyRuns(root, stage1, stage2)
    train_stage1(stage1)
    tokenize(stage2)
    train_stage2(stage2)
    build(BuildConfig(tokenizer=str(runs.vqgan), prior=str(runs.prior), output_dir=str(runs.pipeline)))
    return runs


@pytest.fixture(scope="session")
def masked_runs(
    tiny_runs: TinyRuns, tmp_path_factory: pytest.TempPathFactory, stage2_values: Callable[..., dict]
) -> TinyRuns:
    """A masked prior on the codes of `tiny_runs`, and its pipeline. Its folder `vqgan` does not exist."""
    root = tmp_path_factory.mktemp("masked_runs")
    values = stage2_values(root, tiny_runs.vqgan, code_store=str(tiny_runs.codes), prior="masked", model=tiny.BERT)
    runs = TinyRuns(root, tiny_runs.stage1, load_config(Stage2Config, overrides=values))
    train_stage2(runs.stage2)
    build(BuildConfig(tokenizer=str(tiny_runs.vqgan), prior=str(runs.prior), output_dir=str(runs.pipeline)))
    return runs


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_runs: TinyRuns) -> VQGANPipeline:
    """The pipeline of `tiny_runs`, loaded from its folder."""
    pipeline = VQGANPipeline.from_pretrained(tiny_runs.pipeline, device=DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def fresh_accelerate_state() -> Iterator[None]:
    """Resets what Accelerate keeps for a whole process, such as its precision, after the test."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The questions that the code asks on the terminal. Each is answered with yes."""
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    return asked


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of the runs of tests/kill_runs.py without interruption."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for name in ("stage1", "tokenize", "stage2", "build"):
        assert kill_runs.run(name, folder) == 0, (folder / "log.txt").read_text()[-3000:]
    return folder


@pytest.fixture(scope="session")
def layout() -> TokenLayout:
    """A small token layout: 40 codes, a 4×4 grid, 5 classes."""
    return TokenLayout(
        num_codes=40,
        class_names=("ant", "bee", "cat", "dog", "elk"),
        grid=(4, 4),
        downsampling_factor=4,
        tokenizer_fingerprint="0123456789abcdef",
    )


@pytest.fixture(scope="session")
def masked_layout(layout: TokenLayout) -> TokenLayout:
    """The small token layout, of a masked prior."""
    return replace(layout, family="masked")


@pytest.fixture(scope="session")
def random_prior() -> Callable[..., PreTrainedModel]:
    """Returns a function that makes a random prior of an architecture in `tiny`."""
    settings_of = tiny.RANDOM_PRIORS | tiny.MASKED_PRIORS

    def make(model_type: str, layout: TokenLayout, seed: int = 0, **settings: object) -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return build_prior({**settings_of[model_type], **settings}, layout).eval().to(DEVICE)

    return make
