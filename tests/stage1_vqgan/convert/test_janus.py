"""Conversion from and to the tokenizers of Janus: codes and images are those of the class of transformers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import JanusConfig, JanusForConditionalGeneration, JanusVQVAE, JanusVQVAEConfig

from configs import ConfigError, run
from stage1_vqgan import VQGANConfig, VQGANModel
from stage1_vqgan.convert import janus
from stage1_vqgan.convert.command import ConvertConfig, convert
from tests.other_tokenizers import images
from tests.slow import few

SETTINGS = {
    "image_size": 16,
    "base_channels": 32,
    "channel_multiplier": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [8],
    "latent_channels": 8,
    "embed_dim": 4,
    "num_embeddings": 24,
    "quantizer_options": {"l2_normalize": True},
}
LAYOUTS = {
    "three levels, four channels": {
        "in_channels": 4,
        "channel_multiplier": [1, 1, 2],
        "attn_resolutions": [4],
        "embed_dim": 8,
    },
    "gray, wide first level, two blocks, dropout": {
        "in_channels": 1,
        "channel_multiplier": [2, 1],
        "num_res_blocks": 2,
        "latent_channels": 3,
        "dropout": 0.1,
    },
}


def command(arguments, at):
    run(ConvertConfig, convert, "convert", [word.format(at=at) for word in arguments.split()])


@torch.no_grad()
def tokenizer(**changes):
    """A random tokenizer. Its entries have directions of latents, so that images use many, and different lengths."""
    torch.manual_seed(0)
    model = VQGANModel(VQGANConfig(**SETTINGS | changes)).eval()
    latents = model.encode(pixels_for(model, 6, 1)).latents.permute(0, 2, 3, 1).flatten(0, 2)
    model.quant_conv.bias -= latents.mean(0)
    entries = (latents - latents.mean(0))[: model.config.num_embeddings]
    model.quantize.embedding.weight.copy_(entries * torch.linspace(0.1, 3, len(entries))[:, None])
    return model


def pixels_for(model, count, wide):
    factor = model.config.downsampling_factor
    return images(count, model.config.in_channels, 4 * factor, 4 * wide * factor)


@torch.no_grad()
def assert_equal_tokenizers(stock, ours, least=5):
    pixels = images(3, ours.config.in_channels, ours.config.image_size, ours.config.image_size)
    codes = ours.encode(pixels).codes
    assert torch.equal(stock.encode(pixels).image_tokens, codes.flatten()) and len(codes.unique()) >= least
    torch.testing.assert_close(stock.decode(codes.flatten(1)), ours.decode_codes(codes), atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", few(LAYOUTS, "three levels, four channels"))
def test_both_directions(tmp_path, capsys, layout):
    ours = tokenizer(**LAYOUTS[layout])
    ours.save_pretrained(tmp_path / "ours")
    command("--to janus --checkpoint {at}/ours --output {at}/theirs", tmp_path)
    assert_equal_tokenizers(JanusVQVAE.from_pretrained(tmp_path / "theirs"), ours)
    command("--from janus --checkpoint {at}/theirs --output {at}/back", tmp_path)
    assert capsys.readouterr().out.count("a wide random image: 0 of 24 codes differ") == 2
    back = VQGANModel.from_pretrained(tmp_path / "back").eval()
    assert_equal_tokenizers(JanusVQVAE.from_pretrained(tmp_path / "theirs"), back)
    ignored = {"fingerprint", "_name_or_path", "architectures", "auto_map"}
    before, after = ({k: v for k, v in m.config.to_dict().items() if k not in ignored} for m in (ours, back))
    assert before == after


@torch.no_grad()
def test_deep_decoders_differ_by_rounding_alone(tmp_path):
    """Five levels, computed in float64. The entries are axes, because a codebook is always looked up in float32."""
    layout = {"channel_multiplier": [1, 1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [4], "embed_dim": 8}
    torch.manual_seed(0)
    ours = VQGANModel(VQGANConfig(**SETTINGS | layout | {"image_size": 64, "num_embeddings": 16})).eval()
    ours.quantize.embedding.weight.copy_(torch.cat([torch.eye(8), -torch.eye(8)]))
    janus.write(ours, tmp_path)
    stock = JanusVQVAE.from_pretrained(tmp_path).double()
    codes = torch.arange(16).view(1, 4, 4)
    images = stock.decode(codes.flatten(1))
    assert images.abs().max() > 1  # untrained
    torch.testing.assert_close(ours.double().decode_codes(codes), images, atol=1e-12, rtol=0)


def test_ties(tmp_path):
    """Of entries that are equally near, both take the first. All numbers here are exact."""
    ours = tokenizer()
    axes = torch.cat([torch.eye(4), -torch.eye(4)])
    latents = torch.cat([axes, axes + axes.roll(1, 0), axes * 0]) * torch.tensor([[0.5], [8.0]]).repeat(12, 1)
    with torch.no_grad():
        ours.quantize.embedding.weight.copy_(torch.cat([axes * 2, axes, axes / 4]))
    janus.write(ours, tmp_path)
    stock = JanusVQVAE.from_pretrained(tmp_path)
    latents = latents[:, :, None, None]
    codes = ours.quantize(latents).codes.flatten()
    assert torch.equal(stock.quantize(latents)[2], codes) and set(codes.tolist()) == set(range(8))


def whole_janus(**vq):
    """A whole, tiny Janus. Its codebook is random: no entry has unit length."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vq = {name: SETTINGS[name] for name in janus.SAME if name in SETTINGS} | {"projection_dim": 16} | vq
    config = JanusConfig(
        text_config={"model_type": "llama", "vocab_size": 32, "intermediate_size": 16, **sizes},
        vision_config={**sizes, "projection_dim": 16, "image_size": 24, "patch_size": 4, "mlp_ratio": 1.0},
        vq_config={"image_token_embed_dim": 16, **vq},
    )
    return JanusForConditionalGeneration(config).eval()


def test_the_tokenizer_in_a_whole_janus(tmp_path, capsys):
    model = whole_janus()
    model.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 2
    command("--from janus --checkpoint {at}/theirs --output {at}/ours", tmp_path)
    told = capsys.readouterr().out
    assert "a whole Janus" in told and "compares with them as they are" in told
    ours, stock = VQGANModel.from_pretrained(tmp_path / "ours").eval(), model.model.vqmodel
    assert ours.config.image_size == 12 and stock.config.num_patches == 6
    with torch.no_grad():  # what the class lacks: its search takes the codebook as it is, its decoder normalizes it
        stock.quantize.embedding.weight.copy_(torch.nn.functional.normalize(stock.quantize.embedding.weight))
    assert_equal_tokenizers(stock, ours, least=2)


def test_a_file_alone(tmp_path, capsys):
    """Its weights tell the layout; a configuration, of the tokenizer or of the whole, tells the size of images."""
    model = whole_janus()
    model.config.save_pretrained(tmp_path)
    save_file(
        {f"vqmodel.{name}": value for name, value in model.model.vqmodel.state_dict().items()},
        tmp_path / "a.safetensors",
    )
    command("--from janus --checkpoint {at}/a.safetensors --output {at}/alone", tmp_path)
    assert "it is 256" in capsys.readouterr().out
    command("--from janus --checkpoint {at}/a.safetensors --config {at}/config.json --output {at}/with", tmp_path)
    sizes = [VQGANConfig.from_pretrained(tmp_path / name).image_size for name in ("alone", "with")]
    assert sizes == [256, 12]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"quantizer": "ema", "quantizer_options": {}}, "quantizer is 'ema'; a JanusVQVAE only"),
        ({"quantizer_options": {}}, "quantizer_options.l2_normalize is false; a JanusVQVAE only"),
        ({"norm_num_groups": 16}, "norm_num_groups is 16; a JanusVQVAE only supports 32"),
        ({"attn_resolutions": []}, "attn_levels is []; a JanusVQVAE attends in its last level only, [1]"),
        ({"attn_resolutions": [16, 8]}, "attn_levels is [0, 1]; a JanusVQVAE attends in"),
        ({"image_size": [16, 8], "attn_resolutions": [4]}, "image_size is [16, 8]; a JanusVQVAE only supports squares"),
        ({"base_channels": 64, "channel_multiplier": [1, 1.5]}, "channel_multiplier is [1, 1.5]; a JanusVQVAE only"),
    ],
    ids=str,
)
def test_what_the_class_cannot_hold(tmp_path, changes, words):
    with pytest.raises(ConfigError) as raised:
        janus.write(VQGANModel(VQGANConfig(**SETTINGS | changes)), tmp_path)
    assert f"checkpoint: its {words}" in str(raised.value) and not any(tmp_path.iterdir())


def test_several_problems_at_once(tmp_path, capsys):
    tokenizer(norm_num_groups=16, attn_resolutions=[]).save_pretrained(tmp_path / "ours")
    with pytest.raises(SystemExit) as exited:
        command("--to janus --checkpoint {at}/ours --output {at}/out", tmp_path)
    told = capsys.readouterr().err
    assert exited.value.code == 2 and "2 problems" in told and "norm_num_groups" in told and "attn_levels" in told
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_latents_that_the_class_cannot_tell_apart(tmp_path, capsys):
    """Its search adds their squares, so that long ones lose the difference between entries to rounding."""
    model = tokenizer()
    with torch.no_grad():
        model.quant_conv.weight *= 2**24
        model.quant_conv.bias *= 2**24
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(SystemExit):
        command("--to janus --checkpoint {at}/ours --output {at}/out", tmp_path)
    assert "the converted tokenizer differs" in capsys.readouterr().err and not (tmp_path / "out").exists()


def changed(**changes):
    return lambda folder, config: (folder / "config.json").write_text(json.dumps(config | changes))


def without_attention(folder, config):
    weights = load_file(folder / "model.safetensors")
    weights = {name: value for name, value in weights.items() if ".attn." not in name}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def pickled(folder, config):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def shards_elsewhere(folder, config):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {janus.CODEBOOK: "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def another_model(folder, config):
    save_file({"lm_head.weight": torch.ones(2)}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "change, words",
    [
        (changed(double_latent=True), "double_latent: received true; supported is only false"),
        (changed(model_type="llama"), "model_type: received 'llama'; supported is only 'janus_vqgan'"),
        (changed(out_channels=1), "out_channels: is 1, but the weights have 3"),
        (changed(num_res_blocks=2), "num_res_blocks: is 2, but the weights have 1"),
        (changed(num_patches="8"), "num_patches: received '8'"),
        (changed(num_patches=0), "num_patches: received 0"),
        (changed(num_patches=2**31 - 1), "size: received 4294967294; allowed"),
        (changed(vq_config=[]), "vq_config: is missing; it must be a section"),
        (
            changed(vq_config={}, vision_config={"patch_size": 0}),
            "vision_config.image_size // patch_size: received [384, 0]",
        ),
        (changed(vq_config={}), "vq_config.num_embeddings: is 16384, but the weights have 24"),
        (without_attention, "attn_levels is []; a JanusVQVAE attends"),
        (pickled, "model.safetensors is missing"),
        (shards_elsewhere, "must name a .safetensors file in the same folder"),
        (another_model, "it has no model.vqmodel.quantize.embedding.weight or"),
    ],
)
def test_what_comes_from_strangers(tmp_path, capsys, change, words):
    folder = tmp_path / "theirs"
    config = JanusVQVAEConfig(**{name: SETTINGS[name] for name in janus.SAME if name in SETTINGS}, num_patches=8)
    JanusVQVAE(config).save_pretrained(folder)
    change(folder, json.loads((folder / "config.json").read_text()))
    with pytest.raises(SystemExit) as exited:
        command("--from janus --checkpoint {at}/theirs --output {at}/out", tmp_path)
    told = capsys.readouterr().err
    assert exited.value.code == 2 and words in told, told
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_configuration_beside_a_folder(tmp_path, capsys):
    tokenizer().save_pretrained(tmp_path / "ours")
    with pytest.raises(SystemExit):
        command("--from janus --checkpoint {at}/ours --config {at}/ours/config.json --output {at}/out", tmp_path)
    assert "leave this out" in capsys.readouterr().err


def test_codes_have_the_name_of_transformers():
    out = tokenizer().encode(images(1, 3, 16, 16))
    assert out.image_tokens is out.codes and "image_tokens" not in out
