"""Conversion of broken, forged or malicious files: it gives a message, runs no code, and leaves no files."""

import argparse
import io
import json
import os
import pickle
import struct
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from configs import run
from stage1_vqgan import VQGANConfig, VQGANModel
from stage1_vqgan.convert.command import ConvertConfig, convert
from tests.fuzz.harness import planted_pickle

SETTINGS = {
    "image_size": 16,
    "base_channels": 32,
    "channel_multiplier": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [8],
    "latent_channels": 8,
    "embed_dim": 4,
    "num_embeddings": 16,
}
DDCONFIG = {
    "double_z": False,
    "z_channels": 8,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [8],
    "dropout": 0.0,
}


@pytest.fixture(scope="module")
def weights():
    """The weights of a small tokenizer as in the original, whose names equal ours."""
    torch.manual_seed(0)
    return VQGANModel(VQGANConfig(**SETTINGS)).state_dict()


@pytest.fixture
def attempt(tmp_path, monkeypatch, capsys):
    """Converts the files in the folder, checks that no file was left, and returns the exit code and the message."""
    monkeypatch.chdir(tmp_path)

    def convert_it(arguments):
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        try:
            run(ConvertConfig, convert, "convert", arguments.split())
        except SystemExit as exited:
            told = capsys.readouterr()
            assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before, "something was left"
            assert len(told.err.splitlines()) <= 24 and max(map(len, told.err.splitlines())) < 1000, "a screen"
            assert "Traceback" not in told.err and "saved in" not in told.out
            return exited.code, told.err
        return 0, capsys.readouterr().out

    return convert_it


def config(**params):
    values = {"n_embed": 16, "embed_dim": 4, "ddconfig": DDCONFIG} | params
    Path("model.yaml").write_text(
        yaml.safe_dump({"model": {"target": "taming.models.vqgan.VQModel", "params": values}})
    )


class Payload:
    """Creates a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


# ---------- checkpoints


def code_in_the_state(weights):
    torch.save({"state_dict": weights, "callbacks": Payload()}, "last.ckpt")


def code_alone(weights):
    torch.save(Payload(), "last.ckpt")


def code_in_an_old_pickle(weights):
    torch.save({"state_dict": weights | {"x": Payload()}}, "last.ckpt", _use_new_zipfile_serialization=False)


def truncated(weights):
    torch.save({"state_dict": weights}, "whole.ckpt")
    content = Path("whole.ckpt").read_bytes()
    Path("last.ckpt").write_bytes(content[: len(content) // 2])


def text(weights):
    Path("last.ckpt").write_text("404: not found\n")


def empty(weights):
    Path("last.ckpt").touch()


def folder(weights):
    Path("last.ckpt").mkdir()


def compressed(weights):
    torch.save({"state_dict": weights | {"encoder.conv_in.weight": torch.zeros(32, 3, 300, 300)}}, "whole.ckpt")
    with zipfile.ZipFile("whole.ckpt") as old, zipfile.ZipFile("last.ckpt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))


def expanded(weights):
    """A tensor of 4 TB in a file of a few kilobytes."""
    large = torch.zeros(1).expand(2**20, 2**20)
    torch.save({"state_dict": weights | {"quantize.embedding.weight": large}}, "last.ckpt")


def a_list(weights):
    torch.save(list(weights.values()), "last.ckpt")


def no_weights(weights):
    torch.save({"epoch": 3, "optimizer": {}}, "last.ckpt")


def numbers_for_tensors(weights):
    torch.save({"state_dict": weights | {"encoder.conv_in.bias": 3.0}}, "last.ckpt")


def something_else(weights):
    torch.save({"state_dict": {"transformer.head.weight": torch.ones(3, 3)}}, "last.ckpt")


def planted_in_a_zip(weights, name="last.ckpt", entry="archive/data.pkl"):
    """The layout of torch.save, with a pickle that runs code."""
    with zipfile.ZipFile(name, "w") as archive:
        archive.writestr(entry, planted_pickle(Path("executed")))
        archive.writestr("archive/version", "3\n")


def planted_in_torchscript(weights):
    """The layout of torch.jit.save."""
    planted_in_a_zip(weights)
    with zipfile.ZipFile("last.ckpt", "a") as archive:
        archive.writestr("archive/constants.pkl", planted_pickle(Path("executed")))


def planted_in_a_tar(weights):
    """The layout of torch.save before version 0.1.10."""
    with tarfile.open("last.ckpt", "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = planted_pickle(Path("executed"))
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def planted_alone(weights):
    Path("last.ckpt").write_bytes(planted_pickle(Path("executed")))


def planted_after_the_magic_number(weights):
    """The layout of torch.save before version 1.6."""
    parts = [torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {}]
    Path("last.ckpt").write_bytes(
        b"".join(pickle.dumps(part, protocol=2) for part in parts) + planted_pickle(Path("executed"))
    )


def changed(**changes):
    """The good checkpoint with some tensors changed, or left out where the change is None."""

    def write(weights):
        new = weights | changes
        torch.save({"state_dict": {name: value for name, value in new.items() if value is not None}}, "last.ckpt")

    return write


CONV = "encoder.down.0.block.0.conv1.weight"
CHECKPOINTS = {
    "code beside the weights": (code_in_the_state, "asks for posix.mkdir, which is code, not weights"),
    "code alone": (code_alone, "asks for posix.mkdir"),
    "code in an old pickle": (code_in_an_old_pickle, "asks for posix.mkdir"),
    "planted in a zip": (planted_in_a_zip, "which is code, not weights; nothing was run"),
    "planted in torchscript": (planted_in_torchscript, "not a complete checkpoint of torch.save"),
    "planted in a tar": (planted_in_a_tar, "not a complete checkpoint of torch.save"),
    "planted alone": (planted_alone, "which is code, not weights; nothing was run"),
    "planted after the magic number": (planted_after_the_magic_number, "which is code, not weights; nothing was run"),
    "truncated": (truncated, "not a complete checkpoint of torch.save"),
    "text": (text, "not a complete checkpoint of torch.save"),
    "empty": (empty, "not a complete checkpoint of torch.save"),
    "a folder": (folder, "it is a folder"),
    "nothing": (lambda weights: None, "there is no such file"),
    "compressed": (compressed, "parts of it are compressed"),
    "expanded": (expanded, "quantize.embedding.weight: the file stores fewer numbers"),
    "a list": (a_list, "it holds list; it must hold a state dict"),
    "no weights": (no_weights, "not a tensor: epoch, optimizer"),
    "a number for a tensor": (numbers_for_tensors, "not a tensor: encoder.conv_in.bias"),
    "another model": (something_else, "neither the weights nor a configuration state in_channels"),
    "a missing key": (changed(**{"quant_conv.bias": None}), "1 missing: quant_conv.bias"),
    "a key too many": (changed(**{"encoder.extra": torch.ones(2)}), "1 unexpected: encoder.extra"),
    "a wrong shape": (changed(**{CONV: torch.ones(32, 16, 3, 3)}), f"{CONV} (32, 16, 3, 3), needed (32, 32, 3, 3)"),
    "a scalar": (changed(**{CONV: torch.tensor(1.0)}), f"{CONV} (), needed (32, 32, 3, 3)"),
    "whole numbers": (changed(**{CONV: torch.ones(32, 32, 3, 3).long()}), f"{CONV} (torch.int64): weights must be"),
    "not a number": (changed(**{CONV: torch.full((32, 32, 3, 3), torch.nan)}), f"{CONV}: not every number is finite"),
    "too large": (changed(**{CONV: torch.full((32, 32, 3, 3), 1e300, dtype=torch.float64)}), "not every number is"),
    "used, out of range": (changed(**{"quantize.used": torch.tensor([3, 16])}), "it must hold rows of quantize.emb"),
    "used, twice": (changed(**{"quantize.used": torch.tensor([3, 3])}), "names an entry of the codebook twice"),
    "used, fractions": (changed(**{"quantize.used": torch.tensor([0.5])}), "it must hold rows of"),
    "no codes": (changed(**{"quantize.embedding.weight": torch.ones(0, 4)}), "at least 2 entries"),
    "a discriminator of infinities": (
        changed(**{"loss.discriminator.main.0.weight": torch.full((2,), torch.inf)}),
        "main.0.weight: not every number is finite",
    ),
}


@pytest.mark.parametrize("kind", ["llamagen", "diffusers"])
def test_pickles_in_the_files_of_other_code_bases(attempt, weights, kind):
    """The comparison with diffusers must not read a pickle beside the weights either."""
    VQGANModel(VQGANConfig(**SETTINGS)).save_pretrained("ours")
    if kind == "llamagen":
        planted_in_a_zip(weights)
        arguments = "--from llamagen --checkpoint last.ckpt --output out"
    else:
        pytest.importorskip("diffusers")
        assert attempt("--to diffusers --checkpoint ours --output theirs")[0] == 0
        planted_in_a_zip(weights, "theirs/diffusion_pytorch_model.bin")
        assert attempt("--from diffusers --checkpoint theirs --output beside")[0] == 0
        Path("theirs/diffusion_pytorch_model.safetensors").unlink()
        arguments = "--from diffusers --checkpoint theirs --output out"
    code, told = attempt(arguments)
    assert code == 2 and "which is code, not weights; nothing was run" in told
    planted_in_a_zip(weights, "facts.safetensors")
    code, told = attempt("--to diffusers --checkpoint ours --output out --verify facts.safetensors")
    assert code == 2 and "it is not a complete safetensors file" in told
    assert not Path("executed").exists()


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints(attempt, weights, case):
    write, words = CHECKPOINTS[case]
    write(weights)
    code, told = attempt("--from taming --checkpoint last.ckpt --output out")
    assert code == 2 and words in told
    assert not Path("executed").exists()


def header(length):
    return lambda path: path.write_bytes(struct.pack("<Q", length) + b'{"a"')


def cut(path):
    save_file({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:500])


def beyond(path):
    fields = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    path.write_bytes(struct.pack("<Q", len(fields)) + fields)


@pytest.mark.parametrize("write", [header(2**60), header(100), cut, beyond], ids=["huge", "short", "cut", "beyond"])
@pytest.mark.parametrize("key", ["checkpoint", "verify"])
def test_safetensors(attempt, weights, write, key):
    save_file(weights, "checkpoint.safetensors")
    write(Path(f"{key}.safetensors"))
    verify = "--verify verify.safetensors" if key == "verify" else ""
    code, told = attempt(f"--from taming --checkpoint checkpoint.safetensors --output out {verify}")
    assert code == 2 and f"{key}: received '{key}.safetensors'; it is not a complete safetensors file" in told


# ---------- configurations

CONFIGS = {
    "another class": ({"target": "os.system"}, "target: received 'os.system'; supported are VQModel"),
    "a class of another quantizer": ({"target": "x.GumbelVQ"}, "'x.GumbelVQ', but the weights have quantize.embedding"),
    "codes": ({"n_embed": 1024}, "n_embed: is 1024, but the weights have 16 (quantize.embedding.weight is (16, 4))"),
    "width": ({"ddconfig": DDCONFIG | {"ch": 64}}, "ch: is 64, but the weights have 32 (encoder.conv_in.weight is"),
    "levels": ({"ddconfig": DDCONFIG | {"ch_mult": [1, 2, 4]}}, "ch_mult: is [1, 2, 4], but the weights have [1, 2]"),
    "blocks": ({"ddconfig": DDCONFIG | {"num_res_blocks": 3}}, "num_res_blocks: is 3, but the weights have 1"),
    "attention": ({"ddconfig": DDCONFIG | {"attn_resolutions": [16]}}, "attn_resolutions: is [16], but the weights"),
    "channels out": ({"ddconfig": DDCONFIG | {"out_ch": 1}}, "out_ch: is 1, but the weights have 3"),
    "a Gaussian": ({"ddconfig": DDCONFIG | {"double_z": True}}, "double_z: received true; supported is only f"),
    "no attention": ({"ddconfig": DDCONFIG | {"attn_type": "none"}}, "attn_type: is False, but the weights have True"),
    "another attention": ({"ddconfig": DDCONFIG | {"attn_type": "linear"}}, "attn_type: received 'linear'"),
    "unheard of": ({"ddconfig": DDCONFIG | {"num_heads": 4}}, "ddconfig.num_heads: unknown key"),
    "text for a number": ({"ddconfig": DDCONFIG | {"ch": "wide"}}, "ddconfig.ch: received 'wide'; must be a whole"),
    "odd resolution": ({"ddconfig": DDCONFIG | {"resolution": 17, "attn_resolutions": [8]}}, "image_size"),
    "remapped, it says": ({"remap": "used.npy"}, "remap: received 'used.npy', but the weights have no quantize.used"),
    "no section": ({"ddconfig": [1, 2]}, "model.params.ddconfig: is missing; it must be a section"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations(attempt, weights, case):
    changes, words = CONFIGS[case]
    torch.save({"state_dict": weights}, "last.ckpt")
    config(**{name: value for name, value in changes.items() if name != "target"})
    if "target" in changes:
        values = yaml.safe_load(Path("model.yaml").read_text())
        values["model"]["target"] = changes["target"]
        Path("model.yaml").write_text(yaml.safe_dump(values))
    code, told = attempt("--from taming --checkpoint last.ckpt --config model.yaml --output out")
    assert code == 2 and words in told


def laughs(depth):
    """A few lines of YAML that expand to 2 ** depth values."""
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, depth))]
    return "\n".join([*lines, f"model: {{target: *a{depth - 1}, params: {{}}}}"])


YAMLS = {
    "a tag": ("!!python/object/apply:os.mkdir [executed]", "a tag (a word after '!')"),
    "a list": ("- 1\n- 2\n", "it holds list; it must hold keys and values"),
    "nothing": ("", "it holds NoneType"),
    "broken": ("model: [1,", "not valid YAML"),
    "another layout": ("data: 3\n", "config: config: is missing"),
    "laughs": (laughs(25), "more than 10,000 values"),
    "deep": ("[" * 5000, "nested too deeply"),
    "endless": ("# " + "x" * 2**20, "a configuration has at most 1,048,576"),
}


@pytest.mark.parametrize("case", YAMLS)
def test_yaml(attempt, weights, case):
    content, words = YAMLS[case]
    torch.save({"state_dict": weights}, "last.ckpt")
    Path("model.yaml").write_text(content)
    code, told = attempt("--from taming --checkpoint last.ckpt --config model.yaml --output out")
    assert code == 2 and words in told
    assert not Path("executed").exists()


# ---------- the rest of the command

ARGUMENTS = {
    "neither": ("--checkpoint a --output out", "give either --from"),
    "both": ("--from taming --to diffusers --checkpoint a --output out", "give either --from"),
    "an unknown code base": ("--from timing --checkpoint a --output out", "from: received 'timing'; must be 'taming'"),
    "a configuration of a folder": ("--from diffusers --checkpoint a --config b --output out", "leave this out"),
    "a file for a folder": ("--from diffusers --checkpoint last.ckpt --output out", "give the folder that holds"),
    "an empty folder": ("--from diffusers --checkpoint full --output out", "checkpoint: received 'full/config.json'"),
    "no tokenizer": ("--to diffusers --checkpoint full --output out", "this folder holds no trained tokenizer"),
    "an output that is there": ("--from taming --checkpoint nowhere --output full", "output: received"),
    "an output that is a file": ("--from taming --checkpoint nowhere --output last.ckpt", "output: received"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(attempt, weights, case):
    arguments, words = ARGUMENTS[case]
    torch.save({"state_dict": weights}, "last.ckpt")
    Path("full").mkdir()
    Path("full/file").touch()
    code, told = attempt(arguments)
    assert code == 2 and words in told


def test_a_comparison_that_fails(attempt, weights):
    torch.save({"state_dict": weights}, "last.ckpt")
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        model = VQGANModel(VQGANConfig(**SETTINGS)).eval()
        model.load_state_dict(weights)
        codes = model.encode(pixels).codes
        image = model.decode_codes(codes).contiguous()
    arguments = "--from taming --checkpoint last.ckpt --verify facts.safetensors --output deep/down/out"
    other = codes.clone()
    other[0, 0, 0] = (other[0, 0, 0] + 1) % 16
    for facts, words in (
        ({"io.indices": other.flatten()}, "io: 1 of 128 codes differ"),
        ({"io.indices": codes, "io.recon": image + 1e-3}, "reconstructions differ by at most 1.0e-03"),
        ({"io.indices": codes, "io.recon": image * torch.nan}, "reconstructions differ by at most nan"),
        ({"io.indices": codes[:, :4].contiguous()}, "io.indices is torch.int64 (2, 4, 8); it must be"),
        ({"io.indices": codes + 16}, "; this codebook has 16 entries"),
        ({}, "io.indices is missing"),
    ):
        save_file({"io.input": pixels, **facts}, "facts.safetensors")
        code, told = attempt(arguments)
        assert code == 2 and words in told
    save_file({"io.input": pixels, "io.indices": codes, "io.recon": image}, "facts.safetensors")
    code, told = attempt(arguments)
    assert code == 0 and "io: 0 of 128 codes differ" in told
    assert [path.name for path in Path("deep/down").iterdir()] == ["out"]


def test_what_training_scripts_save_beside_the_weights(attempt, weights, monkeypatch):
    """Lightning's callbacks and a Namespace are skipped, without their packages."""
    names = ["pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint"]
    callback = type("ModelCheckpoint", (), {"__module__": names[-1]})
    with monkeypatch.context() as patch:
        for name in names:
            patch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules[names[-1]].ModelCheckpoint = callback
        scores = {"best_model_score": torch.tensor(0.1), "best": np.float64(0.1)}
        state = {"callbacks": {callback: scores}, "args": argparse.Namespace(lr=1)}
        torch.save({"state_dict": weights, **state, "path": Path("runs")}, "last.ckpt")
    assert not any(name in sys.modules for name in names)
    config()
    assert attempt("--from taming --checkpoint last.ckpt --config model.yaml --output out")[0] == 0


def test_without_diffusers(attempt, weights, monkeypatch):
    model = VQGANModel(VQGANConfig(**SETTINGS))
    model.save_pretrained("ours")
    save_file({"io.input": torch.zeros(1, 3, 16, 16)}, "facts.safetensors")
    monkeypatch.setattr("stage1_vqgan.convert.command.find_spec", lambda name: None)
    words = "diffusers is not installed: pip install 'tessella[convert]'"
    code, told = attempt("--to diffusers --checkpoint ours --output out --verify facts.safetensors")
    assert code == 2 and f"verify: {words}" in told
    code, told = attempt("--to diffusers --checkpoint ours --output out")
    assert code == 0 and f"not compared: {words}" in told
