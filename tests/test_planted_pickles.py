"""No file of a checkpoint or of a finished run is unpickled: planted pickles are refused or ignored, and never run.

A stranger can write `complete.json` too, so it lists the planted files.
"""

import pickle
import shutil
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from safetensors import SafetensorError

from configs import ConfigError, load_config
from configs.checkpoints import complete_checkpoints
from configs.interruption import StopRequest
from configs.loader import to_dict
from configs.run_folder import RunFolder
from pipelines import VQGANPipeline
from stage1_vqgan import Stage1Config, VQGANImageProcessor, VQGANModel
from stage1_vqgan.pretrained import load_tokenizer
from stage1_vqgan.training import run as stage1
from stage2_prior import Stage2Config, TokenLayout, load_prior
from stage2_prior.training import run as stage2
from tests.fuzz.harness import planted_pickle
from tests.resealing import reseal

# Files that torch, accelerate, transformers, peft or DeepSpeed look for in a folder, and would unpickle.
NAMES = [
    ".metadata",
    "__0_0.distcp",
    "adapter_model.bin",
    "best/adapter_model.bin",
    "best/pytorch_model.bin",
    "custom_checkpoint_0.pkl",
    "custom_checkpoint_1.pkl",
    "discriminator.bin",
    "dl_state_dict.bin",
    "global_step4/mp_rank_00_model_states.pt",
    "global_step4/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "latest",
    "optimizer.bin",
    "optimizer.pt",
    "optimizer_0/.metadata",
    "optimizer_0/__0_0.distcp",
    "optimizer_1.bin",
    "pytorch_model.bin",
    "pytorch_model-00001-of-00001.bin",
    "pytorch_model_fsdp.bin",
    "pytorch_model_fsdp_0/.metadata",
    "random_states_0.pkl",
    "rng_state.pth",
    "rng_state_0.pth",
    "sampler.bin",
    "sampler_1.bin",
    "scaler.pt",
    "scheduler.bin",
    "scheduler.pt",
    "training_args.bin",
]
IGNORED = ["pytorch_model.bin.index.json", "optimizer_0/shard.safetensors"]

# What reads the output folder of each kind.
LOADERS = {
    "vqgan": [load_tokenizer, VQGANModel.from_pretrained, VQGANImageProcessor.from_pretrained],
    "prior": [load_prior, TokenLayout.from_pretrained],
    "adapter": [load_prior],
    "pipeline": [VQGANPipeline.from_pretrained],
}


@dataclass
class Trap:
    """A pickle that leaves a canary behind when it is loaded."""

    canary: Path

    def plant(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(planted_pickle(self.canary))

    @contextmanager
    def planted(self, folder: Path, name: str) -> Any:
        """Inside this context, a file of a folder is a pickle, which the marker of the checkpoint lists."""
        path = folder / name
        before = {file: file.read_bytes() for file in (path, folder / "complete.json") if file.is_file()}
        parents = [parent for parent in path.parents if not parent.exists()]
        self.plant(path)
        if folder / "complete.json" in before and name != "complete.json":
            reseal(folder)
        try:
            yield
        finally:
            assert not self.canary.exists(), f"{name} was unpickled"
            path.unlink(missing_ok=True)
            for parent in parents:
                parent.rmdir()
            for file, content in before.items():
                file.write_bytes(content)


@pytest.fixture
def trap(tmp_path) -> Trap:
    return Trap(tmp_path / "canary")


def test_the_trap_works(trap):
    trap.plant(trap.canary.with_name("pickle"))
    pickle.loads(trap.canary.with_name("pickle").read_bytes())
    assert trap.canary.exists()


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    """Without the garbage collection at the start of every run, which takes a second."""
    monkeypatch.setattr(Accelerator, "free_memory", lambda accelerator, *objects: list(objects))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("planted")


@pytest.fixture(scope="module")
def gan(tiny_runs, root):
    """A checkpoint of stage 1 with discriminator, average and LeCam's anchors, and a function that loads it."""
    newest = complete_checkpoints(tiny_runs.vqgan)[-1].path
    checkpoint = root / "gan" / newest.name
    shutil.copytree(newest, checkpoint)
    changes = {"output_dir": str(root / "resumed gan"), "resume_from_checkpoint": str(checkpoint)}
    config = stage1.check(load_config(Stage1Config, overrides={**to_dict(tiny_runs.stage1), **changes}))
    Path(config.output_dir).mkdir()
    training = stage1.Training(RunFolder(config), None, stage1.build_accelerator(config))
    return checkpoint, training.resume


def prior_run(tiny_runs, root, name, **changes):
    """A checkpoint of stage 2, and a function that loads it."""
    values = {**to_dict(tiny_runs.stage2), "max_steps": 2, "eval_steps": 2, "output_dir": str(root / name), **changes}
    stage2.train(load_config(Stage2Config, overrides=values))
    checkpoint = complete_checkpoints(root / name)[-1].path
    values |= {"output_dir": str(root / f"resumed {name}"), "resume_from_checkpoint": str(checkpoint)}
    config = stage2.check(load_config(Stage2Config, overrides=values))
    Path(config.output_dir).mkdir()
    arguments = stage2.training_arguments(config)
    training = stage2.Training(RunFolder(config), StopRequest(), arguments, *stage2.open_codes(config))

    def load():
        training.resume()
        training.steps()  # no step remains

    return checkpoint, load


@pytest.fixture(scope="module")
def prior(tiny_runs, root):
    return prior_run(tiny_runs, root, "prior")


@pytest.fixture(scope="module")
def adapter(tiny_runs, root):
    return prior_run(
        tiny_runs, root, "adapter", **{"model": {}, "model_name_or_path": str(tiny_runs.prior), "lora.r": 4}
    )


@pytest.fixture(params=["gan", "prior", "adapter"])
def saved(request):
    """A checkpoint of each kind, and a function that loads it."""
    return request.getfixturevalue(request.param)


def test_checkpoints_hold_safetensors_and_json_only(saved):
    checkpoint, load = saved
    load()
    files = [path for folder in (checkpoint, checkpoint.parent) for path in folder.rglob("*") if path.is_file()]
    kinds = {path.suffix for path in files if "checkpoint-" in str(path)}
    assert kinds == {".json", ".safetensors"}
    assert {path.suffix for path in files} <= {*kinds, ".yaml", ".jsonl", ".lock", ".png", ""}


def test_files_that_libraries_unpickle_are_refused_by_name(saved, trap):
    checkpoint, load = saved
    for name in NAMES:
        with trap.planted(checkpoint, name), pytest.raises(ConfigError, match="resume_from_checkpoint") as caught:
            load()
        assert name in str(caught.value), name
    load()


def test_pickles_in_place_of_files_are_not_run(saved, trap):
    """A file that the run reads is refused. Others are ignored."""
    checkpoint, load = saved
    ignored = set()
    for name in [*files_in(checkpoint), *IGNORED]:
        with trap.planted(checkpoint, name):
            try:
                load()
                ignored.add(name)
            except ConfigError as error:
                assert "resume_from_checkpoint" in str(error), error
    # A resumed run copies the best weights and does not read them; what loads them is tested below.
    unread = {
        f"{part}{name}.json" for part in ("", "best/") for name in ("config", "generation_config", "adapter_config")
    }
    assert ignored <= {*IGNORED, *unread, "best/model.safetensors", "best/adapter_model.safetensors"}
    load()


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_runs_resume_without_unpickling(stage, tiny_runs, trap, tmp_path):
    """The whole run, in its own folder, with a pickle that accelerate or torch read before."""
    config = replace(getattr(tiny_runs, stage), output_dir=str(tmp_path / "run"))
    source = tiny_runs.vqgan if stage == "stage1" else tiny_runs.prior
    shutil.copytree(source, config.output_dir)
    (tmp_path / "run" / "train_results.json").unlink()
    name = "custom_checkpoint_0.pkl" if stage == "stage1" else "optimizer.pt"
    checkpoint = complete_checkpoints(config.output_dir)[-1].path
    with trap.planted(checkpoint, name), pytest.raises(ConfigError, match=f"{name}: this project writes no pickles"):
        (stage1 if stage == "stage1" else stage2).train(config)


@pytest.mark.parametrize("kind", LOADERS)
def test_output_folders_are_not_unpickled(kind, tiny_runs, request, tmp_path):
    source = tiny_runs.root / kind if kind != "adapter" else request.getfixturevalue("adapter")[0].parent
    folder, canaries = tmp_path / "runs" / kind, tmp_path / "canaries"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("checkpoint-*", "*.png"))
    saved = files_in(folder)
    parts = ["", *(f"{path.name}/" for path in folder.iterdir() if path.is_dir())]
    planted = [f"{part}{name}" for part in parts for name in [*NAMES, *IGNORED]]
    for name in planted:
        Trap(canaries / name.replace("/", "-")).plant(folder / name)
    canaries.mkdir()
    load_all(kind, folder)
    weights = [name for name in saved if name.endswith(".safetensors")]
    for names in [*([name] for name in weights), [name for name in saved if name not in weights]]:
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(Trap(canaries / name.replace("/", "-")).planted(folder, name))
            load_all(kind, folder)
    for name in weights:  # without safetensors, transformers and peft look for pickles
        (folder / name).unlink()
    load_all(kind, folder)
    assert list(canaries.iterdir()) == []


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def load_all(kind: str, folder: Path) -> None:
    for loader in LOADERS[kind]:
        with suppress(ValueError, OSError, SafetensorError, pickle.UnpicklingError):
            loader(str(folder))
