"""Fine-tuning from trained models, in both stages, called from Python."""

import copy
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from configs import ConfigError
from stage1_vqgan import VQGANConfig, VQGANModel
from stage1_vqgan.pretrained import DISCRIMINATOR_NAME
from stage1_vqgan.training.run import train as train_tokenizer
from stage1_vqgan.training.step import VQGANTrainer
from stage2_prior import TokenLayout
from stage2_prior.prior import adapt_prior, shared_tokens
from stage2_prior.training.run import train as train_prior
from tests import tiny


def tokenizer_config(tiny_runs, folder, **changes):
    path = str(tiny_runs.vqgan)
    return replace(
        copy.deepcopy(tiny_runs.stage1),
        output_dir=str(folder),
        model={},
        model_name_or_path=path,
        max_steps=3,
        **changes,
    )


def changed(before, after):
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


def test_a_tokenizer_goes_on_from_its_weights(tiny_runs, tmp_path):
    first = tokenizer_config(tiny_runs, tmp_path / "still", learning_rate=1e-30)
    before, still = VQGANModel.from_pretrained(tiny_runs.vqgan), train_tokenizer(first)
    weights = before.state_dict()
    # at this learning rate, only restarted codes may move: no k-means, no new initialisation
    assert changed(weights, still.state_dict()) <= {"quantize"}
    moved = train_tokenizer(tokenizer_config(tiny_runs, tmp_path / "moved"))
    assert changed(weights, moved.state_dict()) >= {"encoder", "decoder", "quantize"}
    assert moved.config.fingerprint == moved.compute_fingerprint() != before.config.fingerprint


def test_the_discriminator_goes_on_too(tiny_runs, tmp_path, capsys):
    """A discriminator that starts anew does not know the reconstructions, and costs quality at first."""
    saved = load_file(tiny_runs.vqgan / DISCRIMINATOR_NAME)
    assert float(saved["main.3.num_batches_tracked"]) > 0
    config = tokenizer_config(tiny_runs, tmp_path / "on", learning_rate=1e-30)
    config.loss.adversarial_start_step = 0
    train_tokenizer(config)
    assert f"the discriminator starts from the weights of {tiny_runs.vqgan}" in capsys.readouterr().out
    kept = load_file(tmp_path / "on" / DISCRIMINATOR_NAME)
    assert all(torch.equal(saved[name], kept[name]) for name in saved if name.endswith(("weight", "bias")))
    config.discriminator = replace(config.discriminator, augmentation=True, network="timm/resnet18")  # not of patchgan
    train_tokenizer(replace(config, output_dir=str(tmp_path / "augmented")))
    assert f"the discriminator starts from the weights of {tiny_runs.vqgan}" in capsys.readouterr().out
    other = replace(config, output_dir=str(tmp_path / "other"))
    other.discriminator = replace(config.discriminator, num_layers=1)
    train_tokenizer(other)
    told = capsys.readouterr().out
    assert f"random weights: that of {tiny_runs.vqgan} has discriminator.num_layers 2, not 1" in told
    assert load_file(tmp_path / "other" / DISCRIMINATOR_NAME).keys() != saved.keys()


def test_decoder_only_keeps_every_code(tiny_runs, tmp_path):
    config = tokenizer_config(tiny_runs, tmp_path / "decoder", trainable="decoder")
    config.codebook.restart_interval = 1
    tuned = train_tokenizer(config)
    before = VQGANModel.from_pretrained(tiny_runs.vqgan)
    assert changed(before.state_dict(), tuned.state_dict()) == {"post_quant_conv", "decoder"}
    assert tuned.config.fingerprint == before.config.fingerprint == tuned.compute_fingerprint()
    images = torch.rand(8, 1, 16, 16) * 2 - 1
    assert torch.equal(before.eval().encode(images).codes, tuned.encode(images).codes)


@pytest.mark.parametrize("channels", [4, 1025])
def test_channels_are_those_of_the_tokenizer(tiny_runs, tmp_path, monkeypatch, channels):
    """Gray images become opaque RGBA for a tokenizer of RGBA; what is no image is refused, as in a new run."""
    torch.manual_seed(0)
    VQGANModel(VQGANConfig(**tiny.VQGAN | {"in_channels": channels})).save_pretrained(tmp_path / "base")
    config = tokenizer_config(tiny_runs, tmp_path / "run")
    config.model_name_or_path = str(tmp_path / "base")
    if channels > 4:
        with pytest.raises(ConfigError, match=r"model\.in_channels: received 1025; images have at most 1024 channels"):
            train_tokenizer(config)
        return
    seen, step = [], VQGANTrainer.step
    monkeypatch.setattr(VQGANTrainer, "step", lambda self, images, n: seen.append(images) or step(self, images, n))
    train_tokenizer(config)
    red, green, blue, alpha = seen[0].unbind(1)
    assert torch.equal(red, green) and torch.equal(red, blue) and red.std() > 0.1 and (alpha == 1).all()


def test_options_that_are_not_given_stay(tiny_runs, tmp_path):
    VQGANModel.from_pretrained(tiny_runs.vqgan, quantizer_options={"l2_normalize": True}).save_pretrained(
        tmp_path / "a"
    )
    changes = {"model_name_or_path": str(tmp_path / "a"), "model": {"quantizer_options": {"commitment_cost": 0.5}}}
    tuned = train_tokenizer(replace(tokenizer_config(tiny_runs, tmp_path / "b"), **changes))
    assert tuned.config.quantizer_options == {"l2_normalize": True, "commitment_cost": 0.5}


@pytest.mark.slow
def test_decoder_only_keeps_a_codebook_of_moving_averages(tiny_runs, tmp_path):
    config = replace(tiny_runs.stage1, output_dir=str(tmp_path / "ema"), max_steps=2)
    config.model = {**config.model, "quantizer": "ema"}
    before = train_tokenizer(config)
    changes = {"model_name_or_path": config.output_dir, "trainable": "decoder"}
    tuned = train_tokenizer(replace(tokenizer_config(tiny_runs, tmp_path / "tuned"), **changes))
    assert changed(before.state_dict(), tuned.state_dict()) == {"post_quant_conv", "decoder"}


@pytest.mark.slow
def test_another_size_is_the_same_tokenizer(tiny_runs, tmp_path):
    """Its codes for images of any size are the same, so its fingerprint is too."""
    config = tokenizer_config(tiny_runs, tmp_path / "larger", trainable="decoder")
    tuned = train_tokenizer(replace(config, model={"image_size": 32}))
    before = VQGANModel.from_pretrained(tiny_runs.vqgan)
    assert tuned.config.fingerprint == tuned.compute_fingerprint() == before.config.fingerprint


@pytest.mark.slow
def test_resuming_decoder_only_is_exact(tiny_runs, tmp_path):
    config = tokenizer_config(tiny_runs, tmp_path / "run", trainable="decoder", save_steps=2)
    straight = train_tokenizer(config)
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    (tmp_path / "run" / "train_results.json").unlink()
    again = train_tokenizer(config)
    assert changed(straight.state_dict(), again.state_dict()) == set()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name_or_path": "./nowhere"}, r"model_name_or_path: received './nowhere'"),
        ({"model": {"quantizer": "ema"}}, r"model\.quantizer: received 'ema', but .* has 'vq'; leave it out"),
        (
            {"model": {"quantizer_options": {"l2_normalize": True}}},
            r"model\.quantizer_options\.l2_normalize: .* has False; leave it out",
        ),
        ({"model": {"quantizer_options": {"decay": 0.5}}}, r"model\.quantizer_options\.decay: .*unknown, vq has"),
        ({"model": {"base_channels": 16}}, r"model\.base_channels: received 16, but .* has 8; leave it out"),
        (
            {"model_name_or_path": None, "trainable": "decoder"},
            r"trainable: received 'decoder'; needs model_name_or_path",
        ),
    ],
    ids=str,
)
def test_tokenizers_that_cannot_be_fine_tuned(tiny_runs, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        train_tokenizer(replace(tokenizer_config(tiny_runs, tmp_path / "run"), **changes))


@pytest.mark.slow
def test_a_tokenizer_at_another_resolution(tiny_runs, tmp_path):
    config = replace(tokenizer_config(tiny_runs, tmp_path / "run"), model={"image_size": 32})
    tuned = train_tokenizer(config)
    assert tuned.config.image_size == VQGANModel.from_pretrained(config.output_dir).config.image_size == 32


def prior_config(tiny_runs, folder, **changes):
    path = str(tiny_runs.prior)
    return replace(tiny_runs.stage2, output_dir=str(folder), model={}, model_name_or_path=path, max_steps=2, **changes)


def test_a_prior_goes_on_from_its_weights(tiny_runs, tmp_path):
    weights = load_file(tiny_runs.prior / "model.safetensors")
    still = train_prior(prior_config(tiny_runs, tmp_path / "still", learning_rate=1e-30))
    assert changed(weights, still.state_dict()) == set()
    moved = train_prior(prior_config(tiny_runs, tmp_path / "moved"))
    assert changed(weights, moved.state_dict()) == {"model", "lm_head"}


def test_classes_are_matched_by_name(tiny_runs):
    known = TokenLayout.from_pretrained(tiny_runs.prior)
    layout = replace(known, class_names=("new", *reversed(known.class_names)), class_counts=())
    before = adapt_prior(str(tiny_runs.prior), {}, known)
    torch.manual_seed(0)
    prior = adapt_prior(str(tiny_runs.prior), {}, layout)
    rows = prior.get_input_embeddings().weight, before.get_input_embeddings().weight
    assert torch.equal(rows[0][:32], rows[1][:32])
    for number in range(10):
        assert torch.equal(rows[0][32 + layout.class_names.index(str(number))], rows[1][32 + number])
    assert torch.equal(rows[0][layout.null_token], rows[1][known.null_token])
    assert not torch.equal(rows[0][32], rows[1][32])  # the row of the new class
    assert changed(before.model.layers.state_dict(), prior.model.layers.state_dict()) == set()
    codes = torch.arange(5)[None]
    assert torch.equal(before(codes).logits[..., :32], prior(codes).logits[..., :32])
    assert shared_tokens(known, known).T.tolist() == [[token, token] for token in range(43)]


def test_priors_that_cannot_be_fine_tuned(tiny_runs, random_prior, tmp_path):
    layout = TokenLayout.from_pretrained(tiny_runs.prior)
    with pytest.raises(ConfigError, match=r"model_name_or_path: received 'nowhere/'; it holds no trained prior"):
        adapt_prior("nowhere/", {}, layout)
    with pytest.raises(ConfigError, match=r"codes are of another tokenizer .* was trained on those"):
        adapt_prior(str(tiny_runs.prior), {}, replace(layout, tokenizer_fingerprint="another"))
    with pytest.raises(ConfigError, match=r"model\.hidden_size: received 64, but .* has 32"):
        adapt_prior(str(tiny_runs.prior), {"model_type": "llama", "hidden_size": 64}, layout)
    random_prior("gpt2", layout).save_pretrained(tmp_path)
    layout.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"position embeddings are for 16 tokens; these sequences have 64"):
        adapt_prior(str(tmp_path), {}, replace(layout, grid=(8, 8)))
