"""Tokenizers of other sizes than a square: sizes, levels with attention, and folders that an earlier version saved."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors.torch import save_file

from configs import ConfigError, load_config
from stage1_vqgan import Stage1Config, VQGANConfig, VQGANModel
from stage1_vqgan.pretrained import load_image_processor, load_tokenizer
from stage1_vqgan.training.run import train
from tests.devices import on_device
from tests.model_folders import change_config, change_weights

pytestmark = on_device

SETTINGS = {
    "image_size": 16,
    "base_channels": 8,
    "channel_multiplier": [1, 2, 2],
    "num_res_blocks": 1,
    "norm_num_groups": 4,
    "latent_channels": 8,
    "embed_dim": 4,
    "num_embeddings": 32,
}
# What an earlier version saved and computed: attention by resolution, one of which is that of no level; a fingerprint
# that depends on the size; and the codes of `PIXELS`, each at least 2e-4 nearer than the next one.
OLD_CONFIG = {
    "architectures": ["VQGANModel"],
    "attn_resolutions": [8, 5],
    "dropout": 0.0,
    "dtype": "float32",
    "fingerprint": "b82d6ae8bda294be",
    "in_channels": 3,
    "model_type": "tessella_vqgan",
    "quantizer": "vq",
    "quantizer_options": {},
    "transformers_version": "5.24.0",
    **SETTINGS,
}
OLD_CODES = [
    [[31, 31, 31, 31], [6, 8, 31, 31], [31, 5, 14, 31], [31, 8, 11, 31]],
    [[9, 31, 11, 8], [9, 31, 8, 5], [9, 31, 31, 5], [6, 31, 31, 11]],
]
PIXELS = ((torch.arange(2 * 3 * 16 * 16) * 40503 // 7 % 255) / 127.5 - 1).view(2, 3, 16, 16)


def make(**changes):
    torch.manual_seed(0)
    return VQGANModel(VQGANConfig(**SETTINGS | changes)).eval()


def exact_weights(model):
    """Weights that are the same numbers on every machine, and need all bits of float32."""
    weights = {}
    for number, (name, value) in enumerate(sorted(model.named_parameters())):
        numbers = ((torch.arange(value.numel()) * 40503 + number * 7919) % 1021 - 510) / 509
        if value.ndim > 1 and "quantize" not in name:
            numbers /= 2 ** (value[0].numel().bit_length() // 2 - 1)
        weights[name] = (numbers + ("norm" in name and name.endswith("weight"))).view_as(value)
    return weights


@pytest.fixture
def old(tmp_path):
    """The folder of a tokenizer as an earlier version saved it."""
    folder = tmp_path / "old"
    folder.mkdir()
    save_file(exact_weights(make(attn_levels=[1])), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(OLD_CONFIG))
    return folder


def test_a_folder_of_an_earlier_version(old, tmp_path):
    """It has the same codes. Its fingerprint stays as it was, and is still checked, however often it is saved."""
    model = VQGANModel.from_pretrained(old)
    assert model.config.attn_levels == [1] and model.config.attn_resolutions is None
    for name, change in {"again": {}, "larger": {"image_size": [32, 16]}, "last": {}}.items():
        model.save_pretrained(tmp_path / name)
        assert "attn_resolutions" not in json.loads((tmp_path / name / "config.json").read_text())
        model = VQGANModel.from_pretrained(tmp_path / name, **change)
        assert model.config.fingerprint == OLD_CONFIG["fingerprint"] == model.compute_fingerprint()
        assert model.encode(PIXELS.to(model.device)).codes.tolist() == OLD_CODES
    assert load_tokenizer(str(tmp_path / "last")).config.fingerprint == OLD_CONFIG["fingerprint"]
    change_weights(tmp_path / "last", lambda weights: weights | {"quant_conv.bias": weights["quant_conv.bias"] + 1})
    with pytest.raises(ValueError, match=r"fingerprint: config\.json has b82d6ae8bda294be, but"):
        VQGANModel.from_pretrained(tmp_path / "last")
    model.config.fingerprint = None  # as training does
    model.save_pretrained(tmp_path / "trained")
    trained = VQGANModel.from_pretrained(tmp_path / "trained").config
    assert trained.fingerprint != OLD_CONFIG["fingerprint"] and trained.fingerprint_fields is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"attn_resolutions": [16, 5]}, "missing: .*unexpected: "),
        ({"attn_resolutions": [8]}, r"fingerprint: config\.json has b82d6ae8bda294be"),
        ({"image_size": 32, "attn_resolutions": [16]}, r"fingerprint: config\.json has b82d6ae8bda294be"),
        ({"attn_resolutions": "x"}, "attn_resolutions"),
        ({"image_size": "x"}, "image_size"),
    ],
    ids=str,
)
def test_a_changed_folder_of_an_earlier_version_is_refused(old, change, message):
    change_config(old, **change)
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(str(old))


def test_one_tokenizer_at_several_sizes(tmp_path):
    """Another size neither moves the attention nor changes the fingerprint."""
    model = make(attn_levels=[1])
    model.save_pretrained(tmp_path)
    for size in (16, 32, [16, 32], [48, 8]):
        other = VQGANModel.from_pretrained(tmp_path, image_size=size)
        assert other.config.fingerprint == model.config.fingerprint == other.compute_fingerprint()
        assert other.config.fingerprint == make(attn_levels=[1], image_size=size).compute_fingerprint()
        height, width = other.config.image_shape
        assert other.config.grid == (height // 4, width // 4) and other.config.attn_levels == [1]
        pixels = torch.rand(1, 3, height, width, device=model.device) * 2 - 1
        assert torch.equal(other.encode(pixels).codes, model.encode(pixels).codes)
    with pytest.raises(ValueError, match=r"image_size: received \[16, 18\]; must be divisible by the downsampling"):
        VQGANModel.from_pretrained(tmp_path, image_size=[16, 18])


@pytest.mark.parametrize(
    "size, resolutions, levels",
    [(16, [8], [1]), ([8, 16], [8], [0]), ([16, 8], [2, 4], [1, 2]), (16, [], []), (32, None, [1]), (128, None, [])],
)
def test_attention_by_resolution_becomes_levels(size, resolutions, levels):
    """By the shorter side; by default 16 pixels, if a level has so many."""
    config = VQGANConfig(**SETTINGS | {"image_size": size}, attn_resolutions=resolutions)
    assert config.attn_levels == levels and "attn_resolutions" not in config.to_dict()
    attends = [len(level.attn) > 0 for level in VQGANModel(config).encoder.down]
    assert attends == [level in levels for level in range(3)]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"attn_resolutions": [8, 7]}, r"attn_resolutions: received \[8, 7\]; .* 16, 8, 4"),
        ({"attn_resolutions": [8], "attn_levels": [1]}, "attn_resolutions: .*set one to null"),
        ({"attn_levels": [3]}, r"attn_levels: received \[3\]; must be among the levels, 0 \(the largest\) to 2"),
        ({"image_size": [16]}, r"image_size: received \[16\]; must be the side of a square, or \[height, width\]"),
        ({"image_size": [0, 16]}, r"image_size: received \[0, 16\]; must be at least 1"),
    ],
)
def test_sizes_and_levels_that_no_tokenizer_has(change, message):
    with pytest.raises(StrictDataclassError, match=message):
        VQGANConfig(**SETTINGS | change)


def test_a_training_on_images_that_are_no_squares(tmp_path):
    """It trains, is saved with its image processor, and is fine-tuned at another size, with its attention."""
    values = {
        "output_dir": str(tmp_path / "wide"),
        "data.dataset": "digits",
        "model": {**SETTINGS, "image_size": [16, 24], "in_channels": 1, "attn_levels": [1]},
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "num_sample_images": 2,
        "loss.perceptual_weight": 0,
        "discriminator.num_layers": 2,
        "discriminator.base_channels": 8,
    }
    train(load_config(Stage1Config, None, values))
    model = VQGANModel.from_pretrained(tmp_path / "wide")
    processor = load_image_processor(tmp_path / "wide", model.config)
    assert model.config.grid == (4, 6) and processor.image_shape == (16, 24)
    assert model.encode(processor(PIXELS[0, :1] / 2 + 0.5)["pixel_values"]).codes.shape == (1, 4, 6)
    (picture,) = (tmp_path / "wide" / "reconstructions").iterdir()
    assert Image.open(picture).height > 2 * 3 * 16 and Image.open(picture).width > 2 * 3 * 24  # enlarged three times
    changes = {"model": {"image_size": [32, 16]}, "output_dir": str(tmp_path / "tall")}
    config = load_config(Stage1Config, None, values | changes | {"model_name_or_path": str(tmp_path / "wide")})
    assert train(config).config.grid == (8, 4)
    assert VQGANModel.from_pretrained(tmp_path / "tall").config.attn_levels == [1]


@pytest.mark.parametrize(
    "changes, key, words",
    [
        ({"loss.perceptual_weight": 1, "loss.lpips_backbone": "alex"}, "model.image_size", "needs 32 pixels"),
        ({"discriminator.num_layers": 3, "model.image_size": [16, 64]}, "discriminator.num_layers", "images of 16 "),
        ({"model.image_size": [16, 2**40]}, "model.image_size", "for their pixels"),
    ],
)
def test_the_shorter_side_decides_what_fits(changes, key, words):
    values = {"data.dataset": "digits", "output_dir": "x", "max_steps": 2, "loss.perceptual_weight": 0}
    small = {f"model.{name}": value for name, value in (SETTINGS | {"image_size": [16, 64]}).items()}
    with pytest.raises(ConfigError) as refused:
        load_config(Stage1Config, None, values | small | {"discriminator.num_layers": 2} | changes)
    assert [(problem.key, words in problem.message) for problem in refused.value.problems] == [(key, True)]


@pytest.mark.slow
def test_a_trained_tokenizer_is_loaded_at_another_size(tmp_path):
    make(attn_levels=[1]).save_pretrained(tmp_path)
    for changes in ({"image_size": 32}, {"image_size": [8, 32], "attn_resolutions": [4]}, {"attn_levels": [1]}):
        assert load_tokenizer(str(tmp_path), **changes).config.attn_levels == [1]
    for changes, message in [
        ({"image_size": 30}, r"model\.image_size: received 30; must be divisible"),
        ({"attn_levels": [2]}, r"model\.attn_levels: received \[2\], but .* has \[1\]; leave it out"),
        ({"image_size": 32, "attn_resolutions": [8]}, r"model\.attn_levels: received \[2\], but .* has \[1\]"),
        ({"attn_resolutions": [7]}, r"model\.attn_resolutions: received \[7\]; .* 16, 8, 4"),
    ]:
        with pytest.raises(ConfigError, match=message) as refused:
            load_tokenizer(str(tmp_path), **changes)
        assert len(refused.value.problems) == 1
