"""Recipes within minutes: the arithmetic, the original's settings, and a recipe from end to end."""

import argparse
import json
from pathlib import Path

import pytest

from benchmarks import recipes
from benchmarks.recipes import Decisions, Speed, evaluation_config, main, scaled, stage1_config, stage2_config
from configs import load_config
from stage1_vqgan import Stage1Config

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
    config = load_config(Stage1Config, "digits/stage1")  # 320 steps, 30 of warm-up, adversarial loss from step 100
    changes = scaled(config, 960, evaluations=3)
    assert changes["warmup_steps"] == 90 and changes["loss.adversarial_start_step"] == 300
    assert changes["eval_steps"] == 320 and changes["save_steps"] == 120


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("preset", ["digits", "fashion_mnist", "cifar10"])
def test_every_recipe_has_settings(preset, original):
    args = arguments(preset, original)
    stage1, stage2, evaluation = stage1_config(args), stage2_config(args), evaluation_config(args)
    assert stage1.loss.perceptual_weight == 0 and evaluation.guidance_scale == (1.0 if original else 1.5)
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


@pytest.mark.slow
@pytest.mark.parametrize("original", [False, True])
def test_a_recipe(tmp_path, original, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["digits", "--minutes", "0.2", *TINY, *(["--original"] if original else [])]
    main(command)
    folder = Path("runs/benchmarks/recipes") / ("digits-original" if original else "digits")
    result = json.loads((folder / "results.json").read_text())
    assert {path.name for path in folder.iterdir()} == {"results.json", "samples.png", "reconstructions.png"}
    assert result["minutes"].keys() == {"stage1", "tokenize", "stage2", "evaluate"}
    assert result["metrics"]["classification_accuracy_score_real"] > 0.5
    assert result["settings"]["stage1"]["max_steps"] == result["decisions"]["stage1"]["steps"]

    main(command)  # continues without training again
    again = json.loads((folder / "results.json").read_text())
    assert again["metrics"] == result["metrics"] and again["decisions"] == result["decisions"]
