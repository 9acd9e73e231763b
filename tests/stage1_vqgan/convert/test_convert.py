"""Conversion: converted tokenizers give the same codes and images as in their code base, for all layouts."""

import json

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from configs import load_config, run
from stage1_vqgan import Stage1Config, VQGANConfig, VQGANImageProcessor, VQGANModel
from stage1_vqgan.convert.command import ConvertConfig, convert
from stage1_vqgan.training.discriminator import PatchDiscriminator
from stage1_vqgan.training.step import VQGANTrainer
from tests import tiny
from tests.golden import GOLDEN, elementwise
from tests.golden_models import LOOKED_UP
from tests.other_tokenizers import (
    facts,
    images,
    llamagen_weights,
    reference,
    taming_params,
    taming_weights,
    write_taming,
)
from tests.slow import few

needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the original's numbers are not here")


def command(arguments, **paths):
    run(ConvertConfig, convert, "convert", [word.format(**paths) for word in arguments.split()])


TAMING = "--from taming --checkpoint {at}/last.ckpt --config {at}/model.yaml --output {at}/out"
VERIFY = " --verify {at}/facts.safetensors"

# ---------- the original


@needs_golden
@pytest.mark.parametrize(
    "name, code_base",
    [
        pytest.param("f16_narrow", "taming", marks=pytest.mark.slow),
        ("llamagen_tiny", "llamagen"),
        ("tiny", "taming"),
    ],
)
def test_the_originals_own_numbers(tmp_path, capsys, name, code_base):
    arguments = f"--from {code_base} --checkpoint {{golden}}.safetensors --config {{golden}}.json --output {{at}}/out"
    command(arguments + " --verify {golden}.safetensors", golden=GOLDEN / name, at=tmp_path)
    assert "io2: 0 of " in capsys.readouterr().out
    model, stored = VQGANModel.from_pretrained(tmp_path / "out").eval(), load_file(GOLDEN / f"{name}.safetensors")
    for group in ("io", "io2"):
        codes = model.encode(stored[f"{group}.input"]).codes
        assert torch.equal(codes.flatten(), stored[f"{group}.indices"])
        with torch.no_grad():
            error = elementwise(model.decode_codes(codes), stored[f"{group}.recon"])
        assert error <= LOOKED_UP


@needs_golden
def test_weights_alone_tell_the_layout(tmp_path):
    """Without a configuration, codes and images are the same. Only image_size is unknown."""
    command(
        "--from llamagen --checkpoint {golden}.safetensors --output {at}/out --verify {golden}.safetensors",
        golden=GOLDEN / "llamagen_tiny",
        at=tmp_path,
    )
    config = VQGANConfig.from_pretrained(tmp_path / "out")
    assert (config.image_size, config.attn_levels, config.channel_multiplier) == (256, [2], [1, 1, 2])


# ---------- many layouts

LAYOUTS = {
    "two levels": {},
    "gray": {"channels": 1, "attends": (1,)},
    "four levels, attention in two": {"widths": (32, 32, 64, 128), "attends": (1, 3), "size": 32},
    "five channels, three blocks": {"channels": 5, "layers": 3, "widths": (64, 64)},
    "one level": {"widths": (32,), "attends": (0,)},
    "widths that are no multiples": {"widths": (64, 96, 32), "layers": 2, "embed_dim": 8, "latent_channels": 3},
}


@pytest.mark.parametrize("layout", few(LAYOUTS, "widths that are no multiples"))
def test_layouts(tmp_path, layout):
    model = reference(**LAYOUTS[layout])
    widths = model.config.block_out_channels
    write_taming(tmp_path, model, **_fractions(model))
    command(TAMING + VERIFY, at=tmp_path)
    config = VQGANConfig.from_pretrained(tmp_path / "out")
    assert config.widths == list(widths) and config.image_size == model.config.sample_size

    model.save_pretrained(tmp_path / "theirs")
    command("--from diffusers --checkpoint {at}/theirs --output {at}/ours" + VERIFY, at=tmp_path)
    command("--to diffusers --checkpoint {at}/ours --output {at}/again", at=tmp_path)
    before, after = (load_file(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in ("theirs", "again"))
    assert facts_equal(before, after)
    assert facts_equal(facts(model), facts(type(model).from_pretrained(tmp_path / "again")))
    # equal models have equal fingerprints
    assert VQGANConfig.from_pretrained(tmp_path / "ours").fingerprint == config.fingerprint


@pytest.mark.parametrize(("legacy", "shape"), [(False, (2, 3, 16, 16)), (True, (1, 3, 16, 24))])
def test_losses_and_gradients_are_the_references(tmp_path, legacy, shape):
    """Compares loss and gradients of a whole tokenizer, for both placements of β, on square and on wide images."""
    model = reference(attends=(1,))
    model.save_pretrained(tmp_path / "theirs")
    command("--from diffusers --checkpoint {at}/theirs --output {at}/ours", at=tmp_path)
    ours = VQGANModel.from_pretrained(tmp_path / "ours", quantizer_options={"legacy_codebook_loss": legacy}).eval()
    model.quantize.legacy = legacy
    pixels = images(*shape)
    theirs = model(pixels)
    ((theirs.sample - pixels).abs().mean() + theirs.commit_loss).backward()
    out = ours(pixels)
    ((out.reconstruction - pixels).abs().mean() + out.codebook_loss).backward()
    assert out.codebook_loss.item() == pytest.approx(theirs.commit_loss.item(), rel=1e-5) and theirs.commit_loss > 0
    expected = taming_weights(model, gradients=True)
    found = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert found.keys() == expected.keys()
    whole = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * whole, name


def _fractions(model):
    """Fractional values of `ch_mult`, which derived code bases allow."""
    params, widths = taming_params(model), model.config.block_out_channels
    params["ddconfig"]["ch_mult"] = [width / widths[0] if width % widths[0] else width // widths[0] for width in widths]
    return params


def facts_equal(one, other):
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


LLAMAGEN_LAYOUTS = [{"attends": (1,)}, {"widths": (32, 32, 64, 128), "attends": (3,), "layers": 2}]


@torch.no_grad()
@pytest.mark.parametrize("layout", few(LLAMAGEN_LAYOUTS, LLAMAGEN_LAYOUTS[0]))
def test_llamagen_layouts(tmp_path, layout):
    model = reference(**layout)
    torch.save({"model": llamagen_weights(model), "optimizer": {"lr": 1.0}}, tmp_path / "vq.pt")
    command("--from llamagen --checkpoint {at}/vq.pt --output {at}/out", at=tmp_path)
    ours, pixels = VQGANModel.from_pretrained(tmp_path / "out").eval(), images(2, 3, 24, 40)
    latents = torch.nn.functional.normalize(model.encode(pixels).latents, dim=1)
    entries = torch.nn.functional.normalize(model.quantize.embedding.weight, dim=1)
    similarity = torch.einsum("bdhw,kd->bkhw", latents, entries)
    codes = similarity.argmax(1)
    assert torch.equal(ours.encode(pixels).codes, codes) and len(codes.unique()) > 3
    quantized = entries[codes].permute(0, 3, 1, 2)
    image = model.decoder(model.post_quant_conv(quantized))
    torch.testing.assert_close(ours.decode_codes(codes), image, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize(("source", "words"), [("llamagen", "encoder.conv_blocks"), ("taming", "use --from llamagen")])
def test_the_weights_of_the_other_code_base(tmp_path, capsys, source, words):
    """Both code bases have the same blocks, so a confusion could give a complete tokenizer with wrong codes."""
    model = reference()
    weights = {"llamagen": taming_weights, "taming": llamagen_weights}[source](model)
    torch.save(weights, tmp_path / "weights.ckpt")
    with pytest.raises(SystemExit) as exited:
        command(f"--from {source} --checkpoint {{at}}/weights.ckpt --output {{at}}/out", at=tmp_path)
    assert exited.value.code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@torch.no_grad()
@pytest.mark.parametrize("used", few([None, [7, 2, 20, 11, 0, 5]], [7, 2, 20, 11, 0, 5]))
def test_gumbel(tmp_path, used):
    model = reference(embed_dim=8)
    weights = {name: value for name, value in taming_weights(model).items() if not name.startswith("quantize.")}
    weights["quantize.proj.weight"] = torch.randn(24, 8, 1, 1)
    weights["quantize.proj.bias"] = torch.randn(24) / 10
    weights["quantize.embed.weight"] = torch.randn(24, 8)
    rows = torch.arange(24) if used is None else torch.tensor(used)
    if used is not None:
        weights["quantize.used"] = rows
    write_taming(tmp_path, model, weights, "taming.models.vqgan.GumbelVQ", kl_weight=1e-8)
    command(TAMING, at=tmp_path)
    ours, pixels = VQGANModel.from_pretrained(tmp_path / "out").eval(), images(2, 3, 16, 24)
    assert ours.config.quantizer == "gumbel" and ours.config.quantizer_options["kl_weight"] == 1e-8
    latents = model.encode(pixels).latents
    kernel, bias = weights["quantize.proj.weight"][rows, :, 0, 0], weights["quantize.proj.bias"][rows]
    codes = (torch.einsum("bdhw,kd->bkhw", latents, kernel) + bias[:, None, None]).argmax(1)
    assert torch.equal(ours.encode(pixels).codes, codes) and len(codes.unique()) > 2
    quantized = weights["quantize.embed.weight"][rows][codes].permute(0, 3, 1, 2)
    image = model.decoder(model.post_quant_conv(quantized))
    torch.testing.assert_close(ours.decode_codes(codes), image, atol=5e-5, rtol=1e-5)


def test_a_remapped_codebook(tmp_path, capsys):
    model = reference()
    stored = facts(model)
    met = torch.cat([stored["io.indices"], stored["io2.indices"]]).unique()
    used = met.flip(0)  # another order; entries that the images do not use are dropped
    assert 3 < len(used) < 24
    write_taming(tmp_path, model, taming_weights(model) | {"quantize.used": used}, remap="data/used.npy")
    for name in ("io.indices", "io2.indices"):
        stored[name] = (stored[name][:, None] == used).int().argmax(1)
    save_file(stored, tmp_path / "facts.safetensors")
    command(TAMING + VERIFY, at=tmp_path)
    assert f"the {len(used)} used entries" in capsys.readouterr().out
    assert VQGANConfig.from_pretrained(tmp_path / "out").num_embeddings == len(used)


# ---------- what comes, what goes


def test_what_is_in_a_published_checkpoint(tmp_path, capsys):
    """LPIPS, moving averages, colours and callbacks are dropped; float16 becomes float32; the discriminator stays."""
    model, discriminator = reference(channels=1), PatchDiscriminator(1, 8, 2)
    halves = {name: value.half() for name, value in taming_weights(model).items()}
    weights = halves | {
        "loss.perceptual_loss.net.slice1.0.weight": torch.ones(2),
        "model_ema.encoderconv_inweight": torch.ones(2),
        "model_ema.num_updates": torch.tensor(3),
        "colorize": torch.ones(3, 1, 1, 1),
        **{f"loss.discriminator.{name}": value for name, value in discriminator.state_dict().items()},
    }
    write_taming(tmp_path, model, weights)
    command(TAMING, at=tmp_path)
    told = capsys.readouterr().out
    for words in (
        "LPIPS (1 tensor)",
        "moving average of the weights",
        "colours",
        "discriminator.safetensors",
        "not compared",
    ):
        assert words in told
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert ours.keys() == halves.keys()
    assert all(
        value.dtype == torch.float32 and torch.equal(value, halves[name].float()) for name, value in ours.items()
    )
    kept = load_file(tmp_path / "out" / "discriminator.safetensors")
    assert facts_equal(kept, discriminator.state_dict())
    options = VQGANConfig.from_pretrained(tmp_path / "out").quantizer_options
    assert options["legacy_codebook_loss"] is True


def test_the_tokenizer_in_the_checkpoint_of_a_transformer(tmp_path, capsys):
    """Some tokenizers were only published in this form."""
    model = reference()
    weights = {f"first_stage_model.{name}": value for name, value in taming_weights(model).items()}
    others = {"transformer.tok_emb.weight": torch.ones(24, 8), "transformer.pos_emb": torch.ones(1, 64, 8)}
    write_taming(tmp_path, model, weights | others | {"cond_stage_model.colorize": torch.ones(3)})
    inner = {"target": "taming.models.vqgan.VQModel", "params": taming_params(model)}
    params = {"transformer_config": {"target": "taming.modules.transformer.mingpt.GPT"}, "first_stage_config": inner}
    outer = {"model": {"target": "taming.models.cond_transformer.Net2NetTransformer", "params": params}}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(outer))
    command(TAMING + VERIFY, at=tmp_path)
    assert "the tokenizer is first_stage_model.*; 3 tensors are of other models" in capsys.readouterr().out
    assert VQGANConfig.from_pretrained(tmp_path / "out").image_size == model.config.sample_size


def test_the_output_is_a_tokenizer_like_any_other(tmp_path):
    model = reference()
    write_taming(tmp_path, model)
    command(TAMING, at=tmp_path)
    ours = VQGANModel.from_pretrained(tmp_path / "out").eval()
    assert ours.config.fingerprint == ours.compute_fingerprint()
    processor = VQGANImageProcessor.from_pretrained(tmp_path / "out")
    assert (processor.image_shape, processor.num_channels) == ((16, 16), 3)
    carried = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert type(carried) is not VQGANModel
    assert torch.equal(carried.encode(images(1, 3, 16, 16)).codes, ours.encode(images(1, 3, 16, 16)).codes)
    (tmp_path / "new").touch()
    assert {path.stat().st_mode for path in (tmp_path / "out").iterdir()} == {(tmp_path / "new").stat().st_mode}


@pytest.mark.parametrize("num_layers, words", [(2, "starts from the weights of"), (1, "starts from random weights")])
def test_fine_tuning_starts_from_the_discriminator(tmp_path, capsys, num_layers, words):
    model, theirs = reference(channels=1), PatchDiscriminator(1, 8, 2)
    weights = {f"loss.discriminator.{name}": value for name, value in theirs.state_dict().items()}
    write_taming(tmp_path, model, taming_weights(model) | weights)
    command(TAMING, at=tmp_path)
    settings = {
        "output_dir": "unused",
        "max_steps": 1,
        "model_name_or_path": str(tmp_path / "out"),
        "data": {"dataset": "digits"},
        "loss": {"perceptual_weight": 0, "adversarial_weight": 0.1},
        "discriminator": {"base_channels": 8, "num_layers": num_layers},
    }
    AcceleratorState._reset_state(True)
    trainer = VQGANTrainer(load_config(Stage1Config, overrides=settings), Accelerator(cpu=True))
    AcceleratorState._reset_state(True)  # later tests may use a GPU
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("the discriminator starts")]
    assert len(told) == 1 and words in told[0]
    assert facts_equal(trainer.discriminator.state_dict(), theirs.state_dict()) == (num_layers == 2)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"quantizer": "gumbel"}, "its quantizer is 'gumbel'; a VQModel only supports 'vq'"),
        ({"quantizer_options": {"l2_normalize": True}}, "quantizer_options.l2_normalize is true"),
        ({"channel_multiplier": [2, 2]}, "channel_multiplier begins with 2"),
    ],
    ids=str,
)
def test_what_diffusers_cannot_express(tmp_path, capsys, changes, words):
    VQGANModel(VQGANConfig(**tiny.VQGAN | changes)).save_pretrained(tmp_path / "ours")
    with pytest.raises(SystemExit) as exited:
        command("--to diffusers --checkpoint {at}/ours --output {at}/out", at=tmp_path)
    assert exited.value.code == 2 and words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"norm_type": "spatial"}, "norm_type: received 'spatial'; supported is only 'group'"),
        ({"lookup_from_codebook": True}, "lookup_from_codebook: received true"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention: is False, but the weights have True"),
        ({"act_fn": "gelu"}, "act_fn: received 'gelu'; supported is only 'silu' or 'swish'"),
        ({"out_channels": 4}, "out_channels: is 4, but the weights have 3 (encoder.conv_in.weight"),
        ({"down_block_types": ["DownEncoderBlock2D"] * 2}, "down_block_types: is [], but the weights have [1]"),
        ({"block_out_channels": [32, 32]}, "block_out_channels: is [1, 1], but the weights have [1, 2]"),
        ({"_class_name": "AutoencoderKL"}, "_class_name: received 'AutoencoderKL'"),
        ({"norm_num_groups": 7}, "norm_num_groups"),
        ({"use_quant_conv": False}, "use_quant_conv: unknown key"),
    ],
    ids=str,
)
def test_what_diffusers_has_and_a_tokenizer_here_has_not(tmp_path, capsys, changes, words):
    folder = tmp_path / "theirs"
    reference(attends=(1,)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(SystemExit) as exited:
        command("--from diffusers --checkpoint {at}/theirs --output {at}/out", at=tmp_path)
    assert exited.value.code == 2 and words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize(
    "source",
    few(["diffusers", "taming", "taming without a configuration"], "diffusers", "taming without a configuration"),
)
def test_no_attention_in_the_middle(tmp_path, capsys, source):
    """As in the VQ models of latent diffusion without attention."""
    model = reference(mid_block_add_attention=False)
    write_taming(tmp_path, model, ddconfig=taming_params(model)["ddconfig"] | {"attn_type": "none"})
    model.save_pretrained(tmp_path / "theirs")
    if source == "diffusers":
        command("--from diffusers --checkpoint {at}/theirs --output {at}/out", at=tmp_path)
        command("--to diffusers --checkpoint {at}/out --output {at}/back", at=tmp_path)
    else:
        arguments = TAMING + VERIFY
        command(arguments if source == "taming" else arguments.replace("--config {at}/model.yaml", ""), at=tmp_path)
    assert " 0 of " in capsys.readouterr().out
    assert not VQGANConfig.from_pretrained(tmp_path / "out").mid_attention


def test_every_number_of_channels_has_an_image_processor(tmp_path, capsys):
    write_taming(tmp_path, reference(channels=4))
    command(TAMING + VERIFY, at=tmp_path)
    assert VQGANImageProcessor.from_pretrained(tmp_path / "out").num_channels == 4
    assert "no image processor" not in capsys.readouterr().out


def test_old_folders_of_diffusers(tmp_path, capsys):
    """Pickled weights, and attention layers with their old names."""
    model, folder = reference(attends=(0, 1)), tmp_path / "theirs"
    model.save_pretrained(folder)
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    for old, new in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        weights = {name.replace(old, new): value for name, value in weights.items()}
    torch.save(weights, folder / "diffusion_pytorch_model.bin")
    command("--from diffusers --checkpoint {at}/theirs --output {at}/out", at=tmp_path)
    assert "random images: 0 of 32 codes differ" in capsys.readouterr().out
    write_taming(tmp_path, model)
    command(TAMING.replace("/out", "/same") + VERIFY, at=tmp_path)
    one, same = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "same"))
    assert facts_equal(one, same)
