"""Loading a tokenizer, its image processor and its discriminator from a folder that may be damaged or hostile."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from configs import ConfigError
from configs.checksums import CHECKSUMS_NAME, write_checksums
from stage1_vqgan import VQGANConfig, VQGANImageProcessor, VQGANModel, load_image_processor, load_tokenizer, load_vqgan
from stage1_vqgan.pretrained import DISCRIMINATOR_NAME, save_discriminator, start_discriminator
from stage1_vqgan.training.discriminator import PatchDiscriminator
from tests import tiny
from tests.fuzz.harness import planted_pickle
from tests.model_folders import change_config, change_weights


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with random weights, with its image processor, a discriminator, and checksums."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    VQGANModel(VQGANConfig(**tiny.VQGAN)).save_pretrained(folder)
    VQGANImageProcessor(16, 1).save_pretrained(folder)
    save_discriminator(discriminator(), SETTINGS, folder)
    write_checksums(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy without checksums."""
    shutil.copytree(saved, tmp_path / "vqgan")
    (tmp_path / "vqgan" / CHECKSUMS_NAME).unlink()
    return tmp_path / "vqgan"


SETTINGS = {"num_layers": 2, "norm_type": "batch", "network": "/home/me/dino"}


def discriminator() -> PatchDiscriminator:
    return PatchDiscriminator(1, base_channels=8, num_layers=2)


def assert_refused(folder: Path, message: str) -> None:
    """Every function that loads a tokenizer refuses the folder."""
    with pytest.raises((ValueError, OSError), match=message):
        load_vqgan(folder)
    with pytest.raises(
        ConfigError, match=rf"tokenizer: received '{folder}'; no tokenizer can be loaded from it: "
    ) as error:
        load_tokenizer(str(folder))
    assert len(error.value.problems[0].message) < 600


def test_every_changed_file_is_found_by_its_checksum(saved, tmp_path):
    for name in ("config.json", "preprocessor_config.json", "model.safetensors", DISCRIMINATOR_NAME):
        folder = shutil.copytree(saved, tmp_path / name)
        data = bytearray((folder / name).read_bytes())
        data[-3] ^= 1
        (folder / name).write_bytes(data)
        assert_refused(folder, rf"{name}: the contents of this file have changed")
        (folder / name).unlink()
        with pytest.raises(ConfigError, match=rf"{name}( is missing|: this file is missing)|holds no trained"):
            load_tokenizer(str(folder))


def test_checksums_that_are_not_a_list_of_files(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "vqgan")
    for listed, message in {
        '{"config.json": 3}': "config.json: received 3; the list must hold",
        '{"../secret": {}}': r"may name only files inside",
        '{"/etc/passwd": {}}': r"may name only files inside",
        "[]": "must hold a JSON object",
        "{}": "config.json: this file was added",
    }.items():
        (folder / CHECKSUMS_NAME).write_text(listed)
        assert_refused(folder, rf"{message}.*remove {folder}/checksums\.json")


@pytest.mark.parametrize(
    "change",
    [
        {"num_embeddings": 2**40},
        {"num_embeddings": 10**9},
        {"base_channels": 2**20},
        {"latent_channels": 10**8},
        pytest.param({"channel_multiplier": [1] * 10**6}, marks=pytest.mark.slow),
        {"num_res_blocks": 10**6},
        {"image_size": 2**70},
    ],
    ids=lambda change: next(iter(change)),
)
def test_sizes_far_above_the_weights_are_refused_before_they_take_memory(folder, change, monkeypatch):
    monkeypatch.setattr("stage1_vqgan.VQGANModel.from_pretrained", lambda *a, **k: pytest.fail("was built"))
    change_config(folder, **change)
    assert_refused(folder, r"received|do not fit config\.json: \d+ misshapen: \S+ \(.*\), needed \(")


@pytest.mark.parametrize(
    "change", [{"dropout": "x"}, {"dtype": "float3"}, {"quantizer": "no"}, {"id2label": 3}, {"fingerprint": 3}], ids=str
)
def test_malformed_configurations(folder, change):
    change_config(folder, **change)
    assert_refused(folder, rf"^{folder}[^\n]*$")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool])
def test_weights_of_other_dtypes_are_refused(folder, dtype):
    name = "decoder.conv_in.bias"
    change_weights(folder, lambda weights: {**weights, name: weights[name].to(dtype)})
    assert_refused(folder, rf"do not fit config\.json: 1 wrong dtype: {name} (I8|F8_E4M3|BOOL);")


@pytest.mark.slow
def test_a_tokenizer_saved_with_fewer_bits_keeps_its_fingerprint(folder, tmp_path):
    half = load_vqgan(folder, dtype=torch.bfloat16)
    fingerprint = half.config.fingerprint
    half.save_pretrained(tmp_path / "half")
    assert fingerprint == load_vqgan(folder).config.fingerprint == load_vqgan(tmp_path / "half").config.fingerprint
    assert load_vqgan(tmp_path / "half").dtype == torch.bfloat16


def test_a_tokenizer_without_a_fingerprint_gets_one(folder):
    expected = load_tokenizer(str(folder)).config.fingerprint
    change_config(folder, fingerprint=None)
    assert load_vqgan(folder).config.fingerprint is None
    assert load_tokenizer(str(folder)).config.fingerprint == expected


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pickle_for_weights_is_not_run(folder, tmp_path, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(planted_pickle(tmp_path / "canary"))
    assert_refused(folder, r"not a safetensors file|other formats are not read")
    assert not (tmp_path / "canary").exists()


# ---------------------------------------------------------------------- the image processor


def test_the_image_processor_is_that_of_the_tokenizer(folder):
    config = VQGANConfig.from_pretrained(folder)
    # transformers would prefer this file
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": {"size": 8, "num_channels": 3}}))
    processor = load_image_processor(folder, config)
    assert (processor.image_shape, processor.num_channels) == ((16, 16), 1)
    changes = [
        ("size", 10**9),
        ("size", 16.0),
        ("size", {"height": 16, "width": 8}),
        ("num_channels", 3),
        ("num_channels", True),
    ]
    for field, value in changes:
        change_config(folder, "preprocessor_config.json", size=16, num_channels=1)
        change_config(folder, "preprocessor_config.json", **{field: value})
        with pytest.raises(
            ValueError, match=rf"preprocessor_config\.json: .*{field}: received .*(but the tokenizer has|allowed is)"
        ):
            load_image_processor(folder, config)
    for damaged in ("", "[]", '{"self": 1}', '{"aspect_ratio": "no"}'):
        (folder / "preprocessor_config.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"preprocessor_config\.json: "):
            load_image_processor(folder, config)


# ---------------------------------------------------------------------- the discriminator


def test_a_discriminator_starts_from_saved_weights_that_fit(folder):
    new = discriminator()
    told = start_discriminator(
        new, str(folder), {**SETTINGS, "network": "/elsewhere/dino", "key_of_a_later_version": 1}
    )
    assert told == f"the discriminator starts from the weights of {folder}"
    stored = load_file(folder / DISCRIMINATOR_NAME)
    assert all(torch.equal(value, stored[name]) for name, value in new.state_dict().items())
    anew = f"the discriminator starts from random weights: that of {folder} has "
    other = discriminator()
    told = start_discriminator(other, str(folder), {"num_layers": 3, "norm_type": "group"})
    assert told == f"{anew}discriminator.num_layers 2, not 3 and has discriminator.norm_type 'batch', not 'group'"
    assert not any(torch.equal(value, stored[name]) for name, value in other.named_parameters() if value.ndim == 4)
    assert start_discriminator(PatchDiscriminator(1, base_channels=4), str(folder), {}) == f"{anew}another shape"
    (folder / DISCRIMINATOR_NAME).unlink()
    assert start_discriminator(new, str(folder), SETTINGS) is None


def test_a_discriminator_on_a_hub_that_is_out_of_reach(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    told = start_discriminator(discriminator(), "someone/tokenizer", SETTINGS)
    assert told is not None and "random weights: the Hub, which may have that of someone/tokenizer, is out of" in told


@pytest.mark.parametrize("damage", ["nan", "dtype", "settings", "cut", "pickle"])
def test_a_damaged_discriminator_is_refused(folder, tmp_path, damage):
    path = folder / DISCRIMINATOR_NAME
    weights = load_file(path)
    name = next(name for name, value in weights.items() if value.is_floating_point())
    if damage == "nan":
        weights[name].view(-1)[0] = math.nan
    elif damage == "dtype":
        weights[name] = weights[name].to(torch.int8)
    save_file(weights, path, {"settings": "[]" if damage == "settings" else "{}"})
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    elif damage == "pickle":
        path.write_bytes(planted_pickle(tmp_path / "canary"))
    with pytest.raises(ConfigError, match=rf"model_name_or_path: .*{DISCRIMINATOR_NAME} cannot be used; remove it"):
        start_discriminator(discriminator(), str(folder), SETTINGS)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "name, words, others",
    [
        ("runs/nope", "there is no such folder$", "Hub"),
        ("someone/nope", "no such folder, and the Hub cannot be", "cache"),
    ],
)
def test_a_path_that_does_not_exist_does_not_lead_to_the_hub(tmp_path, monkeypatch, name, words, others):
    """A name of the form user/name is a path if its first folder exists."""
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=words) as caught:
        load_tokenizer(name)
    assert others not in str(caught.value)
