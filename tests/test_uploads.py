"""Uploads: the exact list of files, nothing about the author in them, and a stranger can load them."""

import errno
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from configs import ConfigError, command_line, save_config
from configs.checksums import verify_checksums
from configs.hub import push_run
from configs.uploads import copy_run, public_name
from pipelines import VQGANPipeline
from pipelines.build import BuildConfig, build
from pipelines.hub import tokenizer_sources
from stage1_vqgan import Stage1Config, VQGANImageProcessor, VQGANModel
from stage1_vqgan.training.run import train as train_tokenizer
from stage2_prior import TokenLayout, load_prior
from stage2_prior.adapters import attach_adapter
from stage2_prior.export import export_prior
from stage2_prior.training.config import LoraConfig
from stage2_prior.training.run import train as train_prior
from tests.devices import DEVICE
from tests.uploads import TOKEN, Author, Hub, move_away

SOURCES = [path.name for path in tokenizer_sources()]
TOKENIZER = ["checksums.json", "config.json", "model.safetensors", "preprocessor_config.json", *SOURCES]
PRIOR = ["checksums.json", "config.json", "generation_config.json", "model.safetensors"]
RUN = ["config.yaml", "train_results.json"]
PROCESSOR = {"preprocessor_config.json", "image_processing_vqgan.py", "image_processing_squares.py"}
PIPELINE = ["README.md", "checksums.json", "model_index.json", *SOURCES]
PIPELINE += [f"vqgan/{name}" for name in TOKENIZER] + [f"prior/{name}" for name in PRIOR]


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    hub.install(monkeypatch)
    return hub


@pytest.fixture
def author(tmp_path, monkeypatch) -> Author:
    author = Author(tmp_path / "machine")
    author.install(monkeypatch)
    return author


@pytest.fixture
def runs(tiny_runs, author):
    """The tiny runs, as if they had been trained in the home folder of the author."""
    root = author.home / "runs"
    shutil.copytree(tiny_runs.root, root, ignore=shutil.ignore_patterns("checkpoint-*"))
    stage1 = replace(tiny_runs.stage1, output_dir=str(root / "vqgan"))
    paths = {"tokenizer": "vqgan", "code_store": "codes", "output_dir": "prior"}
    stage2 = replace(tiny_runs.stage2, **{key: str(root / name) for key, name in paths.items()})
    for config in (stage1, stage2):
        save_config(config, Path(config.output_dir) / "config.yaml")
        author.clutter(Path(config.output_dir))
    return replace(tiny_runs, root=root, stage1=stage1, stage2=stage2)


def pushed(config, name, **changes):
    return replace(config, push_to_hub=True, hub_model_id=name, **changes)


def test_runs(hub, author, runs, tmp_path, monkeypatch):
    train_tokenizer(pushed(runs.stage1, "me/vqgan"))
    train_prior(pushed(runs.stage2, "me/prior"))
    assert hub.names("me/vqgan") == sorted(RUN + TOKENIZER)
    assert hub.names("me/prior") == sorted([*RUN, *PRIOR, "token_layout.json"])
    assert author.traces(runs.vqgan) and author.traces(hub.root) == []
    settings = yaml.safe_load((hub.root / "me/prior/config.yaml").read_text())
    assert [settings[key] for key in ("output_dir", "tokenizer", "code_store")] == ["prior", "vqgan", "codes"]
    assert settings["data"]["dataset"] == "digits" and settings["learning_rate"] == runs.stage2.learning_rate

    found = move_away(hub, author, monkeypatch, tmp_path / "elsewhere") / "me"
    vqgan = VQGANModel.from_pretrained(found / "vqgan")
    VQGANImageProcessor.from_pretrained(found / "vqgan")
    load_prior(str(found / "prior"))
    for name in ("vqgan", "prior"):
        verify_checksums(found / name)
    assert TokenLayout.from_pretrained(found / "prior").tokenizer_fingerprint == vqgan.config.fingerprint


def test_an_adapter_of_a_local_prior_is_merged(hub, author, runs, tmp_path, monkeypatch):
    folder = author.home / "adapter"
    changes = {"model": {}, "model_name_or_path": str(runs.prior), "output_dir": str(folder), "lora": LoraConfig(r=2)}
    stale = hub.root / "me/adapter" / "adapter_config.json"  # of an earlier upload
    stale.parent.mkdir(parents=True)
    stale.write_text("{}")
    trained = train_prior(pushed(runs.stage2, "me/adapter", max_steps=1, learning_rate=0.1, **changes))
    assert hub.names("me/adapter") == sorted([*RUN, *PRIOR, "token_layout.json"])
    assert author.traces(hub.root) == []
    named = {name for name, _ in author.traces(folder) if "/" not in name}
    # only adapter_config.json needs the path of the prior
    assert "adapter_config.json" in named and "README.md" not in named
    found = move_away(hub, author, monkeypatch, tmp_path / "elsewhere") / "me/adapter"
    verify_checksums(found)
    weights = load_prior(str(found)).state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in trained.state_dict().items())


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # peft asks the Hub
def test_an_adapter_of_a_prior_on_the_hub_names_it(hub, author, runs, random_prior, tmp_path, monkeypatch):
    folder, layout = author.home / "adapter", TokenLayout.from_pretrained(runs.prior)
    adapted = attach_adapter(load_prior(str(runs.prior)), "me/base", LoraConfig(r=2), [])
    adapted.save_pretrained(folder)
    layout.save_pretrained(folder)
    push_run(pushed(runs.stage2, "me/base"), export_prior)
    push_run(pushed(runs.stage2, "me/adapter", output_dir=str(folder)), export_prior)
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "token_layout.json"]
    assert hub.names("me/adapter") == names and author.traces(hub.root) == []
    found = move_away(hub, author, monkeypatch, tmp_path / "elsewhere")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(found / name))
    weights = load_prior(str(found / "me/adapter")).state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in load_prior("me/base").state_dict().items())


def test_pipelines(hub, author, runs, tiny_pipeline, tmp_path, monkeypatch):
    """Three ways to upload a pipeline."""
    parts = {"tokenizer": str(runs.vqgan), "prior": str(runs.prior), "output_dir": str(author.home / "built")}
    build(BuildConfig(**parts, push_to_hub=True, hub_model_id="me/built"))
    pipeline = VQGANPipeline.from_pretrained(author.home / "built", device=DEVICE)
    pipeline.save_pretrained(author.home / "saved", push_to_hub=True)
    assert pipeline.push_to_hub("me/pushed", token=TOKEN) == "hub/me/pushed"
    for name in ("me/built", "saved", "me/pushed"):
        assert hub.names(name) == sorted(PIPELINE)
    assert author.traces(hub.root) == []

    found = move_away(hub, author, monkeypatch, tmp_path / "elsewhere") / "me/pushed"
    copy = VQGANPipeline.from_pretrained(found, device=DEVICE)
    copy.set_progress_bar_config(disable=True)
    codes = [
        pipe.generate([3], generator=torch.Generator().manual_seed(0), output_type="codes").codes
        for pipe in (tiny_pipeline, copy)
    ]
    assert torch.equal(*codes)
    assert 'from_pretrained("me/pushed")' in (found / "README.md").read_text()


def test_what_transformers_uploads(hub, author, runs, monkeypatch):
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *a, **k: _Card())
    VQGANModel.from_pretrained(runs.vqgan).push_to_hub("me/model")
    VQGANImageProcessor.from_pretrained(runs.vqgan).push_to_hub("me/processor")
    load_prior(str(runs.prior)).push_to_hub("me/causal")
    assert set(hub.names("me/model")) == {*TOKENIZER, "README.md"} - PROCESSOR - {"checksums.json"}
    assert "preprocessor_config.json" in hub.names("me/processor")
    assert hub.names("me/causal") == sorted(["README.md", *PRIOR[1:]])
    assert author.traces(hub.root) == []


class _Card:
    def save(self, path):
        Path(path).write_text("card")


# ---------------------------------------------------------------------- local paths and secrets


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/data/cats and dogs/train", "train"),
        ("/data/*.tar", "*.tar"),
        ("~/cats", "cats"),
        ("~", "~"),
        ("~zsigmondka", "~"),
        ("{home}", "~"),
        ("{home}/", "~"),
        ("{home}/runs", "runs"),
        ("../../cats", "cats"),
        ("runs/a/vqgan", "vqgan"),
        ("exists/here", "here"),
        ("file:///data/cats", "cats"),
        (r"C:\Users\zsigmondka\cats", "cats"),
        (r"\\server\zsigmondka\cats", "cats"),
        ("zalando-datasets/fashion_mnist", "zalando-datasets/fashion_mnist"),
        ("https://huggingface.co/datasets/a/b", "https://huggingface.co/datasets/a/b"),
        (r".*layers\.\d+\.mlp", r".*layers\.\d+\.mlp"),
        ("digits", "digits"),
        ("", ""),
    ],
)
def test_only_the_last_component_of_a_local_path_is_left(author, monkeypatch, text, expected):
    monkeypatch.chdir(author.home)
    (author.home / "exists" / "here").mkdir(parents=True)
    assert public_name(text.replace("{home}", str(author.home))) == expected


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        (
            "config.yaml",
            "  dataset: https://me:geheim@host/x.tar",
            r"config\.yaml: line 1 \(dataset\): holds a password",
        ),
        ("config.yaml", "dataset: https://host/x?access_token=geheim", r"line 1 \(dataset\): holds a token in an addr"),
        ("config.yaml", f"- {TOKEN}", r"config\.yaml: line 1: holds a token"),
        ("README.md", f"text\nlogin {TOKEN}", r"README\.md: line 2: holds a token"),
        ("train_results.json", '{\n "note": "hf_geheimgeheimgeheimgeheim"}', r"line 2 \(note\): holds a token"),
        ("README.md", "the images of {home}/cats", r"README\.md: line 1: holds the path of your home folder"),
    ],
)
def test_a_secret_is_refused_and_not_repeated(hub, author, runs, name, line, message):
    (runs.vqgan / name).write_text(line.replace("{home}", str(author.home)) + "\n")
    with pytest.raises(ConfigError, match=message) as refused:
        push_run(pushed(runs.stage1, "me/vqgan"), copy_run)
    assert not hub.names("me/vqgan")
    assert TOKEN not in str(refused.value) and "geheim" not in str(refused.value)


def test_a_secret_in_a_pipeline_is_refused(hub, author, runs):
    pipeline = VQGANPipeline.from_pretrained(runs.pipeline)
    pipeline.prior.config.note = "an unusual token: geheim-geheim"
    with pytest.raises(ValueError, match=r"prior/config\.json: line \d+ \(note\): holds your token; remove it"):
        pipeline.push_to_hub("me/digits", token="geheim-geheim")
    assert not hub.names("me/digits")


def test_links_are_not_followed(hub, author, runs):
    weights = runs.vqgan / "model.safetensors"
    weights.rename(author.home / "weights")
    weights.symlink_to(author.home / "weights")
    with pytest.raises(ConfigError, match=r"model\.safetensors: this file is a symbolic link"):
        push_run(pushed(runs.stage1, "me/vqgan"), copy_run)
    assert not hub.names("me/vqgan")


# ---------------------------------------------------------------------- failing uploads


def http_error(kind, status):
    return kind("refused by the server", response=SimpleNamespace(status_code=status, headers={}, request=None))


def push_arguments(runs):
    return [str(runs.vqgan / "config.yaml"), "--push_to_hub", "true", "--hub_model_id", "me/vqgan"]


FAILURES = {
    "no login": (LocalTokenNotFoundError("no token"), "run `hf auth login`"),
    "401": (http_error(HfHubHTTPError, 401), "does not accept your login; run `hf auth login`"),
    "403": (http_error(HfHubHTTPError, 403), "must not write to this repository"),
    "404": (http_error(RepositoryNotFoundError, 404), "there is no such repository"),
    "500": (http_error(HfHubHTTPError, 500), "refused by the server"),
    "offline": (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
    "network": (ConnectionError("[Errno 111] Connection refused"), "Connection refused"),
    "header": (RuntimeError(f"Illegal header value b'Bearer {TOKEN}\\n'"), "Illegal header value b'Bearer ***"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_upload_loses_nothing(hub, author, runs, monkeypatch, capsys, failure):
    error, reason = FAILURES[failure]
    arguments = push_arguments(runs)

    def fail(*args, **options):
        raise error

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="2"):
        patch.setattr(huggingface_hub.HfApi, "create_repo", fail)
        command_line.run(Stage1Config, train_tokenizer, "", arguments)
    message = capsys.readouterr().err
    assert re.search(rf"the model is saved in .*vqgan, but was not uploaded: .*{re.escape(reason)}", message)
    assert "The same command uploads it" in message and TOKEN not in message and "Traceback" not in message
    assert json.loads((runs.vqgan / "train_results.json").read_text())["global_step"] == runs.stage1.max_steps
    command_line.run(Stage1Config, train_tokenizer, "", arguments)
    assert "uploaded to hub/me/vqgan" in capsys.readouterr().out and hub.names("me/vqgan") == sorted(RUN + TOKENIZER)


def test_a_full_disk_names_the_temporary_folder(hub, author, runs, monkeypatch, capsys):
    def fail(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(SystemExit, match="4"):
        command_line.run(Stage1Config, train_tokenizer, "", push_arguments(runs))
    assert re.search(r"the disk is full: /.*/checksums\.json could not be written", capsys.readouterr().err)
