"""The metrics of generation against plain formulas, and the evaluation of a whole pipeline."""

import json
from dataclasses import replace

import datasets
import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from sklearn.datasets import load_digits

from configs import ConfigError, load_config
from pipelines.evaluate import (
    EvaluationConfig,
    area_features,
    class_accuracy,
    evaluate,
    frechet_distances,
    nearest_distance,
    real_images,
)
from stage1_vqgan import DataConfig, load_images
from stage2_prior import CodeStore
from tests.image_files import picture, write_parquet


def gaussian(seed: int, rows: int = 300, width: int = 6) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, width)) @ rng.normal(size=(width, width)) + rng.normal(size=width)


@pytest.mark.parametrize("num_components", [1, 2, 6])
def test_frechet_distance(num_components):
    fitted_on, reference, *candidates = (gaussian(seed) for seed in range(4))
    directions = np.linalg.svd(fitted_on - fitted_on.mean(0), full_matrices=False)[2][:num_components]
    expected = []
    for candidate in candidates:
        (mean_1, cov_1), (mean_2, cov_2) = (
            (x.mean(0), np.cov(x, rowvar=False).reshape(num_components, num_components))
            for x in (reference @ directions.T, candidate @ directions.T)
        )
        root = scipy.linalg.sqrtm(cov_1 @ cov_2).real
        expected.append(((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1 + cov_2 - 2 * root))
    assert frechet_distances(fitted_on, reference, candidates, num_components) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_a_set_to_itself_and_of_a_shift():
    features = gaussian(0)
    shift = np.array([3.0, 0, 0, 4, 0, 0])
    same, shifted = frechet_distances(features, features, [features[::-1], features + shift], 6)
    assert same == pytest.approx(0, abs=1e-6) and shifted == pytest.approx(25)


def test_nearest_distance():
    features, reference = gaussian(0, 40), gaussian(1, 50)
    naive = np.mean([min(np.linalg.norm(row - other) for other in reference) for row in features])
    assert nearest_distance(features, reference) == pytest.approx(naive)
    assert nearest_distance(reference[10:30], reference) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("side", "size"), [(16, 8), (16, 16), (28, 8), (32, 5)])
def test_area_features(side, size):
    pixels = torch.randn(3, 2, side, side, generator=torch.Generator().manual_seed(0))
    blocks = [(n * side // size, -(-(n + 1) * side // size)) for n in range(size)]
    naive = [
        [float(channel[top:bottom, left:right].double().mean()) for channel in image for top, bottom in blocks
         for left, right in blocks]
        for image in pixels
    ]  # fmt: skip
    np.testing.assert_allclose(area_features(pixels, size), naive, atol=1e-6)


@pytest.fixture
def config(tiny_runs, tmp_path) -> EvaluationConfig:
    values = {
        "pipeline": str(tiny_runs.pipeline),
        "output_dir": str(tmp_path / "evaluation"),
        "data": {"dataset": "digits"},
        "samples_per_class": 5,
        "grid_columns": 3,
        "tokenizer_run": str(tiny_runs.vqgan),
        "code_store": str(tiny_runs.codes),
        "prior_run": str(tiny_runs.prior),
    }
    return load_config(EvaluationConfig, overrides=values)


def test_class_accuracy(config):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 6)) * 50
    labels = rng.integers(4, size=200)
    real, generated = centres[labels] + rng.normal(size=(200, 6)), centres + rng.normal(size=(4, 6))
    assert class_accuracy(real, labels, generated, np.arange(4), config) == 1.0
    assert class_accuracy(real, labels, generated, np.array([0, 1, 3, 2]), config) == 0.5


def test_evaluation_of_a_pipeline(config, tiny_runs, tmp_path):
    metrics = evaluate(config)
    folder = tmp_path / "evaluation"
    saved = json.loads((folder / "metrics.json").read_text())
    assert {name: saved[name] for name in metrics} == metrics
    assert metrics["num_samples"] == 50
    assert all(np.isfinite(value) for name, value in metrics.items() if name not in ("seconds", "inputs"))

    codes, labels = CodeStore(tiny_runs.codes).split("train").read(np.arange(1437))
    assert metrics["codebook_usage"] == pytest.approx(len(np.unique(codes)) / 32)
    results = json.loads((tiny_runs.vqgan / "train_results.json").read_text())
    assert metrics["seconds"]["stage1"] == results["train_runtime"]

    # 8×8 features of 8×8 digits that were enlarged to 16×16 are about the digits themselves
    digits = load_digits()
    held_out = np.arange(1797) % 5 == 0
    features = digits.data / 8 - 1
    accuracy = class_accuracy(features[~held_out], labels, features[held_out], digits.target[held_out], config)
    assert metrics["class_accuracy_real"] == pytest.approx(accuracy, abs=0.02) and accuracy > 0.9
    assert metrics["class_accuracy"] < 0.6  # ten steps of training
    assert metrics["frechet_distance"] > 2 * metrics["frechet_distance_real"] > 0

    tile = 48 + 2
    assert Image.open(folder / "samples.png").size == (3 * tile + 2, 10 * tile + 2)
    assert Image.open(folder / "reconstructions.png").size == (16 * tile + 2, 2 * tile + 2)


def test_an_evaluation_is_not_made_twice(config, tmp_path):
    folder = tmp_path / "evaluation"
    first = evaluate(config)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert evaluate(config) == first
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_other_settings_are_evaluated_anew(config):
    first, other = evaluate(config), evaluate(replace(config, seed=1))
    assert other["frechet_distance"] != first["frechet_distance"]
    assert other["codebook_usage"] == first["codebook_usage"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.usefixtures("datasets_cache")
def test_real_images_are_those_that_can_be_decoded(tiny_pipeline, tmp_path, streaming):
    pictures = [datasets.Image().encode_example(picture(10 * n)) for n in range(10)]
    pictures[2]["bytes"] = b"no image"
    for split in ("train", "val"):
        rows = {"picture": pictures, "y": [n % 2 for n in range(10)]}
        write_parquet(tmp_path / f"{split}.parquet", rows, y=datasets.ClassLabel(names=["a", "b"]))
    data = DataConfig(dataset=str(tmp_path), validation_split="val", streaming=streaming)
    for source in load_images(data):
        for count, numbers in [(50, [0, 1, *range(3, 10)]), (4, [0, 1, 3] if streaming else [0, 3, 6, 9])]:
            found = real_images(tiny_pipeline, source, count, max_skipped_fraction=0.25)
            expected = tiny_pipeline.image_processor([picture(10 * n) for n in numbers])["pixel_values"]
            assert torch.equal(found.pixels, expected) and found.labels.tolist() == [n % 2 for n in numbers]
            assert found.skipped == (1 if streaming or count == 50 else 0)
        with pytest.raises(ConfigError, match=r"max_skipped_fraction: received 0\.05, but 1 of the 10 images"):
            real_images(tiny_pipeline, source, 50, max_skipped_fraction=0.05)
