"""The parts of a pipeline's folder where this package is absent, and the folder's copy of the tokenizer for Janus."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from sklearn.datasets import load_digits
from transformers import JanusVQVAE

from configs import ConfigError
from configs.checksums import verify_checksums
from pipelines import VQGANPipeline, hub
from pipelines.build import BuildConfig, build
from stage1_vqgan import VQGANConfig, VQGANImageProcessor, VQGANModel
from stage2_prior import TokenLayout
from tests.devices import DEVICE
from tests.hub_server import HubServer

ROOT = Path(__file__).resolve().parents[2]

# Loads the parts of a pipeline by the Auto classes, then runs the example of the README. It saves what comes out.
ALONE = """
import sys, torch
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in {"configs", "stage1_vqgan", "stage2_prior", "pipelines", "tessella"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
try:
    import stage1_vqgan
    raise SystemExit("this package is here")
except ModuleNotFoundError:
    pass

from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM
root, pixels, example, result = sys.argv[1:]
pixels, codes = torch.load(pixels), []
for place in ({"pretrained_model_name_or_path": root + "/vqgan"},
              {"pretrained_model_name_or_path": root, "subfolder": "vqgan"}):
    model = AutoModel.from_pretrained(**place, trust_remote_code=True)
    with torch.no_grad():
        codes.append(model.encode(pixels).codes)
processor = AutoImageProcessor.from_pretrained(root + "/vqgan", trust_remote_code=True)
assert (processor.image_shape, processor.num_channels) == ((16, 16), 1)
assert (type(model).__name__, type(processor).__name__) == ("VQGANModel", "VQGANImageProcessor")
prior = AutoModelForCausalLM.from_pretrained(root, subfolder="prior")
greedy = prior.generate(torch.tensor([[model.config.num_embeddings + 3]]), do_sample=False)[:, 1:].view(1, 4, 4)
with torch.no_grad():
    auto = {"reconstruction": model(pixels).reconstruction, "codes": codes, "greedy": greedy,
            "generated": processor.postprocess(model.decode_codes(greedy), "pt")}

torch.manual_seed(0)
stock = {}
exec(example, stock)
with torch.no_grad():
    encoded = stock["vqgan"].encode(stock["pixels"][None]).image_tokens
stock["image"].save("image.png")
assert all(type(stock[name]).__module__.startswith("transformers.models.") for name in ("prior", "vqgan"))
torch.save({"auto": auto, "stock": {"codes": stock["codes"], "pixels": stock["pixels"], "encoded": encoded}}, result)
"""


@pytest.fixture(scope="module")
def pixels(tiny_pipeline):
    digits = [Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8)) for image in load_digits().images[:9]]
    return tiny_pipeline.image_processor(digits)["pixel_values"]


def janus_pipeline(random_prior, **changes):
    """A random pipeline for colour images of 8 pixels, whose tokenizer fits JanusVQVAE."""
    torch.manual_seed(0)
    config = VQGANConfig(
        image_size=8,
        base_channels=32,
        channel_multiplier=[1, 1, 2],
        num_res_blocks=1,
        attn_resolutions=[2],
        latent_channels=8,
        embed_dim=4,
        num_embeddings=40,
        **{"quantizer_options": {"l2_normalize": True}, **changes},
    )
    vqgan = VQGANModel(config).to(DEVICE)
    layout = TokenLayout(40, tuple("abcde"), (2, 2), 4, vqgan.compute_fingerprint())
    pipeline = VQGANPipeline(vqgan, random_prior("llama", layout), VQGANImageProcessor(8), layout)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def carrying(random_prior):
    return janus_pipeline(random_prior)


@pytest.fixture(scope="module")
def alone(tiny_runs, pixels, carrying, tmp_path_factory):
    """What a process computes in which this package cannot be imported."""
    folder = tmp_path_factory.mktemp("alone")
    carrying.save_pretrained(folder / "runs/mine/pipeline", janus=True)
    torch.save(pixels, folder / "pixels.pt")
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "pipelines/README.md").read_text(), re.M | re.S)
    (example,) = [block for block in blocks if "JanusVQVAE" in block]
    arguments = [str(tiny_runs.pipeline), "pixels.pt", example, "result.pt"]
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules")}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-P", "-c", ALONE, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(**torch.load(folder / "result.pt"), image=Image.open(folder / "image.png"))


@torch.no_grad()
def test_the_auto_classes(alone, pixels, tiny_pipeline):
    for codes in alone.auto["codes"]:
        assert torch.equal(codes, tiny_pipeline.vqgan.encode(pixels.to(DEVICE)).codes.cpu())
    ours = tiny_pipeline.vqgan(pixels.to(DEVICE)).reconstruction
    torch.testing.assert_close(alone.auto["reconstruction"], ours.cpu())
    out = tiny_pipeline.generate(class_labels=[3], temperature=0.0, output_type="pt")
    assert torch.equal(alone.auto["greedy"], out.codes.cpu())
    torch.testing.assert_close(alone.auto["generated"], out.images.cpu())


def test_the_stock_classes(alone, carrying):
    """The example of the README makes an image that equals ours."""
    codes = alone.stock["codes"].view(1, 2, 2)
    assert len(codes.unique()) > 1
    ours = carrying.vqgan.decode_codes(codes.to(DEVICE))
    torch.testing.assert_close(alone.stock["pixels"][None], ours.detach().cpu(), atol=5e-5, rtol=1e-5)
    difference = np.asarray(alone.image).astype(int) - np.asarray(carrying.decode(codes)[0])
    assert alone.image.size == (8, 8) and abs(difference).max() <= 1  # a value may lie between two levels
    with torch.no_grad():
        assert torch.equal(alone.stock["encoded"], carrying.vqgan.encode(ours).codes.flatten().cpu())


def test_the_copy_follows_the_tokenizer(carrying, random_prior, tmp_path):
    """It is part of the checksums, and saving another tokenizer into the folder writes a new one."""
    carrying.save_pretrained(tmp_path, janus=True)
    other = janus_pipeline(random_prior)
    with torch.no_grad():
        other.vqgan.decoder.conv_out.bias += 1
    other.save_pretrained(tmp_path)
    codes = torch.tensor([[[3, 1], [4, 1]]])
    stock = JanusVQVAE.from_pretrained(tmp_path, subfolder="janus")
    ours = VQGANPipeline.from_pretrained(tmp_path).vqgan
    torch.testing.assert_close(stock.decode(codes.flatten(1)), ours.decode_codes(codes), atol=5e-5, rtol=1e-5)
    (tmp_path / "janus/config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"janus/config\.json"):
        verify_checksums(tmp_path / "janus")
    (tmp_path / "janus/checksums.json").write_text("{}")
    with pytest.raises(ValueError, match=r"janus/checksums\.json"):
        VQGANPipeline.from_pretrained(tmp_path)


def test_what_a_download_of_the_pipeline_takes(carrying, tmp_path, monkeypatch):
    """Not the copy itself; but the checksums, which name it."""
    carrying.save_pretrained(tmp_path / "hub", janus=True)

    def download(name, allow_patterns, **options):
        names = [path.relative_to(tmp_path / "hub").as_posix() for path in (tmp_path / "hub").rglob("*.*")]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / "hub" / name, tmp_path / "cache" / name)
        return str(tmp_path / "cache")

    monkeypatch.setattr(hub, "snapshot_download", download)
    VQGANPipeline.from_pretrained("me/mine")
    assert [path.name for path in (tmp_path / "cache/janus").iterdir()] == ["checksums.json"]


def test_a_push_holds_it_only_on_request(carrying, monkeypatch):
    found = []
    with HubServer() as repositories:
        repositories.use(monkeypatch)
        for options in ({"janus": True}, {}):
            carrying.push_to_hub("me/mine", token=repositories.token, **options)
            found.append([name for name in repositories.names("me/mine") if name.startswith("janus/")])
    assert sorted(found[0]) == ["janus/checksums.json", "janus/config.json", "janus/model.safetensors"]
    assert found[1] == []


def test_build_refuses_a_tokenizer_that_does_not_fit(tiny_runs, tmp_path):
    parts = {"tokenizer": str(tiny_runs.vqgan), "prior": str(tiny_runs.prior), "output_dir": str(tmp_path / "out")}
    with pytest.raises(ConfigError, match="janus: its norm_num_groups is 4; a JanusVQVAE only supports 32"):
        build(BuildConfig(**parts, janus=True))


def test_a_tokenizer_that_does_not_fit(random_prior, tmp_path):
    with pytest.raises(ValueError, match=r"janus: its quantizer_options\.l2_normalize is false"):
        janus_pipeline(random_prior, quantizer_options={}).save_pretrained(tmp_path, janus=True)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
