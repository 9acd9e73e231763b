"""Uploads to the Hub: the uploaded files load as a working model. A copy replaces the upload itself."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoModelForCausalLM

from configs.folder_lock import locked_folder
from configs.hub import push_run
from pipelines import VQGANPipeline
from stage1_vqgan import VQGANModel
from stage2_prior import TokenLayout
from tests.devices import DEVICE


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Path:
    """A folder that replaces the Hub."""

    def create_repo(self, repo_id, private=None, exist_ok=False, **kwargs):
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns=None, **kwargs):
        files = [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()]
        for file in filter_repo_objects(files, ignore_patterns=ignore_patterns):
            target = tmp_path / repo_id / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder_path) / file, target)
        return f"hub/{repo_id}"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return tmp_path


def test_a_pushed_pipeline_comes_back(hub, tiny_pipeline):
    assert tiny_pipeline.push_to_hub("me/digits") == "hub/me/digits"
    copy = VQGANPipeline.from_pretrained(hub / "me/digits", device=DEVICE)
    codes = [
        pipe.generate(class_labels=[3], generator=torch.Generator().manual_seed(0), output_type="codes").codes
        for pipe in (tiny_pipeline, copy)
    ]
    assert torch.equal(*codes)
    assert 'from_pretrained("me/digits")' in (hub / "me/digits/README.md").read_text()


def test_a_pushed_run_is_the_model_without_checkpoints_and_logs(hub, tiny_runs):
    for run, name in ((tiny_runs.stage1, "me/vqgan"), (tiny_runs.stage2, "me/prior")):
        with locked_folder(run.output_dir, "output_dir"):  # a run is locked while it uploads
            push_run(replace(run, hub_model_id=name))
    for folder in ("me/vqgan", "me/prior"):
        names = {path.name for path in (hub / folder).iterdir()}
        assert {"config.json", "model.safetensors", "config.yaml", "train_results.json"} <= names
        assert not any(path.is_dir() or path.suffix == ".jsonl" for path in (hub / folder).iterdir())
        assert not any(name.startswith(".") for name in names)  # the lock file names the user's machine
    vqgan = VQGANModel.from_pretrained(hub / "me/vqgan")
    AutoModelForCausalLM.from_pretrained(hub / "me/prior")
    assert TokenLayout.from_pretrained(hub / "me/prior").tokenizer_fingerprint == vqgan.config.fingerprint
