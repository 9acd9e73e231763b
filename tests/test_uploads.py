"""Uploads: the exact list of files, nothing about the author in them, and a stranger can load them."""

import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants

from configs import ConfigError, command_line, save_config
from configs.checksums import verify_checksums
from configs.hub import push_run
from configs.uploads import public_name
from pipelines import VQGANPipeline
from pipelines.build import BuildConfig, build
from pipelines.hub import tokenizer_sources
from pipelines.push import PushConfig, push
from stage1_vqgan import Stage1Config, VQGANImageProcessor, VQGANModel
from stage1_vqgan.model_card import export_tokenizer
from stage1_vqgan.training.run import train as train_tokenizer
from stage2_prior import TokenLayout, load_prior
from stage2_prior.adapters import attach_adapter
from stage2_prior.export import export_prior
from stage2_prior.training.config import LoraConfig
from stage2_prior.training.run import train as train_prior
from tests.devices import DEVICE, ON_CPU
from tests.hub_server import Account, HubServer
from tests.slow import few
from tests.uploads import TOKEN, Author, move_away

SOURCES = [path.name for path in tokenizer_sources()]
TOKENIZER = ["checksums.json", "config.json", "model.safetensors", "preprocessor_config.json", *SOURCES]
PRIOR = ["checksums.json", "config.json", "generation_config.json", "model.safetensors"]
RUN = ["README.md", "config.yaml", "train_results.json", "card/facts.json"]
TOKENIZER_RUN = [*RUN, *TOKENIZER, "discriminator.safetensors", "card/tokenizer.yaml", "card/reconstructions.png"]
PRIOR_RUN = [*RUN, *PRIOR, "token_layout.json", "card/prior.yaml", "card/prior_losses.png"]
PROCESSOR = {"preprocessor_config.json", *(name for name in SOURCES if name.startswith("image_processing_"))}
PIPELINE = ["README.md", "checksums.json", "config.json", "model_index.json", *SOURCES]
CARD = ("facts.json", "prior.yaml", "prior_losses.png", "reconstructions.png", "tokenizer.yaml")
PIPELINE += [f"card/{name}" for name in CARD]
PIPELINE += [f"vqgan/{name}" for name in TOKENIZER] + [f"prior/{name}" for name in PRIOR]


@pytest.fixture
def hub(monkeypatch) -> Iterator[HubServer]:
    with HubServer(TOKEN, "me") as hub:
        hub.use(monkeypatch)
        yield hub


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
    assert hub.names("me/vqgan") == sorted(TOKENIZER_RUN)
    assert hub.names("me/prior") == sorted(PRIOR_RUN)
    assert author.traces(runs.vqgan) and author.traces(hub.save(tmp_path / "received")) == author.said(hub) == []
    settings = yaml.safe_load(hub.files("me/prior")["config.yaml"])
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
    hub.add("me/adapter", {"adapter_config.json": b"{}"})  # of an earlier upload
    trained = train_prior(pushed(runs.stage2, "me/adapter", max_steps=1, learning_rate=0.1, **changes))
    assert hub.names("me/adapter") == sorted({*PRIOR_RUN} - {"card/prior_losses.png"})  # one step draws no line
    assert author.traces(hub.save(tmp_path / "received")) == []
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
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "card/facts.json"]
    names += ["token_layout.json"]
    assert hub.names("me/adapter") == names and author.traces(hub.save(tmp_path / "received")) == []
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
    assert pipeline.push_to_hub("me/pushed", token=TOKEN).startswith(f"{hub.address}/me/pushed/commit/")
    for name in ("me/built", "me/saved", "me/pushed"):
        assert hub.names(name) == sorted(PIPELINE)
    assert author.traces(hub.save(tmp_path / "received")) == author.said(hub) == []

    found = move_away(hub, author, monkeypatch, tmp_path / "elsewhere") / "me/pushed"
    copy = VQGANPipeline.from_pretrained(found, device=DEVICE)
    copy.set_progress_bar_config(disable=True)
    codes = [
        pipe.generate([3], generator=torch.Generator().manual_seed(0), output_type="codes").codes
        for pipe in (tiny_pipeline, copy)
    ]
    assert torch.equal(*codes)
    assert 'from_pretrained("me/pushed")' in (found / "README.md").read_text()


def test_what_transformers_uploads(hub, author, runs, tmp_path):
    VQGANModel.from_pretrained(runs.vqgan).push_to_hub("me/model")
    VQGANImageProcessor.from_pretrained(runs.vqgan).push_to_hub("me/processor")
    load_prior(str(runs.prior)).push_to_hub("me/causal")
    assert set(hub.names("me/model")) == {*TOKENIZER, "README.md"} - PROCESSOR - {"checksums.json"}
    assert "preprocessor_config.json" in hub.names("me/processor")
    assert hub.names("me/causal") == sorted(["README.md", *PRIOR[1:]])
    assert author.traces(hub.save(tmp_path / "received")) == []


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
        push_run(pushed(runs.stage1, "me/vqgan"), export_tokenizer)
    assert not hub.names("me/vqgan")
    assert TOKEN not in str(refused.value) and "geheim" not in str(refused.value)


def test_a_secret_in_a_pipeline_is_refused(hub, author, runs):
    pipeline = VQGANPipeline.from_pretrained(runs.pipeline)
    hub.accounts["geheim-geheim"] = Account("me")
    pipeline.prior.config.note = "an unusual token: geheim-geheim"
    with pytest.raises(ValueError, match=r"prior/config\.json: line \d+ \(note\): holds your token; remove it"):
        pipeline.push_to_hub("me/digits", token="geheim-geheim")
    assert not hub.names("me/digits")


def test_links_are_not_followed(hub, author, runs):
    weights = runs.vqgan / "model.safetensors"
    weights.rename(author.home / "weights")
    weights.symlink_to(author.home / "weights")
    with pytest.raises(ConfigError, match=r"model\.safetensors: this file is a symbolic link"):
        push_run(pushed(runs.stage1, "me/vqgan"), export_tokenizer)
    assert not hub.names("me/vqgan")


# ---------------------------------------------------------------------- failing uploads


def push_arguments(runs):
    return [str(runs.vqgan / "config.yaml"), "--push_to_hub", "true", "--hub_model_id", "me/vqgan"]


def read_only(hub, patch):
    patch.setitem(hub.accounts, TOKEN, Account("me", role="read"))


def strange_token(hub, patch):
    patch.setenv("HF_TOKEN", "hf_strange")


def bad_header(hub, patch):
    def fail(*args, **options):
        raise RuntimeError(f"Illegal header value b'Bearer {TOKEN}\\n'")

    patch.setattr(huggingface_hub.HfApi, "create_repo", fail)


FAILURES = {
    "no login": (lambda hub, patch: patch.delenv("HF_TOKEN"), "run `hf auth login`"),
    "401": (strange_token, "does not accept your login; run `hf auth login`"),
    "403": (read_only, "must not write to this repository"),
    "404": (lambda hub, patch: hub.fail("tree", 404, "RepoNotFound"), "there is no such repository"),
    "429": (lambda hub, patch: hub.fail("POST /api/repos/create", 429), "too many requests"),
    "500": (lambda hub, patch: hub.fail("commit", 500), "500 Internal Server Error"),
    "storage": (lambda hub, patch: hub.fail("PUT", 500, times=20), "Error while uploading"),
    "offline": (lambda hub, patch: patch.setattr(constants, "HF_HUB_OFFLINE", True), "HF_HUB_OFFLINE is set"),
    "network": (lambda hub, patch: patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9"), "Connection refused"),
    "header": (bad_header, "Illegal header value b'Bearer ***"),
}


@pytest.mark.parametrize("failure", few(FAILURES, "401", "500", "storage"))
def test_a_failed_upload_loses_nothing(hub, author, runs, monkeypatch, capsys, failure):
    plant, reason = FAILURES[failure]
    arguments = push_arguments(runs)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="2"):
        plant(hub, patch)
        command_line.run(Stage1Config, train_tokenizer, "", arguments)
    message = capsys.readouterr().err
    assert re.search(rf"the model is saved in .*vqgan, but was not uploaded: .*{re.escape(reason)}", message)
    assert re.search(r"Then upload it: tessella push /.*/vqgan --hub_model_id me/vqgan$", message.strip())
    assert TOKEN not in message and "Traceback" not in message
    assert hub.names("me/vqgan") == []
    assert json.loads((runs.vqgan / "train_results.json").read_text())["global_step"] == runs.stage1.max_steps
    command_line.run(PushConfig, push, "", [str(runs.vqgan), "--hub_model_id", "me/vqgan"])
    assert f"uploaded to {hub.address}/me/vqgan/commit/" in capsys.readouterr().out
    assert hub.names("me/vqgan") == sorted(TOKENIZER_RUN)


BEFORE_TRAINING = ("no login", "401", "403", "429", "offline", "network")


@pytest.mark.parametrize("failure", BEFORE_TRAINING)
def test_a_run_asks_the_hub_before_it_trains(hub, author, runs, tmp_path, monkeypatch, failure):
    FAILURES[failure][0](hub, monkeypatch)
    config = pushed(runs.stage1, "me/vqgan", output_dir=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"hub_model_id: received 'me/vqgan'; an upload would fail"):
        train_tokenizer(config)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_names_and_licenses_are_checked_before_training(hub, author, runs, tmp_path):
    config = pushed(runs.stage1, "you/vqgan", output_dir=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"hub_model_id: received 'you/vqgan'.*must not write"):
        train_tokenizer(config)
    with pytest.raises(ConfigError, match=r"license: received 'apache'; \"license\" must be one of"):
        train_tokenizer(replace(config, hub_model_id="me/vqgan", license="apache"))
    assert "me/vqgan" not in hub.repositories
    with pytest.raises(ConfigError, match=r"hub_model_id: received 'me/a--b'; must be a name on the Hub"):
        train_tokenizer(replace(config, hub_model_id="me/a--b"))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_full_disk_names_the_temporary_folder(hub, author, runs, monkeypatch, capsys):
    def fail(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(SystemExit, match="4"):
        command_line.run(Stage1Config, train_tokenizer, "", push_arguments(runs))
    assert re.search(r"the disk is full: /.*/checksums\.json could not be written", capsys.readouterr().err)


# ---------------------------------------------------------------------- killed uploads


OLD = {"model.safetensors": b"old", "model-00001-of-00002.safetensors": b"old", "config.json": b"{}"}


@pytest.mark.parametrize("request_", few(["POST .*preupload", "PUT", "POST .*commit"], "POST .*commit"))
def test_a_killed_upload_is_repeated(hub, author, runs, request_):
    """Nobody sees files of two models: the repository holds the old files or the new ones."""
    hub.add("me/vqgan", OLD)
    config = pushed(runs.stage1, "me/vqgan")
    process = multiprocessing.get_context("fork").Process(target=push_run, args=(config, export_tokenizer))
    killed = []

    def kill(request: str) -> None:
        if re.match(request_, request) and not killed:
            killed.append(request)
            os.kill(process.pid, signal.SIGKILL)

    hub.before = kill
    process.start()
    process.join()
    is_committed = "commit" in request_  # the server has the whole request; only the answer is lost
    assert process.exitcode == -signal.SIGKILL
    assert hub.names("me/vqgan") == sorted(TOKENIZER_RUN if is_committed else OLD)
    push_run(config, export_tokenizer)
    files = hub.files("me/vqgan")
    assert list(files) == sorted(TOKENIZER_RUN)
    assert files["model.safetensors"] == (runs.vqgan / "model.safetensors").read_bytes()
    assert len(hub.repositories["me/vqgan"].commits) == 2  # the repeated upload of what is there adds none


# ---------------------------------------------------------------------- a stranger downloads


PULL = """
import sys
from pathlib import Path

import torch

names = ["configs", "stage1_vqgan", "stage2_prior", "pipelines"]
sys.modules.update(dict.fromkeys(names))  # this package is absent
torch.manual_seed(0)
exec(sys.argv[1])
images[0].save("without.png")
for name in names:
    del sys.modules[name]

from pipelines import VQGANPipeline
from stage1_vqgan import load_tokenizer
from stage2_prior import load_prior

pipe = VQGANPipeline.from_pretrained("me/pipeline")
out = pipe.generate([3, 7], num_images_per_label=2, generator=torch.Generator().manual_seed(0))
older = VQGANPipeline.from_pretrained("me/pipeline", revision="v1")
state = load_tokenizer("me/vqgan").state_dict()
other = load_prior("me/prior").state_dict()
torch.save(
    {
        "codes": out.codes,
        "images": [image.tobytes() for image in out.images],
        "older": older.prior.lm_head.weight.detach(),
        "vqgan": all(torch.equal(state[name], value) for name, value in pipe.vqgan.state_dict().items()),
        "prior": all(torch.equal(other[name], value) for name, value in pipe.prior.state_dict().items()),
        "stock": all(torch.equal(prior.state_dict()[name], value) for name, value in pipe.prior.state_dict().items()),
        "remote": all(torch.equal(vqgan.state_dict()[name], value) for name, value in pipe.vqgan.state_dict().items()),
    },
    "pulled.pt",
)
"""


@pytest.mark.slow
def test_a_stranger_downloads_the_same_models(hub, author, runs, tiny_pipeline, tmp_path, monkeypatch):
    """A process with an empty cache and without a login. The code of the card runs where this package is absent."""
    hub.part_size = 50_000
    pipeline = VQGANPipeline.from_pretrained(runs.pipeline)
    with torch.no_grad():
        pipeline.prior.lm_head.weight += 1
        older = pipeline.prior.lm_head.weight.detach().clone()
        pipeline.push_to_hub("me/old_name")
        pipeline.prior.lm_head.weight -= 1
    hub.repositories["me/old_name"].tags["v1"] = hub.repositories["me/old_name"].commits[-1][0]
    hub.repositories["me/pipeline"] = hub.repositories.pop("me/old_name")
    hub.moved["me/old_name"] = "me/pipeline"  # a renamed repository answers with redirects
    push(PushConfig(folder=str(runs.pipeline), hub_model_id="me/pipeline"))
    push(PushConfig(folder=str(runs.vqgan), hub_model_id="me/vqgan"))
    push(PushConfig(folder=str(runs.prior), hub_model_id="me/prior"))

    card = hub.files("me/pipeline")["README.md"].decode()
    example = next(code for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "trust_remote_code" in code)
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    environment |= {**ON_CPU, **hub.environment(stranger), "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run(
        [sys.executable, "-c", PULL, example.replace("me/pipeline", "me/old_name")],
        cwd=stranger,
        env=environment | {"HOME": str(stranger)},
        check=True,
    )
    pulled = torch.load(stranger / "pulled.pt")
    same = tiny_pipeline.generate([3, 7], num_images_per_label=2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pulled["codes"], same.codes.cpu())
    assert pulled["images"] == [image.tobytes() for image in same.images]
    assert pulled["vqgan"] and pulled["prior"] and pulled["stock"] and pulled["remote"]
    assert torch.equal(pulled["older"], older)
    assert (stranger / "without.png").is_file()
    answered = set(hub.answers)
    assert {"POST complete 200", "HEAD resolve 302", "HEAD resolve 307"} <= answered
    assert not [answer for answer in answered if "no such route" in answer and "agent-harnesses" not in answer]


# ---------------------------------------------------------------------- cards


def test_the_card_of_each_kind(hub, author, runs):
    kinds = {"vqgan": runs.vqgan, "prior": runs.prior, "pipeline": runs.pipeline}
    for name, folder in kinds.items():
        push(PushConfig(folder=str(folder), hub_model_id=f"me/{name}", license="mit"))
        text = hub.files(f"me/{name}")["README.md"].decode()
        data = ModelCard(text).data
        assert data.license == "mit" and data.library_name == "tessella" and data.pipeline_tag
        assert f'from_pretrained("me/{name}"' in text and "## Limits" in text and "License: `mit`" in text
        pictures = re.findall(r"!\[.*?\]\((.*?)\)", text) + re.findall(r"\[\w+\.yaml\]\((.*?)\)", text)
        assert pictures and set(pictures) <= set(hub.names(f"me/{name}"))
    assert data.pipeline_tag == "unconditional-image-generation"
    assert "| Optimizer steps | 10 | 20 |" in text and "CPU cores" in text
    assert "| 3 | 3 | " in text and "| id | name | training images |" in text


def test_what_the_author_writes_stays(hub, author, runs, tiny_pipeline):
    """On the Hub, in the folder of a pipeline, and in a README.md without a managed part."""
    push(PushConfig(folder=str(runs.vqgan), hub_model_id="me/vqgan"))
    card = hub.files("me/vqgan")["README.md"].decode()
    assert "license: unknown" in card and "has not chosen a license" in card
    hub.add("me/vqgan", {"README.md": card.replace("# Image tokenizer", "# My cats").encode()})
    push(PushConfig(folder=str(runs.vqgan), hub_model_id="me/vqgan", license="mit"))
    card = hub.files("me/vqgan")["README.md"].decode()
    assert "# My cats" in card and "License: `mit`" in card and "has not chosen" not in card
    push(PushConfig(folder=str(runs.vqgan), hub_model_id="me/vqgan"))  # the license stays
    assert hub.files("me/vqgan")["README.md"].decode() == card

    (runs.pipeline / "README.md").write_text("# By hand\n")
    push(PushConfig(folder=str(runs.pipeline), hub_model_id="me/pipeline"))
    assert hub.files("me/pipeline")["README.md"] == b"# By hand\n"
