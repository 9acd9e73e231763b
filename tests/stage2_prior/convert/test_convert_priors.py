"""Priors of taming-transformers: the stock GPT-2 gives the same logits and codes, alone and in a pipeline."""

from pathlib import Path

import pytest
import torch
import yaml
from transformers import GPT2LMHeadModel

from configs import run
from pipelines import VQGANPipeline
from stage1_vqgan import VQGANConfig, VQGANImageProcessor, VQGANModel
from stage2_prior import TokenLayout, load_language_model
from stage2_prior.convert.__main__ import main
from stage2_prior.convert.command import UNKNOWN, ConvertConfig
from stage2_prior.prior import adapt_prior
from tests import golden_priors
from tests.golden import GOLDEN
from tests.slow import few

needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the original's numbers are not here")

TOKENIZER = {
    "image_size": 16,
    "base_channels": 32,
    "channel_multiplier": [1, 1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "latent_channels": 8,
    "embed_dim": 4,
    "num_embeddings": 24,
}
DDCONFIG = {
    "double_z": False,
    "z_channels": 8,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}
FIRST_STAGE = {"target": "taming.models.vqgan.VQModel", "params": {"embed_dim": 4, "n_embed": 24, "ddconfig": DDCONFIG}}
# One token more than the tokenizer has codes, and more places than an image has codes, as in published models.
VOCAB, PLACES, WIDTH, HEADS, LAYERS = 25, 20, 32, 4, 2
NETWORK = {"vocab_size": VOCAB, "block_size": PLACES, "n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH}
CONDITIONS = {
    "classes": {"cond_stage_config": {"target": "taming.modules.util.Labelator", "params": {"n_classes": 5}}},
    "no classes": {"cond_stage_config": "__is_unconditional__", "sos_token": 24},
}


def gpt(prefix: str = "transformer.") -> dict[str, torch.Tensor]:
    """Random weights of a GPT, by their names in the original. They are wide, so that logits differ clearly."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    weights = {"tok_emb.weight": 4 * draw(VOCAB, WIDTH), "pos_emb": 3 * draw(1, PLACES, WIDTH)}
    for layer in range(LAYERS):
        block = f"blocks.{layer}"
        for name in ("ln1", "ln2"):
            weights[f"{block}.{name}.weight"], weights[f"{block}.{name}.bias"] = 1 + draw(WIDTH), draw(WIDTH)
        linear = dict.fromkeys(("attn.key", "attn.query", "attn.value", "attn.proj"), (WIDTH, WIDTH))
        for name, shape in (linear | {"mlp.0": (4 * WIDTH, WIDTH), "mlp.2": (WIDTH, 4 * WIDTH)}).items():
            weights[f"{block}.{name}.weight"], weights[f"{block}.{name}.bias"] = 2 * draw(*shape), draw(shape[0])
        weights[f"{block}.attn.mask"] = torch.ones(PLACES, PLACES).tril()[None, None]
    weights |= {"ln_f.weight": 1 + draw(WIDTH), "ln_f.bias": draw(WIDTH), "head.weight": 4 * draw(VOCAB, WIDTH)}
    return {f"{prefix}{name}": value for name, value in weights.items()}


def logits(weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """The original's forward, `(B, T)` to `(B, T, V)`, written from its formulas."""

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ weights[f"transformer.{name}.weight"].T + weights[f"transformer.{name}.bias"]

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return x * weights[f"transformer.{name}.weight"] + weights[f"transformer.{name}.bias"]

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    length = tokens.shape[1]
    x = weights["transformer.tok_emb.weight"][tokens] + weights["transformer.pos_emb"][:, :length]
    hidden = torch.ones(length, length).triu(1).bool()
    for layer in range(LAYERS):
        block = f"blocks.{layer}"
        inside = norm(f"{block}.ln1", x)
        query, key, value = (heads(linear(f"{block}.attn.{part}", inside)) for part in ("query", "key", "value"))
        scores = (query @ key.transpose(2, 3) / (WIDTH // HEADS) ** 0.5).masked_fill(hidden, -torch.inf)
        x = x + linear(f"{block}.attn.proj", (scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
        inside = linear(f"{block}.mlp.0", norm(f"{block}.ln2", x))
        inside = inside * 0.5 * (1 + torch.erf(inside / 2**0.5))
        x = x + linear(f"{block}.mlp.2", inside)
    return norm("ln_f", x) @ weights["transformer.head.weight"].T


def greedy(weights: dict[str, torch.Tensor], first: torch.Tensor, steps: int, num_codes: int) -> torch.Tensor:
    tokens = first[:, None]
    for _ in range(steps):
        tokens = torch.cat([tokens, logits(weights, tokens)[:, -1:, :num_codes].argmax(-1)], 1)
    return tokens[:, 1:]


def tokenizer() -> VQGANModel:
    torch.manual_seed(0)
    return VQGANModel(VQGANConfig(**TOKENIZER)).eval()


def write(folder: Path, weights: dict[str, torch.Tensor], **params) -> None:
    """Writes the checkpoint as Lightning does, and its configuration."""
    state = {"state_dict": weights, "epoch": 3, "global_step": 10, "pytorch-lightning_version": "1.0.8"}
    torch.save(state, folder / "last.ckpt")
    network = {"target": "taming.modules.transformer.mingpt.GPT", "params": NETWORK}
    params = {"cond_stage_key": "class_label", "transformer_config": network, **params}
    model = {"base_learning_rate": 4.5e-6, "target": "taming.models.cond_transformer.Net2NetTransformer"}
    (folder / "model.yaml").write_text(yaml.safe_dump({"model": {**model, "params": params}}))


def command(arguments: str, at: Path) -> Path:
    run(ConvertConfig, main, "convert", [word.format(at=at) for word in arguments.split()])
    return at / "out"


TAMING = "--from taming --checkpoint {at}/last.ckpt --config {at}/model.yaml --output_dir {at}/out"


@needs_golden
def test_logits_and_greedy_codes_are_the_originals():
    """`python -m tests.golden` prints them as a table."""
    found = list(golden_priors.compare())
    assert len(found) >= 9 and [row for row in found if not row.error <= row.bound] == []


@pytest.mark.parametrize("conditions", few(CONDITIONS, "classes"))
@torch.no_grad()
def test_a_checkpoint_with_its_tokenizer_becomes_a_pipeline(tmp_path, capsys, conditions):
    weights, model = gpt(), tokenizer()
    first_stage = {f"first_stage_model.{name}": value for name, value in model.state_dict().items()}
    order = {f"permuter.{way}_shuffle_idx": torch.arange(16) for way in ("forward", "backward")}
    write(tmp_path, {**weights, **first_stage, **order}, first_stage_config=FIRST_STAGE, **CONDITIONS[conditions])
    pipe = VQGANPipeline.from_pretrained(command(TAMING, tmp_path))
    pipe.set_progress_bar_config(disable=True)
    assert f"pipeline saved in {tmp_path / 'out'}" in (told := capsys.readouterr().out) and "left out: 1 tokens" in told
    assert type(pipe.prior) is GPT2LMHeadModel and not pipe.prior.config.tie_word_embeddings
    assert {path.name for path in tmp_path.iterdir()} == {*("last.ckpt", "model.yaml", "out")}

    first = torch.tensor([4, 0, 2]) if conditions == "classes" else torch.tensor([24, 24])
    asked = {"class_labels": first.tolist()} if conditions == "classes" else {"num_images": 2}
    made = pipe.generate(**asked, temperature=0.0, output_type="pt")
    assert torch.equal(made.codes.flatten(1), greedy(weights, first, 16, 24)) and made.codes.unique().numel() > 4
    expected = model.decode_codes(made.codes).add(1).div(2).clamp(0, 1)
    assert torch.allclose(made.images, expected, atol=1e-5)

    tokens = torch.randint(24, (len(first), 16), generator=torch.Generator().manual_seed(1))
    prompt = pipe.layout.class_tokens(first) if pipe.class_names else torch.full_like(first, pipe.layout.null_token)
    theirs, ours = (torch.cat([start[:, None], tokens[:, :-1]], 1) for start in (first, prompt))
    assert torch.allclose(pipe.prior(ours).logits[..., :24], logits(weights, theirs)[..., :24], atol=1e-4, rtol=1e-5)
    assert torch.equal(pipe.prior.generate(prompt[:, None], do_sample=False)[:, 1:], made.codes.flatten(1))
    assert adapt_prior(str(tmp_path / "out" / "prior"), {}, pipe.layout).config.n_embd == WIDTH  # for fine-tuning
    if conditions == "classes":  # it was trained without the null token
        assert pipe.class_names == ["0", "1", "2", "3", "4"]
        with pytest.raises(ValueError, match="guidance_scale"):
            pipe.generate(class_labels=[1], guidance_scale=2.0)


@torch.no_grad()
def test_a_prior_alone_and_with_a_given_tokenizer(tmp_path, capsys):
    """A GPT without the rest of its Net2NetTransformer, and options in place of a configuration."""
    weights = gpt()
    torch.save({"model": {f"module.{name}": value for name, value in weights.items()}}, tmp_path / "last.ckpt")
    options = "--from taming --checkpoint {at}/last.ckpt --num_heads 4 --num_classes 0 --start_code 7"
    alone = command(f"{options} --grid [4,4] --downsampling_factor 4 --output_dir {{at}}/out", tmp_path)
    layout = TokenLayout.from_pretrained(alone)
    assert (layout.tokenizer_fingerprint, layout.num_codes, layout.has_null) == (UNKNOWN, VOCAB, True)
    assert "the checkpoint holds no tokenizer" in capsys.readouterr().out
    start = torch.tensor([7])
    codes = load_language_model(alone).generate(torch.tensor([[layout.null_token]]), do_sample=False)[:, 1:]
    assert torch.equal(codes, greedy(weights, start, 16, VOCAB))

    model = tokenizer()
    model.save_pretrained(tmp_path / "vqgan")
    saved = VQGANModel.from_pretrained(tmp_path / "vqgan")
    VQGANImageProcessor(16).save_pretrained(tmp_path / "vqgan")
    command(f"{options} --grid [2,6] --tokenizer {{at}}/vqgan --output_dir {{at}}/pipeline", tmp_path)
    pipe = VQGANPipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.layout.tokenizer_fingerprint == saved.config.fingerprint
    made = pipe.generate(temperature=0.0)
    assert made.images[0].size == (24, 8) and torch.equal(made.codes.flatten(1), greedy(weights, start, 12, 24))
