"""Broken, malicious or unfitting files of priors: they give a message, run no code, and leave no files."""

import os
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from configs import run
from stage1_vqgan import VQGANImageProcessor
from stage2_prior.convert.__main__ import ConvertConfig, main
from tests.golden import GOLDEN
from tests.stage2_prior.convert.test_convert_priors import CONDITIONS, FIRST_STAGE, gpt, needs_golden, tokenizer, write

COMMAND = "--from taming --checkpoint last.ckpt --config model.yaml --output_dir out"


@pytest.fixture
def attempt(tmp_path, monkeypatch, capsys):
    """Runs the command in a folder, checks that it left no file, and returns its message."""
    monkeypatch.chdir(tmp_path)

    def refused(arguments: str) -> str:
        before = set(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as exited:
            run(ConvertConfig, main, "convert", arguments.split())
        told = capsys.readouterr()
        assert exited.value.code == 2 and set(tmp_path.rglob("*")) == before, "something was left"
        assert "Traceback" not in told.err and "saved in" not in told.out
        lines = [line for line in told.err.splitlines() if line and "%|" not in line]  # bars of transformers
        assert len(lines) <= 6 and max(map(len, lines)) < 600
        return told.err

    return refused


@pytest.fixture(scope="module")
def whole():
    """The weights of a Net2NetTransformer with its tokenizer."""
    return gpt() | {f"first_stage_model.{name}": value for name, value in tokenizer().state_dict().items()}


class Payload:
    """Creates a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def masked(places: int) -> torch.Tensor:
    mask = torch.ones(20, 20).tril()
    mask[:places, :places] = 1
    return mask[None, None]


BLOCK, MASK, TOKENS = "transformer.blocks.1", "transformer.blocks.0.attn.mask", "transformer.tok_emb.weight"
CHANGES = {
    "missing": ({f"{BLOCK}.attn.key.bias": None}, "1 missing: blocks.1.attn.key.bias"),
    "a missing layer": ({f"{BLOCK}.ln1.weight": None, f"{BLOCK}.ln1.bias": None}, "2 missing: blocks.1.ln1.weight, bl"),
    "no layers": ({"transformer.blocks.": None}, "missing: blocks.0.attn.key.weight"),
    "too many": ({"transformer.extra": torch.ones(2)}, "1 unexpected: extra"),
    "a wrong shape": ({f"{BLOCK}.mlp.0.weight": torch.ones(8, 8)}, "blocks.1.mlp.0.weight (8, 8), needed (128, 32)"),
    "flat tokens": ({TOKENS: torch.ones(32)}, "a GPT has tok_emb.weight (tokens, width)"),
    "no positions": ({"transformer.pos_emb": None}, "a GPT has tok_emb.weight (tokens, width) and pos_emb"),
    "no prior": ({"transformer.": None}, "it holds 0 tensors tok_emb.weight"),
    "two priors": ({"other.tok_emb.weight": torch.ones(2, 2)}, "it holds 2 tensors tok_emb.weight"),
    "not finite": ({"transformer.ln_f.bias": torch.full((32,), torch.nan)}, "ln_f.bias: not every number is finite"),
    "whole numbers": ({"transformer.ln_f.bias": torch.ones(32).long()}, "ln_f.bias (torch.int64): weights must be"),
    "expanded": ({TOKENS: torch.zeros(1, 1).expand(2**20, 2**20)}, "the file stores fewer numbers than these tensors"),
    "tokens that see each other": ({MASK: masked(8)}, "its first tokens see each other"),
    "no mask": ({MASK: torch.ones(3)}, "is no causal mask"),
    "an expanded mask": ({MASK: torch.ones(1).expand(1, 1, 2**20, 2**20)}, "is no causal mask"),
    "an expanded order": ({"permuter.forward_shuffle_idx": torch.zeros(1).expand(2**40)}, "in another order than row"),
    "another order": ({"permuter.forward_shuffle_idx": torch.arange(16).flip(0)}, "in another order than row by row"),
    "images as conditions": ({"cond_stage_model.quant_conv.bias": torch.ones(4)}, "its conditions are images"),
    "part of its tokenizer": ({"first_stage_model.quant_conv.bias": None}, "1 missing: quant_conv.bias"),
    "too few tokens": (
        {TOKENS: torch.ones(23, 32), "transformer.head.weight": torch.ones(23, 32)},
        "vocab_size: is 25, but the weights have 23",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_weights(attempt, whole, case):
    changes, words = CHANGES[case]
    gone = tuple(name for name, value in changes.items() if value is None)
    weights = {name: value for name, value in whole.items() if not name.startswith(gone)}
    weights |= {name: value for name, value in changes.items() if value is not None}
    write(Path(), weights, first_stage_config=FIRST_STAGE, **CONDITIONS["classes"])
    assert words in attempt(COMMAND)


def code(weights):
    torch.save({"state_dict": weights, "callbacks": Payload()}, "last.ckpt")


def code_in_an_old_pickle(weights):
    torch.save({"state_dict": weights | {"x": Payload()}}, "last.ckpt", _use_new_zipfile_serialization=False)


def truncated(weights):
    content = Path("last.ckpt").read_bytes()
    Path("last.ckpt").write_bytes(content[: len(content) // 2])


FILES = {
    "code": (code, "asks for posix.mkdir, which is code, not weights; nothing was run"),
    "code in an old pickle": (code_in_an_old_pickle, "asks for posix.mkdir, which is code"),
    "truncated": (truncated, "it is not a complete checkpoint of torch.save"),
    "gone": (lambda weights: Path("last.ckpt").unlink(), "there is no such file"),
    "numbers": (lambda weights: torch.save([1, 2], "last.ckpt"), "it holds list; it must hold a state dict"),
}


@pytest.mark.parametrize("case", FILES)
def test_files(attempt, whole, case):
    damage, words = FILES[case]
    write(Path(), whole, first_stage_config=FIRST_STAGE, **CONDITIONS["classes"])
    damage(whole)
    assert words in attempt(COMMAND) and not Path("executed").exists()


NETWORK = "transformer_config.params"
CONFIGS = {
    "a number of layers": ({f"{NETWORK}.n_layer": 3}, f"config: model.params.{NETWORK}.n_layer: is 3, but the weights"),
    "an unknown key": ({f"{NETWORK}.n_haed": 3}, "n_haed: unknown key; did you mean 'n_head'?"),
    "heads": ({f"{NETWORK}.n_head": 5}, "num_heads: received 5; must divide the width of the prior, 32"),
    "no heads": ({f"{NETWORK}.n_head": None}, "n_head: received null; must be"),
    "tokens that see each other": ({f"{NETWORK}.n_unmasked": 8}, "n_unmasked: received 8; its first tokens see"),
    "another network": ({"transformer_config.target": "x.CodeGPT"}, "received 'x.CodeGPT'; supported is only GPT"),
    "another order": ({"permuter_config": {"target": "x.ZCurve"}}, "'x.ZCurve'; supported is only Identity"),
    "coordinates": ({"cond_stage_config": {"target": "x.CoordStage"}}, "'x.CoordStage'; supported are Labelator"),
    "images": ({"cond_stage_config": "__is_first_stage__"}, "'__is_first_stage__'; supported are Labelator"),
    "too many classes": ({"cond_stage_config.params.n_classes": 26}, "num_classes: received 26; class c is token c"),
    "a start outside": ({"cond_stage_config": None, "unconditional": True, "sos_token": 25}, "start_code: received 25"),
    "noise": ({"pkeep": 0.0}, "model.params.pkeep: received 0.0; must be"),
    "a larger grid": ({"first_stage_config.params.ddconfig.resolution": 32}, "64 codes; this prior has positions for"),
    "a tokenizer": ({"first_stage_config.params.n_embed": 25}, "n_embed: is 25, but the weights have 24"),
    "nothing": ({"transformer_config": None}, "transformer_config: received null; must be"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations(attempt, whole, case):
    changes, words = CONFIGS[case]
    write(Path(), whole, first_stage_config=FIRST_STAGE, **CONDITIONS["classes"])
    values = yaml.safe_load(Path("model.yaml").read_text())
    for key, value in changes.items():
        section, parts = values["model"]["params"], key.split(".")
        for part in parts[:-1]:
            section = section[part]
        section[parts[-1]] = value
    Path("model.yaml").write_text(yaml.safe_dump(values))
    assert words in attempt(COMMAND)


ALONE = "--from taming --checkpoint alone.ckpt --output_dir out"
OPTIONS = {
    "no heads": (
        f"{ALONE} --num_classes 3",
        "num_heads: the weights do not state it; give it, or a --config with n_head",
    ),
    "no classes": (f"{ALONE} --num_heads 4", "num_classes: the weights do not state it"),
    "no grid": (f"{ALONE} --num_heads 4 --num_classes 3", "grid: the checkpoint holds no tokenizer, which states it"),
    "a start of classes": (
        f"{ALONE} --num_heads 4 --num_classes 3 --start_code 1",
        "start_code: received 1; a prior with",
    ),
    "a side": (f"{ALONE} --num_heads 4 --num_classes 3 --grid [4]", "grid: received [4]; must be h and w"),
    "a large grid": (
        f"{ALONE} --num_heads 4 --num_classes 3 --grid [3,7] --downsampling_factor 4",
        "grid: received [3, 7], 21 codes; this prior has positions for 20",
    ),
    "other heads": (f"{COMMAND} --num_heads 8", "num_heads: received 8, but the configuration has 4 (n_head)"),
    "two tokenizers": (f"{COMMAND} --tokenizer vqgan", "but the checkpoint holds the tokenizer of this prior"),
    "other pixels": (f"{COMMAND} --downsampling_factor 8", "received 8, but the tokenizer has 4; leave it out"),
    "more codes than tokens": (
        f"{ALONE} --num_heads 4 --num_classes 3 --tokenizer vqgan --checkpoint small.ckpt",
        "has 24 codes; this prior has 23 tokens",
    ),
    "no such tokenizer": (f"{ALONE} --num_heads 4 --num_classes 3 --tokenizer x/y/z", "there is no such folder"),
    "an output": ("--from taming --checkpoint last.ckpt --config model.yaml --output_dir vqgan", "it exists already"),
    "llamagen": (
        "--from llamagen --checkpoint c2i_B_256.pt --output_dir out",
        "no stock model of transformers computes",
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(attempt, whole, case):
    arguments, words = OPTIONS[case]
    write(Path(), whole, first_stage_config=FIRST_STAGE, **CONDITIONS["classes"])
    torch.save(gpt(), "alone.ckpt")
    small = {name: torch.ones(23, 32) for name in (TOKENS, "transformer.head.weight")}
    torch.save(gpt() | small, "small.ckpt")
    if "vqgan" in arguments:
        tokenizer().save_pretrained("vqgan")
        VQGANImageProcessor(16).save_pretrained("vqgan")
    assert words in attempt(arguments)


@needs_golden
def test_tokens_that_see_each_other_are_no_gpt2(attempt):
    """The stored logits with `n_unmasked` 8 differ from those of a causal model, so the weights must be refused."""
    golden = load_file(GOLDEN / "gpt_tiny.safetensors")
    assert not torch.allclose(golden["io.logits_n_unmasked8"], golden["io.logits"], atol=1e-2)
    golden["blocks.0.attn.mask"][..., :8, :8] = 1
    save_file(golden, "other.safetensors")
    options = f"--config {GOLDEN}/gpt_tiny.json --num_classes 80 --grid [4,8] --downsampling_factor 16"
    told = attempt(f"--from taming --checkpoint other.safetensors {options} --output_dir out")
    assert "blocks.0.attn.mask (1, 1, 32, 32) is no causal mask: its first tokens see each other" in told
