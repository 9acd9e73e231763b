"""The command that measures a tokenizer, and the metrics that need a network."""

import json
from urllib.error import URLError

import pytest
import torch
from PIL import Image

from configs import ConfigError, load_config
from stage1_vqgan import DataConfig, VQGANConfig, VQGANImageProcessor, VQGANModel
from stage1_vqgan.evaluate import ReconstructionConfig, evaluate
from stage1_vqgan.evaluation import networks
from stage1_vqgan.evaluation.config import MetricsConfig
from stage1_vqgan.evaluation.networks import mean_of, network_metrics, perceptual_name
from stage1_vqgan.training.losses import PerceptualLoss
from tests.devices import DEVICE
from tests.feature_networks import small_network
from tests.image_files import write_folder
from tests.tiny import VQGAN

SMALL = MetricsConfig(perceptual_networks=[], feature_networks=["small"])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    torch.manual_seed(0)
    VQGANModel(VQGANConfig(**{**VQGAN, "in_channels": 3})).save_pretrained(folder)
    VQGANImageProcessor(16, 3).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("images"), {f"{n}.png": 25 * n for n in range(10)})


@pytest.fixture(autouse=True)
def without_downloads(monkeypatch, tmp_path):
    def fail(*arguments, **options):
        raise URLError("there is no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    real = networks.load_network
    monkeypatch.setattr(networks, "load_network", lambda name: small_network() if name == "small" else real(name))


def test_the_figures_and_what_they_were_measured_on(tokenizer, images, tmp_path, capsys):
    data = DataConfig(dataset=images, validation_fraction=0.5)
    config = ReconstructionConfig(
        model=tokenizer,
        data=data,
        image_size=[16, 24],
        metrics=SMALL,
        output_dir=str(tmp_path / "out"),
        num_sample_images=3,
    )
    found = evaluate(config)
    said = capsys.readouterr()
    assert json.loads(said.out) == json.loads((tmp_path / "out" / "metrics.json").read_text()) == found
    assert "5 images are few for a Frechet distance" in said.err
    assert found["frechet_distance/small"] > 0 and found["images"] == 5
    assert found["bits_per_pixel"] == 4 * 6 * 5 / (16 * 24)  # 4×6 codes, log2(32) bits each
    assert "ssim" in found and found["left_out"] == {"ms_ssim": "it needs images of 161 pixels"}
    setup = found["setup"]
    assert setup["image_size"] == [16, 24] and setup["split"] == "validation" and setup["dataset"] == images
    assert setup["fingerprint"] == VQGANModel.from_pretrained(tokenizer).config.fingerprint
    assert setup["versions"]["torch"] == torch.__version__.partition("+")[0]
    picture = Image.open(tmp_path / "out" / "reconstructions.png")
    assert picture.width > 3 * 64 and picture.height > 2 * 48


def test_a_size_that_the_tokenizer_cannot_have_is_named(tokenizer, images):
    config = ReconstructionConfig(model=tokenizer, data=DataConfig(dataset=images), image_size=18)
    with pytest.raises(ConfigError, match=r"- image_size: received 18; must be divisible") as caught:
        evaluate(config)
    assert [problem.key for problem in caught.value.problems] == ["image_size"]


def test_a_name_may_be_wrong():
    wrong = {"perceptual_networks": ["lpips/resnet"], "feature_networks": ["inception", "efficientnet-lite9"]}
    with pytest.raises(ConfigError) as caught:
        load_config(ReconstructionConfig, overrides={"model": "x", "data.dataset": "y", "metrics": wrong})
    first, second = caught.value.problems
    assert first.key == "metrics.perceptual_networks" and "lpips/resnet" in first.message
    assert second.key == "metrics.feature_networks" and "received 'efficientnet-lite9'; allowed are" in second.message
    unknown = MetricsConfig(perceptual_networks=[], feature_networks=["torchvision/resnet9"])
    with pytest.raises(ConfigError, match=r"metrics.feature_networks: received 'torchvision/resnet9'"):
        network_metrics(unknown, (32, 32), 3, DEVICE)


def test_a_figure_without_its_weights_is_left_out_with_the_reason(tmp_path):
    config = MetricsConfig(perceptual_networks=["lpips/squeeze"], feature_networks=["inception", "small"])
    found = network_metrics(config, (32, 32), 3, DEVICE)
    assert len(found.new) == 1 and found.left_out.keys() == {"rfid", "lpips/squeeze"}
    for reason, file in zip(found.left_out.values(), ("squeezenet1_1", "weights-inception-2015-12-05"), strict=True):
        assert "there is no network" in reason and f"at {tmp_path / 'torch' / 'hub' / 'checkpoints' / file}" in reason
        assert "loss." not in reason and "\n" not in reason


def test_a_figure_without_its_package_is_left_out_with_the_reason(monkeypatch):
    def missing(name):
        raise ImportError("needs the package timm; pip install 'tessella[metrics]'")

    monkeypatch.setattr(networks, "load_network", missing)
    found = network_metrics(SMALL, (32, 32), 3, DEVICE)
    assert found.left_out == {"frechet_distance/small": "needs the package timm; pip install 'tessella[metrics]'"}


def test_images_that_are_too_small_for_a_network_are_named(monkeypatch):
    monkeypatch.setattr(networks, "PerceptualLoss", lambda backbone: PerceptualLoss(backbone, "random"))
    config = MetricsConfig(perceptual_networks=["lpips/squeeze"], feature_networks=[])
    assert network_metrics(config, (64, 31), 3, DEVICE).left_out == {
        "lpips/squeeze": "images of 64×31 pixels; lpips/squeeze needs 32"
    }
    assert network_metrics(config, (64, 32), 3, DEVICE).left_out == {}


def test_the_perceptual_distance_is_the_mean_of_lpips_over_images():
    """Compared with the package lpips, image by image; the last batch is smaller."""
    torch.manual_seed(0)
    loss = PerceptualLoss("squeeze", "random").to(DEVICE)
    images, others = (torch.rand(5, 3, 32, 32, device=DEVICE) * 2 - 1 for _ in range(2))
    metric = mean_of(perceptual_name("squeeze", "pretrained"), loss, DEVICE)()
    for pair in zip(others.split(3), images.split(3), strict=True):
        metric.add(*pair)
    expected = [loss.lpips(other[None], image[None]).item() for other, image in zip(others, images, strict=True)]
    assert metric.figures(lambda total: total) == {"lpips/squeeze": pytest.approx(sum(expected) / 5, rel=1e-4)}
    assert perceptual_name("stlpips_vgg", "file.pth") == "stlpips/vgg"
    assert perceptual_name("vgg", "random") == "lpips/vgg-random"
