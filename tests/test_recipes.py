"""Recipes within minutes: the arithmetic, the original's settings, and a recipe from end to end."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from benchmarks import diffusers_vqmodel, recipes
from benchmarks.recipes import Decisions, Speed, evaluation_config, main, scaled, stage1_config, stage2_config
from configs import load_config
from stage1_vqgan import Stage1Config, VQGANConfig, VQGANModel, load_vqgan

TINY = [
    "--data", "digits", "--num_workers", "0", "--probe_steps", "4",
    "--stage1", "model.base_channels=8", "model.norm_num_groups=4", "per_device_train_batch_size=8",
    "--stage2", "model.hidden_size=32", "model.intermediate_size=64", "model.num_hidden_layers=1", "num_views=2",
    "--evaluate", "samples_per_class=5", "max_real_images=300",
]  # fmt: skip


def arguments(preset: str, original: bool = False, **stages: dict) -> argparse.Namespace:
    named = {"stage1": {}, "stage2": {}, "evaluate": {}, **stages}
    return argparse.Namespace(
        preset=preset, original=original, perceptual="none", data="digits", num_workers=0, runs=Path("x"), **named
    )


def test_steps_fill_the_time():
    speed = Speed(step=0.02, fixed=5.0)
    assert speed.steps_within(105.0) == pytest.approx(recipes.MARGIN * 100 / 0.02, abs=1)
    assert speed.steps_within(1.0) == 10


def test_starts_keep_their_share_of_the_steps():
    changed = {"max_steps": 320, "warmup_steps": 30, "loss.adversarial_start_step": 100}
    changes = scaled(load_config(Stage1Config, "digits/stage1", changed), 960, evaluations=3)
    assert changes["warmup_steps"] == 90 and changes["loss.adversarial_start_step"] == 300
    assert changes["eval_steps"] == 320 and changes["save_steps"] == 120


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("preset", ["digits", "fashion_mnist", "fashion_mnist/cpu", "cifar10"])
def test_every_recipe_has_settings(preset, original):
    args = arguments(preset, original)
    stage1, stage2, evaluation = stage1_config(args), stage2_config(args), evaluation_config(args)
    assert stage1.loss.perceptual_weight == 0 and stage1.has_discriminator == (original or "cpu" not in preset)
    assert evaluation.guidance_scale == (1.0 if original else 1.5)
    assert (stage2.model["model_type"] == "gpt2") == original
    assert evaluation.pipeline == str(Path("x/pipeline")) and stage2.tokenizer == stage1.output_dir


def test_the_original_has_the_size_of_the_preset():
    changed = {"stage1": {"model.latent_channels": 48, "per_device_train_batch_size": 10}}
    args = arguments("digits", True, stage2={"model.hidden_size": 64}, **changed)
    stage1, stage2 = stage1_config(args), stage2_config(args)
    assert stage1.model["embed_dim"] == 48 and stage1.learning_rate == pytest.approx(4.5e-5)
    assert stage1.loss.discriminator_start_step == stage1.loss.adversarial_start_step > 0
    assert stage2.model["n_embd"] == 64 and stage2.model["n_layer"] == 4


def test_decisions_are_taken_once(tmp_path):
    path = tmp_path / "runs" / "steps.json"
    assert Decisions(path).steps("stage1", 10.0, lambda: Speed(0.1, 0.0)) == int(recipes.MARGIN * 100)
    assert Decisions(path).steps("stage1", 10.0, lambda: pytest.fail("measured again")) == int(recipes.MARGIN * 100)


@pytest.fixture
def stock():
    """The settings of a tiny tokenizer of digits, and a `VQModel` of its sizes with its discriminator."""
    pytest.importorskip("diffusers")
    sizes = {"model.base_channels": 8, "model.norm_num_groups": 4, "per_device_train_batch_size": 8}
    config = stage1_config(arguments("digits", stage1=sizes))
    torch.manual_seed(0)
    return config, diffusers_vqmodel.vqmodel(config), diffusers_vqmodel.discriminator(1, 16)


def test_the_stock_model_has_the_size_of_the_preset(stock):
    config, model, _ = stock
    ours = VQGANModel(VQGANConfig(**config.model | {"decoder_num_res_blocks": None}))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in ours.parameters())


@pytest.mark.parametrize("size, layers", [(16, 3), (28, 4), (32, 4), (33, 5), (128, 6), (256, 6)])
def test_two_by_two_positions_are_left(size, layers):
    judge = diffusers_vqmodel.discriminator(1, size).eval()
    values = judge(torch.zeros(1, 1, size, size))
    assert len([layer for layer in judge if isinstance(layer, torch.nn.Conv2d)]) == layers + 1
    assert values.shape[-2:] == ((2, 2) if layers < 6 else (size // 64, size // 64)) and 0 < values.min() < 1


def test_each_step_trains_its_own_module(stock):
    _, model, judge = stock
    images = torch.rand(8, 1, 16, 16) * 2 - 1
    steps = {"model": diffusers_vqmodel.generator_step(model, judge)}
    steps["judge"] = diffusers_vqmodel.discriminator_step(model, judge)
    for trained, step in steps.items():
        before = {name: [p.clone() for p in module.parameters()] for name, module in named(model, judge)}
        step(images)
        changed = {
            name: any(not torch.equal(a, b) for a, b in zip(before[name], module.parameters(), strict=True))
            for name, module in named(model, judge)
        }
        assert changed == {"model": trained == "model", "judge": trained == "judge"}


def named(model, judge):
    return [("model", model), ("judge", judge)]


@pytest.mark.slow
def test_the_tokenizer_learns_to_reconstruct(stock):
    _, model, judge = stock
    images = torch.rand(8, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3) * 2 - 1
    step, errors = diffusers_vqmodel.generator_step(model, judge), []
    for _ in range(20):
        with torch.no_grad():
            errors.append((model(images).sample - images).square().mean().item())
        step(images)
    assert errors[-1] < 0.9 * errors[0]


def test_it_becomes_a_tokenizer_of_this_package(stock, tmp_path):
    config, _, _ = stock
    config.output_dir = str(tmp_path / "vqgan")
    results = diffusers_vqmodel.train(config, seconds=0.0)
    assert results["global_step"] == 1
    assert json.loads((tmp_path / "vqgan" / "train_results.json").read_text()) == results
    model = load_vqgan(config.output_dir)
    assert model.config.quantizer == "vq" and model.config.fingerprint


def test_what_excludes_the_stock_model(capsys):
    for others, message in [(["--original"], "not allowed with"), (["--perceptual", "random"], "received random")]:
        with pytest.raises(SystemExit):
            main(["digits", "--data", "digits", "--diffusers", *others])
        assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["", "-original", "-diffusers"])
def test_a_recipe(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["digits", "--minutes", "0.2", *TINY, *([f"-{kind}"] if kind else [])]
    main(command)
    folder = Path("runs/benchmarks/recipes") / f"digits{kind}"
    result = json.loads((folder / "results.json").read_text())
    assert {path.name for path in folder.iterdir()} == {"results.json", "samples.png", "reconstructions.png"}
    assert result["minutes"].keys() == {"stage1", "tokenize", "stage2", "evaluate"}
    assert result["metrics"]["classification_accuracy_score_real"] > 0.5
    if kind != "-diffusers":
        assert result["settings"]["stage1"]["max_steps"] == result["decisions"]["stage1"]["steps"]

    main(command)  # continues without training again
    again = json.loads((folder / "results.json").read_text())
    assert again["metrics"] == result["metrics"] and again["decisions"] == result["decisions"]
