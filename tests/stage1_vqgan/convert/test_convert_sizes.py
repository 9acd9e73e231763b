"""Tokenizers that are converted for images of another size: attention stays in the levels that have it."""

import json

import pytest
import torch
from transformers import JanusVQVAE

from configs import run
from stage1_vqgan import VQGANConfig, VQGANImageProcessor, VQGANModel
from stage1_vqgan.convert.command import ConvertConfig, convert
from tests.other_tokenizers import images, llamagen_weights, reference, write_taming
from tests.slow import few


def command(arguments, at):
    run(ConvertConfig, convert, "convert", [word.format(at=at) for word in arguments.split()])


@pytest.fixture(scope="module")
def model():
    """Three levels; those of 16 and 4 pixels attend at the size of the training, 16."""
    return reference(widths=(32, 32, 64), attends=(0, 2))


def write(model, source, folder):
    """The tokenizer in the form of a code base; returns the arguments that convert it."""
    write_taming(folder, model)
    model.save_pretrained(folder / "theirs")
    torch.save(llamagen_weights(model), folder / "vq.pt")
    files = {
        "taming": "--checkpoint {at}/last.ckpt --config {at}/model.yaml --verify {at}/facts.safetensors",
        "diffusers": "--checkpoint {at}/theirs",
        "llamagen": "--checkpoint {at}/vq.pt",
    }
    return f"--from {source} {files[source]}"


@torch.no_grad()
@pytest.mark.parametrize(
    "source, size, shape",
    few(
        [("taming", "32", (32, 32)), ("diffusers", "8", (8, 8)), ("taming", "[16,40]", (16, 40))],
        ("taming", "[16,40]", (16, 40)),
    ),
)
def test_sizes(tmp_path, model, source, size, shape):
    command(f"{write(model, source, tmp_path)} --output {{at}}/out --image_size {size}", tmp_path)
    ours = VQGANModel.from_pretrained(tmp_path / "out").eval()
    processor = VQGANImageProcessor.from_pretrained(tmp_path / "out")
    assert ours.config.image_shape == shape == processor.image_shape and ours.config.attn_levels == [0, 2]
    pixels = images(2, 3, *shape)
    latents = model.encode(pixels).latents
    codes = ours.encode(pixels).codes
    assert torch.equal(codes.flatten(), model.quantize(latents)[2][2]) and len(codes.unique()) > 2
    entries = model.quantize.embedding(codes).permute(0, 3, 1, 2)
    image = model.decoder(model.post_quant_conv(entries))
    torch.testing.assert_close(ours.decode_codes(codes), image, atol=2e-5, rtol=0)


def test_without_a_configuration(tmp_path, capsys):
    """LlamaGen's files have no size; its attention is in the last level."""
    model = reference(widths=(32, 64), attends=(1,))
    command(f"{write(model, 'llamagen', tmp_path)} --output {{at}}/out --image_size [24,8]", tmp_path)
    config = VQGANConfig.from_pretrained(tmp_path / "out")
    assert config.image_shape == (24, 8) and config.attn_levels == [1]
    told = capsys.readouterr().out
    assert "images of 24×8 pixels" in told and "it is 256" not in told


@pytest.mark.slow
def test_janus_at_another_size(tmp_path):
    """A JanusVQVAE decodes one size only, which is that of the configuration."""
    torch.manual_seed(0)
    options = {"quantizer_options": {"l2_normalize": True}, "channel_multiplier": [1, 2], "num_res_blocks": 1}
    sizes = {"base_channels": 32, "latent_channels": 8, "embed_dim": 4, "num_embeddings": 16, "attn_levels": [1]}
    VQGANModel(VQGANConfig(image_size=16, **options, **sizes)).save_pretrained(tmp_path / "ours")
    command("--to janus --checkpoint {at}/ours --output {at}/janus --image_size 24", tmp_path)
    stock = JanusVQVAE.from_pretrained(tmp_path / "janus")
    assert stock.decode(torch.zeros(1, 144).long()).shape == (1, 3, 24, 24)
    command("--from janus --checkpoint {at}/janus --output {at}/wide --image_size [16,32]", tmp_path)
    assert VQGANConfig.from_pretrained(tmp_path / "wide").image_shape == (16, 32)


@pytest.mark.parametrize(
    "size, words",
    [
        ("18", "image_size: received 18; must be divisible by the downsampling factor 4"),
        ("[16,16,16]", "image_size: received [16, 16, 16]; must be the side of a square, or [height, width]"),
        ("0", "image_size: received 0"),
        ("large", "image_size: received 'large'"),
    ],
)
def test_sizes_that_no_image_has(tmp_path, model, capsys, size, words):
    model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(SystemExit) as exited:
        command(f"--from diffusers --checkpoint {{at}}/theirs --output {{at}}/out --image_size {size}", tmp_path)
    assert exited.value.code == 2 and words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_diffusers_and_back_with_two_sides(tmp_path, model):
    model.save_pretrained(tmp_path / "theirs")
    command("--from diffusers --checkpoint {at}/theirs --output {at}/ours --image_size [16,24]", tmp_path)
    command("--to diffusers --checkpoint {at}/ours --output {at}/again", tmp_path)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["sample_size"] == [16, 24]
    command("--from diffusers --checkpoint {at}/again --output {at}/back", tmp_path)
    ours, back = (VQGANConfig.from_pretrained(tmp_path / name) for name in ("ours", "back"))
    assert back.image_shape == (16, 24) and back.fingerprint == ours.fingerprint
