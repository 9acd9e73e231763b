"""Tokenizers inside other things: wrappers, entries, lists, whole diffusion models, files of Flax; and other kinds."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from configs import ConfigError, run
from stage1_vqgan import VQGANConfig
from stage1_vqgan.convert import diffusers, llamagen, taming
from stage1_vqgan.convert.command import ConvertConfig, convert
from tests.other_tokenizers import llamagen_weights, reference, taming_params, taming_weights, write_taming


@pytest.fixture(scope="module")
def model():
    return reference(attends=(1,))


def command(arguments, at):
    run(ConvertConfig, convert, "convert", [word.format(at=at) for word in arguments.split()])


def prefixed(prefix, weights):
    return {f"{prefix}{name}": value for name, value in weights.items()}


def zeros(weights):
    return {name: torch.zeros_like(value) for name, value in weights.items()}


UNET = {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2), "betas": torch.ones(4)}
WRAPPED = {
    "data parallel": lambda w: {"state_dict": prefixed("module.", w)},
    "compiled": lambda w: {"model": prefixed("_orig_mod.", w)},
    "compiled inside": lambda w: {name.replace("coder.", "coder._orig_mod."): value for name, value in w.items()},
    "attributes": lambda w: prefixed("module.vqgan.model.", w),
    "averaged": lambda w: {"ema": prefixed("module.", w) | {"n_averaged": torch.tensor(3)}, "model": zeros(w)},
    "an average that is none": lambda w: {"ema": {"decay": 0.999, "shadow": {}}, "generator": w},
    "two networks": lambda w: {"generator": w, "discriminator": {"main.0.weight": torch.ones(2)}, "step": 3},
    "nested": lambda w: {"epoch": 1, "state_dict": {"model": {"params": w}}},
    "a list": lambda w: [{"main.0.weight": torch.ones(2)}, {"state_dict": w}],
    "diffusion": lambda w: {"state_dict": prefixed("first_stage_model.", w) | UNET},
    "two stages": lambda w: prefixed("cond_stage_model.", zeros(w)) | prefixed("first_stage_model.", w) | UNET,
}


@pytest.mark.parametrize("kind", WRAPPED)
@pytest.mark.parametrize("code_base", [taming, llamagen], ids=["taming", "llamagen"])
def test_wrapped(tmp_path, model, kind, code_base):
    weights = (taming_weights if code_base is taming else llamagen_weights)(model)
    torch.save(WRAPPED[kind](weights), tmp_path / "last.ckpt")
    found, expected = code_base.read(tmp_path / "last.ckpt", None).weights, taming_weights(model)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_was_chosen_is_told(tmp_path, model):
    weights = taming_weights(model)
    torch.save({"model": zeros(weights), "ema": weights}, tmp_path / "last.ckpt")
    assert taming.read(tmp_path / "last.ckpt", None).notes == ["read from ema; these hold a tokenizer too: model"]


def test_the_first_stage_of_latent_diffusion(tmp_path, model, capsys):
    """A whole checkpoint with its YAML, as of latent-diffusion with vq-f4."""
    weights = prefixed("first_stage_model.", taming_weights(model)) | UNET
    write_taming(tmp_path, model, weights | {"model_ema.diffusion_modelinput": torch.ones(2)})
    first = {"target": "ldm.models.autoencoder.VQModelInterface", "params": taming_params(model)}
    params = {"first_stage_config": first, "unet_config": {"target": "ldm.modules.UNetModel"}, "timesteps": 1000}
    values = {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(values))
    files = "--checkpoint {at}/last.ckpt --config {at}/model.yaml --verify {at}/facts.safetensors"
    command(f"--from taming {files} --output {{at}}/out", tmp_path)
    told = capsys.readouterr().out
    assert "io2: 0 of 10 codes differ" in told and "3 tensors are of other models" in told


# ---------- Flax


def flax_tree(weights, old_norms):
    """The tree of vqgan-jax, renamed and transposed as its own script does."""
    tree: dict = {}
    for name, value in weights.items():
        *parents, last = re.sub(r"(\w+)[.](\d+)", r"\1_\2", name).split(".")
        if last == "weight" and value.ndim == 4:
            last, value = "kernel", value.permute(2, 3, 1, 0)
        elif "norm" in name:
            last, value = last.replace("weight", "scale"), value.view(1, 1, 1, -1) if old_norms else value
        elif "embedding" in name:
            last = "embedding"
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def write_flax(path, tree):
    msgpack = pytest.importorskip("msgpack")

    def pack(value):
        array = (list(value.shape), "float32", value.contiguous().numpy().tobytes())
        return msgpack.ExtType(1, msgpack.packb(array))

    path.write_bytes(msgpack.packb(tree, default=pack))


def test_flax(tmp_path, model, capsys):
    write_taming(tmp_path, model)
    params = taming_params(model)
    flat = {name: value for name, value in params.items() if name in ("n_embed", "embed_dim")} | params["ddconfig"]
    (tmp_path / "config.json").write_text(json.dumps(flat | {"model_type": "vqgan", "return_dict": True}))
    tree = flax_tree(taming_weights(model), old_norms=True)
    codebook = tree["quantize"]["embedding"]
    flat = codebook["embedding"].flatten()
    chunks = {str(number): chunk for number, chunk in enumerate(flat.split(8))}  # eleven chunks: "10" after "9"
    codebook["embedding"] = {"__msgpack_chunked_array__": True, "shape": {"0": 24, "1": 4}, "chunks": chunks}
    assert len(chunks) > 10
    write_flax(tmp_path / "flax_model.msgpack", {"params": tree})
    files = "--checkpoint {at}/flax_model.msgpack --config {at}/config.json --verify {at}/facts.safetensors"
    command(f"--from taming {files} --output {{at}}/out", tmp_path)
    told = capsys.readouterr().out
    assert "io2: 0 of 10 codes differ" in told and "can differ from those of vqgan-jax" in told
    found, expected = load_file(tmp_path / "out" / "model.safetensors"), taming_weights(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert VQGANConfig.from_pretrained(tmp_path / "out").image_size == 16


@pytest.mark.parametrize("content", [b"", b"\x81", b"\x81\xa1a\x01", b"\xc7\x00\x07", b"\x92" * 2000], ids=str)
def test_files_that_flax_did_not_write(tmp_path, content):
    pytest.importorskip("msgpack")
    (tmp_path / "flax_model.msgpack").write_bytes(content)
    with pytest.raises(ConfigError, match="not a complete file of Flax"):
        taming.read(tmp_path / "flax_model.msgpack", None)


def test_flax_without_its_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "msgpack", None)
    (tmp_path / "a.msgpack").touch()
    with pytest.raises(ConfigError, match=r"msgpack is not installed: pip install 'tessella\[convert\]'"):
        taming.read(tmp_path / "a.msgpack", None)


# ---------- other kinds


def continuous(weights):
    kept = {name: value for name, value in weights.items() if not name.startswith("quantize")}
    return kept | {"quant_conv.weight": torch.ones(8, 16, 1, 1), "post_quant_conv.weight": torch.ones(8, 4, 1, 1)}


def spatial(weights):
    norm = "decoder.mid.block_1.norm1."
    return weights | {f"{norm}norm_layer.weight": torch.ones(4), f"{norm}conv_y.weight": torch.ones(4)}


def itself(weights):
    content: list = [3.0]
    content.append(content)
    return content


OTHERS = {
    "MoVQ": (spatial, "this is a MoVQ: the norms of its decoder depend on the code at each position"),
    "AutoencoderKL": (continuous, "this is an AutoencoderKL: its latents are continuous"),
    "names of diffusers": (lambda w: {"encoder.conv_in.weight": w["quant_conv.weight"], **reference().state_dict()},
                           "give its folder to --from diffusers"),
    "two tokenizers": (lambda w: prefixed("a.", w) | prefixed("b.", w), r"it holds 2 tokenizers, a\., b\.; save one"),
    "twice": (lambda w: w | prefixed("module.", w), "it holds every weight twice, with and without"),
    "a list of numbers": (itself, "it holds list; it must hold a state dict"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_are_named(tmp_path, model, kind):
    change, words = OTHERS[kind]
    torch.save(change(taming_weights(model)), tmp_path / "last.ckpt")
    with pytest.raises(ConfigError, match=words):
        taming.read(tmp_path / "last.ckpt", None)


def test_a_movq_of_diffusers_is_named(tmp_path):
    Path(tmp_path / "config.json").write_text(json.dumps({"_class_name": "VQModel", "norm_type": "spatial"}))
    with pytest.raises(ConfigError, match=r"norm_type: received 'spatial'; .* this is a MoVQ"):
        diffusers.read(tmp_path)
