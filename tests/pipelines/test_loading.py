"""Pipelines from folders and repositories: options of loading, and folders that are refused."""

import json
import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import dynamic_module_utils

from configs import ConfigError
from configs.checksums import Damaged
from configs.files import write_json
from configs.staging import SAVED, replaced_files
from pipelines import VQGANPipeline
from pipelines.build import BuildConfig, build
from pipelines.push import PushConfig, push
from stage1_vqgan import VQGANModel, load_tokenizer
from stage2_prior.adapters import attach_adapter
from stage2_prior.training.config import LoraConfig
from tests.devices import DEVICE
from tests.hub_server import HubServer
from tests.model_folders import change_config, change_weights, plant_code, without, without_checksums
from tests.slow import few


@pytest.fixture
def folder(tiny_runs, tmp_path) -> Path:
    """A copy of the tiny pipeline, without checksums."""
    return without_checksums(shutil.copytree(tiny_runs.pipeline, tmp_path / "pipeline"))


def test_the_folder_of_a_whole_run_is_a_hint_at_its_pipeline(folder):
    with pytest.raises(FileNotFoundError, match=f"holds no pipeline: .*; did you mean {folder}"):
        VQGANPipeline.from_pretrained(folder.parent)
    with pytest.raises(ConfigError, match=f"folder: received .*; did you mean {folder}"):
        push(PushConfig(folder=str(folder.parent), hub_model_id="me/model"))


def greedy(pipeline: VQGANPipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.generate(list(range(10)), temperature=0.0, output_type="codes").codes.cpu()


def save_adapter(tiny_runs, folder: Path) -> None:
    """Saves an adapter that changes the codes of the tiny prior."""
    prior = VQGANPipeline.from_pretrained(tiny_runs.pipeline).prior
    model = attach_adapter(prior, str(tiny_runs.prior), LoraConfig(r=2), [])
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.5)
    model.save_pretrained(folder)


def test_a_first_save_that_was_interrupted_is_completed_by_its_reader(tiny_runs, tmp_path):
    """All files of the models still lie where they were written, as after a kill before the first was moved."""
    parts = {"tokenizer": tiny_runs.vqgan, "prior": tiny_runs.prior}
    for name, trained in parts.items():
        with replaced_files(tmp_path / name) as staged:
            for path in trained.iterdir():
                if path.is_file() and path.name != "checksums.json":
                    shutil.copy(path, staged)
        saved = tmp_path / name / SAVED
        saved.mkdir()
        files = [path for path in (tmp_path / name).iterdir() if path.is_file()]
        for path in files:
            path.rename(saved / path.name)
        write_json(saved / "files.json", {"files": [path.name for path in files]})
    build(BuildConfig(**{name: str(tmp_path / name) for name in parts}, output_dir=str(tmp_path / "pipeline")))
    for name in parts:
        assert (tmp_path / name / "config.json").is_file() and not (tmp_path / name / SAVED).exists()


# ---------------------------------------------------------------------- options


@pytest.mark.parametrize("implementation", few(["eager", "sdpa"], "eager"))
def test_the_caller_chooses_the_attention(tiny_runs, tiny_pipeline, implementation):
    pipeline = VQGANPipeline.from_pretrained(tiny_runs.pipeline, attn_implementation=implementation, device=DEVICE)
    assert pipeline.prior.config._attn_implementation == implementation
    assert torch.equal(greedy(pipeline), greedy(tiny_pipeline))


@pytest.mark.parametrize(
    "where",
    [
        {"device": "cpu"},
        {"device_map": "cpu"},
        {"device_map": torch.device("cpu")},
        {"device_map": {"": "cpu"}},
        {"device_map": {"model": "cpu", "lm_head": torch.device("cpu")}},
    ],
    ids=str,
)
def test_the_device_has_two_names(tiny_runs, where):
    assert VQGANPipeline.from_pretrained(tiny_runs.pipeline, **where).device == torch.device("cpu")


def test_an_automatic_device_map_is_the_accelerator(tiny_runs):
    expected = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = VQGANPipeline.from_pretrained(tiny_runs.pipeline, device_map="auto")
    assert pipeline.device.type == pipeline.vqgan.device.type == expected.type


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"device_map": "balanced"}, "device_map: received 'balanced'; allowed are 'auto', a device"),
        ({"device_map": {"model": "cpu", "lm_head": "meta"}}, "device_map: received .* the same device"),
        ({"device_map": {}}, "device_map: received {}; allowed"),
        ({"device_map": "cpu", "device": "cpu"}, "device_map: received 'cpu' and device='cpu'; pass only one"),
        ({"subfolder": "../pipeline"}, "subfolder: received '../pipeline'; must be a path inside"),
        ({"subfolder": "/etc"}, "subfolder: received '/etc'"),
    ],
    ids=str,
)
def test_impossible_devices_and_subfolders_are_refused(tiny_runs, where, message):
    with pytest.raises(ValueError, match=message):
        VQGANPipeline.from_pretrained(tiny_runs.pipeline, **where)


def test_a_pipeline_in_a_subfolder_of_a_repository(tiny_runs, tiny_pipeline, tmp_path):
    cached = tmp_path / "cache" / "models--me--digits"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "v2").write_text("0" * 40)
    shutil.copytree(tiny_runs.pipeline, cached / "snapshots" / ("0" * 40) / "sub" / "folder")
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True, "revision": "v2"}
    pipeline = VQGANPipeline.from_pretrained("me/digits", subfolder="sub/folder", **options)
    assert torch.equal(greedy(pipeline), greedy(tiny_pipeline))
    with pytest.raises(FileNotFoundError, match=r"model_index\.json is missing"):
        VQGANPipeline.from_pretrained("me/digits", **options)
    with pytest.raises(FileNotFoundError):
        VQGANPipeline.from_pretrained("me/digits", subfolder="sub/folder", **{**options, "revision": "main"})


# ---------------------------------------------------------------------- adapters


@pytest.mark.parametrize("way", few(["save_pretrained", "push_to_hub"], "save_pretrained"))
def test_a_saved_pipeline_needs_no_adapter(tiny_runs, tiny_pipeline, tmp_path, way, monkeypatch):
    save_adapter(tiny_runs, tmp_path / "adapter")
    pipeline = VQGANPipeline.from_pretrained(tiny_runs.pipeline)
    pipeline.prior.load_adapter(tmp_path / "adapter")
    expected = greedy(pipeline)
    assert not torch.equal(expected, greedy(tiny_pipeline))
    if way == "save_pretrained":
        pipeline.save_pretrained(tmp_path / "saved")
    else:
        with HubServer(name="me") as hub:
            hub.use(monkeypatch)
            pipeline.push_to_hub("me/digits", token=hub.token)
        hub.save(tmp_path / "hub", newest=True)
        (tmp_path / "hub" / "me" / "digits").rename(tmp_path / "saved")
    shutil.rmtree(tmp_path / "adapter")
    assert not (tmp_path / "saved" / "prior" / "adapter_config.json").exists()
    loaded = VQGANPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(greedy(loaded), expected)
    parameters = f"| Prior | {sum(weight.numel() for weight in loaded.prior.parameters()):,} parameters |"
    assert parameters in (tmp_path / "saved" / "README.md").read_text()
    assert torch.equal(greedy(pipeline), expected)  # the pipeline in memory still has its adapter


@pytest.mark.parametrize("part", ["prior", "vqgan"])
def test_an_adapter_in_a_pipeline_is_refused(tiny_runs, folder, tmp_path, part):
    """The base of the adapter would be outside the folder."""
    save_adapter(tiny_runs, tmp_path / "adapter")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "adapter" / name, folder / part)
    with pytest.raises(ValueError, match=rf"{part}: this folder holds an adapter .*pipelines\.build merges"):
        VQGANPipeline.from_pretrained(folder)
    if part == "vqgan":
        with pytest.raises(ConfigError, match=r"tokenizer: received .*holds an adapter"):
            load_tokenizer(str(folder / part))


# ---------------------------------------------------------------------- folders that are refused


@pytest.mark.parametrize(
    "missing", few(["model.layers.1.mlp.up_proj", "lm_head", ""], "lm_head"), ids=["one", "lm_head", "all"]
)
def test_a_prior_without_all_its_weights_is_refused(folder, missing):
    change_weights(folder / "prior", without(missing))
    with pytest.raises(ValueError, match=r"the weights do not fit config\.json: \d+ missing: (lm_head|model)\."):
        VQGANPipeline.from_pretrained(folder)


@pytest.mark.parametrize("model_type", ["qwen3", "gemma"])
def test_a_prior_of_another_type_is_refused(folder, model_type):
    change_config(folder / "prior", model_type=model_type)
    with pytest.raises(ValueError, match=r"do not fit config\.json|model_type: received 'gemma'"):
        VQGANPipeline.from_pretrained(folder)


@pytest.mark.parametrize("part", ["vqgan", "prior"])
def test_a_part_of_another_run_is_refused(tiny_runs, tmp_path, part):
    """Also if it is complete, with its own checksums, and of the same shapes."""
    pipeline = VQGANPipeline.from_pretrained(tiny_runs.pipeline)
    name = "decoder.conv_out.bias" if part == "vqgan" else "model.norm.weight"
    pipeline.components[part].get_parameter(name).data += 1
    pipeline.save_pretrained(tmp_path / "other")
    folder = shutil.copytree(tiny_runs.pipeline, tmp_path / "pipeline")
    shutil.copytree(tmp_path / "other" / part, folder / part, dirs_exist_ok=True)
    with pytest.raises(Damaged, match=rf"{part}/checksums\.json: the contents of this file have changed"):
        VQGANPipeline.from_pretrained(folder)
    VQGANPipeline.from_pretrained(tmp_path / "other")


def test_every_changed_file_is_found_by_its_checksum(tiny_runs, tmp_path):
    folder = shutil.copytree(tiny_runs.pipeline, tmp_path / "pipeline")
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".json", ".safetensors") and path.parent.name != "card"
    ]
    assert {path.name for path in files} >= {"model_index.json", "generation_config.json", "preprocessor_config.json"}
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        with pytest.raises(ValueError, match=rf"{path}|checksums\.json"):
            VQGANPipeline.from_pretrained(folder)
        path.write_bytes(content)
    VQGANPipeline.from_pretrained(folder)


def test_a_fingerprint_of_other_weights_is_refused(folder):
    change_config(folder / "vqgan", fingerprint="0123456789abcdef")
    index = json.loads((folder / "model_index.json").read_text())
    index["token_layout"]["tokenizer_fingerprint"] = "0123456789abcdef"
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"vqgan: fingerprint: config\.json has 0123456789abcdef, but"):
        VQGANPipeline.from_pretrained(folder)
    with pytest.raises(ConfigError, match=r"tokenizer: .*fingerprint: config\.json has 0123456789abcdef, but"):
        load_tokenizer(str(folder / "vqgan"))


def test_planted_code_runs_only_if_the_caller_asks(folder, answers, tmp_path, monkeypatch):
    plant_code(folder / "prior", tmp_path / "mark")
    with pytest.raises(ValueError, match="trust_remote_code"):
        VQGANPipeline.from_pretrained(folder)
    assert answers == [] and not (tmp_path / "mark").exists()

    def load_it_trusting():
        prior = VQGANPipeline.from_pretrained(folder, trust_remote_code=True).prior
        (tmp_path / "found").write_text(f"{type(prior).__name__} {answers}")

    # in another process, because the planted classes stay
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    process = multiprocessing.get_context("fork").Process(target=load_it_trusting)
    process.start()
    process.join()
    assert (tmp_path / "found").read_text() == "PlantedModel []" and (tmp_path / "mark").exists()


@pytest.mark.parametrize("part", ["prior", "vqgan"])
def test_shards_elsewhere_are_refused(folder, tiny_runs, part):
    weights = load_file(folder / part / "model.safetensors")
    (folder / part / "model.safetensors").unlink()
    for place in (str(tiny_runs.pipeline / part / "model.safetensors"), "../model.safetensors"):
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, place)}
        (folder / part / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=r"weight_map: received .*in the same folder"):
            VQGANPipeline.from_pretrained(folder)
        if part == "vqgan":
            with pytest.raises(ConfigError, match=r"tokenizer: received .*index\.json: weight_map"):
                load_tokenizer(str(folder / part))


@pytest.mark.parametrize("part", ["prior", "vqgan"])
def test_pickled_weights_are_not_read(folder, part):
    torch.save(load_file(folder / part / "model.safetensors"), folder / part / "pytorch_model.bin")
    (folder / part / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors is missing; other formats"):
        VQGANPipeline.from_pretrained(folder)


def test_only_the_caller_chooses_a_kernel(folder):
    change_config(folder / "prior", attn_implementation="kernels-community/flash-attn2")
    for options in ({}, {"attn_implementation": "sdpa"}):
        with pytest.raises(ValueError, match=r"attn_implementation: received 'kernels-community/flash-attn2'"):
            VQGANPipeline.from_pretrained(folder, **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "this file is not JSON"),
        ("{", "this file is not JSON"),
        ("[" * 100_000, "this file is not JSON"),
        ("[]", "received a list; the file must hold a JSON object"),
        ("{}", "received an index of no class without token_layout"),
        (
            '{"_class_name": "StableDiffusionPipeline"}',
            "received an index of StableDiffusionPipeline without token_layout",
        ),
        ('{"token_layout": []}', r"token_layout: received \[\]"),
        ('{"token_layout": {}}', "token_layout.num_codes: received .*Field required"),
    ],
)
def test_malformed_indices(folder, text, message):
    (folder / "model_index.json").write_text(text)
    with pytest.raises(ValueError, match=rf"model_index\.json: {message}"):
        VQGANPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        pytest.param("num_codes", 31, marks=pytest.mark.slow),
        ("num_codes", 33),
        ("grid", [2, 8]),
        pytest.param("grid", [8, 8], marks=pytest.mark.slow),
        ("downsampling_factor", 8),
    ],
)
def test_a_layout_that_is_not_the_tokenizers_is_refused(folder, tiny_pipeline, field, value):
    index = json.loads((folder / "model_index.json").read_text())
    index["token_layout"][field] = value
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"token_layout\.{field}: received .*, but the tokenizer has"):
        VQGANPipeline.from_pretrained(folder)
    layout = replace(tiny_pipeline.layout, **{field: tuple(value) if isinstance(value, list) else value})
    with pytest.raises(ValueError, match=rf"token_layout\.{field}: received"):
        VQGANPipeline(**{**tiny_pipeline.components, "layout": layout})


def test_a_pipeline_refuses_a_tokenizer_with_another_fingerprint(tiny_runs, tiny_pipeline):
    layout, vqgan = tiny_pipeline.layout, VQGANModel.from_pretrained(tiny_runs.vqgan)
    layout.require_tokenizer(vqgan)
    layout.require_fingerprint(vqgan.config.fingerprint)
    for fingerprint in (None, "", "0123456789abcdef"):
        with pytest.raises(ValueError, match="tokenizer: received the tokenizer"):
            layout.require_fingerprint(fingerprint)
    vqgan.config.fingerprint = None
    layout.require_tokenizer(vqgan)  # computes the fingerprint
    vqgan.get_parameter("quant_conv.weight").data.zero_()
    with pytest.raises(ValueError, match="tokenizer: received the tokenizer"):
        layout.require_tokenizer(vqgan)
