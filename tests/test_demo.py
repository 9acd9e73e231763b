"""The digits presets, trained in full, reach the figures that the demo promises."""

import pytest

from configs import load_config
from pipelines.build import BuildConfig, build
from pipelines.evaluate import EvaluationConfig, evaluate
from stage1_vqgan import Stage1Config
from stage1_vqgan.training.run import train as train_tokenizer
from stage2_prior import Stage2Config
from stage2_prior.tokenize import tokenize
from stage2_prior.training.run import train as train_prior


@pytest.mark.slow
def test_demo_reaches_its_figures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stage1 = load_config(Stage1Config, "digits/stage1")
    train_tokenizer(stage1)
    stage2 = load_config(Stage2Config, "digits/stage2")
    tokenize(stage2)
    train_prior(stage2)
    parts = {"tokenizer": stage1.output_dir, "prior": stage2.output_dir, "output_dir": "runs/digits/pipeline"}
    build(BuildConfig(**parts, sampling_defaults={"guidance_scale": 1.5}))
    metrics = evaluate(load_config(EvaluationConfig, "digits/evaluate"))
    assert metrics["class_accuracy"] >= 0.97
    assert metrics["frechet_distance"] <= 0.65
    assert metrics["nearest_neighbour_ratio"] >= 0.9
    assert metrics["codebook_usage"] >= 0.9
    assert stage1.loss.adversarial_start_step <= stage1.max_steps / 2
