"""A feature network of one's own: what it learns and saves, how it is loaded and used, and what is refused."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from configs import ConfigError, check, load_config
from configs.interruption import Diverged
from configs.staging import SAVING
from pipelines.evaluation.generation import generation_metrics, networks_in_folders
from pipelines.evaluation.generation_config import GenerationMetricsConfig
from stage1_vqgan import DataConfig, ImageKey, load_images
from stage1_vqgan.data.dataset import ImageDataset
from stage1_vqgan.evaluation.config import MetricsConfig
from stage1_vqgan.evaluation.networks import network_metrics
from stage1_vqgan.features.config import FeaturesConfig
from stage1_vqgan.features.run import train
from stage1_vqgan.networks import load_network
from stage1_vqgan.training.step import VQGANTrainer
from tests.devices import DEVICE
from tests.image_sets import TensorImages, random_images
from tests.stage1_vqgan.training import test_step as steps

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")
CLASSES = ("down", "right")


def write_ramps(folder, channels=0, count=30):
    """A folder of images: gray PNGs of 12×10 pixels, or arrays, that become lighter to the bottom or to the right."""
    rng = np.random.default_rng(0)
    for number in range(2 * count):
        name = CLASSES[number % 2]
        ramp = np.linspace(0, 160, 12)[:, None] if name == "down" else np.linspace(0, 160, 10)[None]
        pixels = (ramp + rng.integers(0, 95, (12, 10, channels or 1)).transpose(2, 0, 1)).astype(np.uint8)
        path = folder / name / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if channels:
            np.save(path.with_suffix(".npy"), pixels)
        else:
            Image.fromarray(pixels[0]).save(path)
    return str(folder)


def make_config(images, output, **changes):
    values = {
        "data": {"dataset": images, "validation_fraction": 0.25, "augmentation": {"translate": 0.1}},
        "output_dir": str(output),
        "image_size": [12, 10],
        "in_channels": 1,
        "max_steps": 12,
        "per_device_train_batch_size": 8,
    }
    return load_config(FeaturesConfig, None, {**values, **changes})


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_ramps(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def network(images, tmp_path_factory):
    """The folder of a trained network, to be read only."""
    folder = tmp_path_factory.mktemp("features") / "network"
    train(make_config(images, folder))
    return folder


def validation_images(images):
    """Pixels of the validation images, as a tokenizer gets them, and their labels."""
    source = load_images(DataConfig(dataset=images, validation_fraction=0.25))[1]
    batch = ImageDataset(source, (12, 10), 1).__getitems__([ImageKey(0, row) for row in range(len(source))])
    return batch.images(), torch.from_numpy(source.labels)


def test_it_is_a_stock_classifier_that_has_learnt_the_classes(network, images):
    stock = AutoModelForImageClassification.from_pretrained(network).eval()
    pixels, labels = validation_images(images)
    x = F.interpolate(pixels, (64, 64), mode="bilinear", antialias=True)
    with torch.no_grad():
        predicted = torch.tensor([stock(one[None]).logits.argmax() for one in x])
    settings = json.loads((network / "config.json").read_text())
    assert settings["validation_accuracy"] == (predicted == labels).float().mean() > 0.9
    assert settings["validation_images"] == len(labels) == 15
    assert settings["num_channels"] == 1 and settings["image_shape"] == [12, 10]
    assert tuple(settings["id2label"].values()) == CLASSES
    assert AutoImageProcessor.from_pretrained(network).size == {"height": 64, "width": 64}
    assert check(load_config(FeaturesConfig, str(network / "config.yaml"))).data.dataset == images


def test_it_loads_as_a_frozen_network(network, images):
    stock = AutoModelForImageClassification.from_pretrained(network).eval()
    frozen, pixels = load_network(f"transformers/{network}"), validation_images(images)[0]
    assert (frozen.channels, frozen.size, frozen.least_size) == (1, 64, 1)
    found, x = frozen(pixels), F.interpolate(pixels, (64, 64), mode="bilinear", antialias=True)
    out = stock(x, output_hidden_states=True)
    torch.testing.assert_close(found.logits, out.logits)
    torch.testing.assert_close(found.pooled, out.hidden_states[-1].mean((2, 3)))
    assert frozen.widths == [32, 64, 128, 256]
    with pytest.raises(ValueError, match=r"images: received 3 channels; .*network takes only images of 1"):
        frozen(torch.zeros(1, 3, 64, 64))


def test_it_is_a_metric_of_gray_images_and_a_loss(network, images):
    name = f"transformers/{network}"
    config = MetricsConfig(perceptual_networks=[], feature_networks=[name])
    pixels = validation_images(images)[0].to(DEVICE)
    (new,) = network_metrics(config, (12, 10), 1, DEVICE).new
    same, noise = new(), new()
    same.add(pixels, pixels)
    noise.add(pixels + 0.5 * torch.randn(pixels.shape, device=DEVICE), pixels)
    figures = [metric.figures(lambda total: total)[f"frechet_distance/{name}"] for metric in (same, noise)]
    assert abs(figures[0]) < 1e-3 < figures[1]
    with pytest.raises(ConfigError, match=r"metrics.feature_networks: images: received 3 channels; .* images of 1"):
        network_metrics(config, (12, 10), 3, DEVICE)
    loss = {"loss.features_weight": 1, "loss.features_network": name, "loss.adversarial_weight": 0}
    trainer = VQGANTrainer(steps.make_config(**loss, **{"model.in_channels": 1}), Accelerator())
    assert trainer.step(steps.make_images(0)[:, :1], 0)["loss/features"] > 0
    with pytest.raises(ConfigError, match=r"loss.features_network: images: received 3 channels; .* images of 1"):
        VQGANTrainer(steps.make_config(**loss), Accelerator())


def test_a_metric_of_generated_images_needs_its_channels(network, tmp_path):
    config = GenerationMetricsConfig(feature_networks=[f"transformers/{network}"])
    colour = TensorImages(random_images(12))
    with pytest.raises(ConfigError, match=r"metrics.feature_networks: images: received 3 channels; .* images of 1"):
        generation_metrics(config, colour, colour, Accelerator(), tmp_path)


def test_another_network_in_the_same_folder_is_another_input(network, tmp_path):
    folder = shutil.copytree(network, tmp_path / "network")
    config = GenerationMetricsConfig(feature_networks=[f"transformers/{folder}@64", "efficientnet-lite0", "dinov2"])
    before = networks_in_folders(config)
    assert list(before) == [f"transformers/{folder}@64"]
    weights = load_file(folder / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    assert networks_in_folders(config) != before


def test_the_same_seed_gives_the_same_network(images, tmp_path):
    for name, workers in (("a", 0), ("b", 1)):
        train(make_config(images, tmp_path / name, max_steps=2, dataloader_num_workers=workers))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_any_number_of_channels(tmp_path, capsys):
    images = write_ramps(tmp_path / "arrays", channels=5, count=8)
    train(make_config(images, tmp_path / "network", in_channels=5, max_steps=1, per_device_train_batch_size=4))
    said = capsys.readouterr().out
    assert "channels: 5" in said and "of 4 validation images are recognised" in said
    found = load_network(f"transformers/{tmp_path / 'network'}@96")
    assert (found.channels, found.size) == (5, 96) and found(torch.zeros(2, 5, 40, 20)).pooled.shape == (2, 256)


@pytest.mark.parametrize(
    "changes, key, words",
    [
        ({"image_size": [8, 8, 8]}, "image_size", "[height, width]"),
        ({"data.augmentation": {"ten_crop": True, "max_zoom": 1.1}}, "data.augmentation.ten_crop", "random_crop"),
        ({"data.streaming": True}, "data.streaming", "labels"),
        ({"data.use_labels": False}, "data.use_labels", "labels"),
        ({"per_device_train_batch_size": 1}, "per_device_train_batch_size", "from 2 to"),
        ({"num_train_epochs": 3}, "num_train_epochs", "max_steps"),
    ],
)
def test_settings_that_are_refused(images, tmp_path, changes, key, words):
    with pytest.raises(ConfigError) as error:
        make_config(images, tmp_path, **changes)
    assert any(problem.key == key and words in problem.message for problem in error.value.problems), error.value


def test_images_without_two_classes_are_refused(images, tmp_path):
    one_class = tmp_path / "images.csv"
    one_class.write_text("file_name,label\n" + "".join(f"{images}/down/{row:02}.png,down\n" for row in range(0, 40, 2)))
    with pytest.raises(ConfigError, match=r"data.label_column: .* has one class, 'down'; name a column with two"):
        train(make_config(str(one_class), tmp_path / "network"))
    with pytest.raises(ConfigError, match=r"data.label_column: .* has no labels; name a column with two classes"):
        train(make_config(f"{images}/down", tmp_path / "network"))
    assert not (tmp_path / "network" / "config.json").exists()


def test_a_folder_with_files_is_refused_and_kept(images, network):
    before = (network / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"output_dir: received .* which holds 'checksums.json'; choose a new folder"):
        train(make_config(images, network))
    assert (network / "model.safetensors").read_bytes() == before


def test_a_training_that_was_killed_while_it_saved_starts_anew(images, tmp_path):
    part = tmp_path / "network" / SAVING / "model.safetensors"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"a part of it")
    train(make_config(images, tmp_path / "network", max_steps=2))
    assert (tmp_path / "network" / "config.json").is_file() and not part.parent.exists()


@pytest.mark.slow
def test_too_many_damaged_images_end_the_training(images, tmp_path):
    folder = shutil.copytree(images, tmp_path / "images")
    for path in list(folder.glob("down/*.png"))[:10]:
        path.write_bytes(b"no image")
    config = make_config(str(folder), tmp_path / "network", max_steps=1)
    with pytest.raises(ConfigError, match=r"data.max_skipped_fraction: received 0.01"):
        train(config)
    train(replace(config, data=replace(config.data, max_skipped_fraction=0.9)))
    assert (tmp_path / "network" / "config.json").is_file()


def test_weights_that_are_not_finite_are_not_saved(images, tmp_path):
    with pytest.raises(Diverged, match="a weight is not finite after 3 steps; try a lower learning_rate"):
        train(make_config(images, tmp_path / "network", learning_rate=1e30, max_steps=3))
    assert not (tmp_path / "network" / "config.json").exists()


def test_a_damaged_folder_is_refused(network, tmp_path):
    folder = shutil.copytree(network, tmp_path / "network")
    name, file = f"transformers/{folder}", folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-4] + b"xxxx")
    with pytest.raises(ValueError, match=r"model\.safetensors: the contents of this file have changed"):
        load_network(name)
    (folder / "checksums.json").unlink()
    file.write_bytes(content[:1000])
    with pytest.raises(ValueError, match=rf"received '{name}'; its weights are damaged"):
        load_network(name)
    weights = load_file(network / "model.safetensors")
    del weights["resnet.encoder.stages.0.layers.0.layer.0.convolution.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lack weights: resnet\.encoder\.stages\.0\.layers\.0\.layer\.0\.convolution"):
        load_network(name)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"'{name}' could not be loaded"):
        load_network(name)
    with pytest.raises(FileNotFoundError, match="'transformers/runs/mine/nowhere' could not be loaded"):
        load_network("transformers/runs/mine/nowhere")
