"""The evaluation of a whole pipeline, and reading the real images."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import PartialState
from huggingface_hub import ModelCard
from PIL import Image
from sklearn.datasets import load_digits

from configs import ConfigError, load_config
from pipelines.evaluate import EvaluationConfig, evaluate
from pipelines.evaluation.classifiers import new_classifier
from pipelines.evaluation.real_images import read_real_images, store_real_images
from stage1_vqgan import DataConfig, fingerprint_of_images, load_images
from stage2_prior import CodeStore
from tests.image_files import picture, write_parquet
from tests.pipelines.evaluation.sampling_runs import small_shards


@pytest.fixture(scope="module")
def evaluated(tiny_runs, tmp_path_factory) -> tuple[EvaluationConfig, dict]:
    """An evaluation of the tiny pipeline, and its metrics. Tests leave its folders as they are."""
    root = tmp_path_factory.mktemp("evaluated")
    values = {
        "pipeline": str(shutil.copytree(tiny_runs.pipeline, root / "pipeline")),
        "output_dir": str(root / "evaluation"),
        "data": {"dataset": "digits"},
        "samples_per_class": 5,
        "guidance_scale": 1.5,
        "metrics": {"feature_networks": []},
        "grid_columns": 3,
        "tokenizer_run": str(tiny_runs.vqgan),
        "code_store": str(tiny_runs.codes),
        "prior_run": str(tiny_runs.prior),
    }
    config = load_config(EvaluationConfig, overrides=values)
    return config, evaluate(config)


def test_evaluation_of_a_pipeline(evaluated, tiny_runs):
    config, metrics = evaluated
    folder = Path(config.output_dir)
    saved = json.loads((folder / "metrics.json").read_text())
    assert {name: saved[name] for name in metrics} == metrics
    assert metrics["num_samples"] == 50
    assert all(np.isfinite(value) for value in metrics.values() if not isinstance(value, dict))
    others = {"num_samples", "details", "settings", "seconds", "inputs", "left_out"}
    assert metrics["details"].keys() == metrics.keys() - others
    # this tokenizer gives the same image for many digits
    assert "held-out images equal a training image" in metrics["left_out"]["suspected_copies"]
    assert metrics["details"]["classification_accuracy_score"].items() >= {"n": 360, "images": "validation"}.items()
    assert metrics["details"]["class_accuracy"]["reference"] == "1,437 training images"
    assert metrics["settings"]["guidance_scale"] == 1.5

    codes, labels = CodeStore(tiny_runs.codes).split("train").read(np.arange(1437))[:2]
    assert metrics["codebook_usage"] == pytest.approx(len(np.unique(codes)) / 32)
    results = json.loads((tiny_runs.vqgan / "train_results.json").read_text())
    assert metrics["seconds"]["stage1"] == results["train_runtime"]

    # the 8×8 features of digits that were enlarged from 8×8 to 16×16 nearly equal the digits
    digits = load_digits()
    held_out = np.arange(1797) % 5 == 0
    features = digits.data / 8 - 1
    images = torch.from_numpy(features).float().view(-1, 1, 8, 8)
    svc = new_classifier(config, torch.device("cpu")).fit(images[~held_out], labels)
    accuracy = (svc.predict(images[held_out]) == digits.target[held_out]).mean()
    assert metrics["class_accuracy_real"] == pytest.approx(accuracy, abs=0.02) and accuracy > 0.9
    assert metrics["class_accuracy"] < 0.6  # ten steps of training
    assert metrics["classification_accuracy_score"] < 0.6 < metrics["classification_accuracy_score_real"] < accuracy
    assert metrics["frechet_distance"] > 2 * metrics["frechet_distance_real"] > 0

    tile = 48 + 2
    samples, reconstructions = (Image.open(folder / f"{name}.png") for name in ("samples", "reconstructions"))
    assert samples.height == 10 * tile + 2 and samples.width > 3 * tile + 2  # labels stand on the left
    assert reconstructions.height == 2 * (64 + 2) + 2 and reconstructions.width > 16 * (64 + 2) + 2

    pipeline = Path(config.pipeline)
    card = ModelCard.load(pipeline / "README.md")
    shown = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert shown == pytest.approx({name: metrics[name] for name in shown}, abs=1e-6) and len(shown) == 8
    row = f"| `class_accuracy_real` | {metrics['class_accuracy_real']:.4g} | "
    error = metrics["details"]["class_accuracy_real"]["standard_error"]
    assert f"{row}{error:.2g} | 360 validation | 1,437 training images |" in card.text
    assert "50 generated images (guidance_scale 1.5, seed 0, " in card.text
    for name in ("samples.png", "reconstructions.png"):
        assert f"(card/{name})" in card.text
        assert (pipeline / "card" / name).read_bytes() == (folder / name).read_bytes()


def test_an_evaluation_is_not_made_twice(evaluated):
    config, first = evaluated
    folder = Path(config.output_dir)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert evaluate(config) == first
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_other_settings_are_evaluated_anew(evaluated, tmp_path):
    config, first = evaluated
    root = Path(config.output_dir).parent
    kept = shutil.copytree(root, tmp_path / "kept")
    other = evaluate(replace(config, seed=1))
    shutil.rmtree(root)
    shutil.move(kept, root)
    assert other["frechet_distance"] != first["frechet_distance"]
    assert other["codebook_usage"] == first["codebook_usage"]


def assert_stored_are(expected, folder, source, processor, data, count):
    """Shards hold the same images, also if the run that wrote them was interrupted."""
    last = (0, PartialState(), fingerprint_of_images(source, count))
    arguments = (source, processor, replace(data, max_skipped_fraction=0.25), count, *last)
    with small_shards(3):
        for _ in range(2):
            found = store_real_images(folder, *arguments)
            assert torch.equal(found.pixels(), expected.pixels()) and len(found) == len(expected)
            assert found.labels.tolist() == expected.labels.tolist() and found.skipped == expected.skipped
            assert found.numbers.tolist() == expected.numbers.tolist()
            (folder / "00001.npy").unlink()  # it was not written
        shutil.rmtree(folder)
        with pytest.raises(ConfigError, match=r"max_skipped_fraction: received 0, but 1 of the"):
            store_real_images(folder, source, processor, replace(data, max_skipped_fraction=0), 50, *last)


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
            found = read_real_images(source, tiny_pipeline.image_processor, count, max_skipped_fraction=0.25)
            expected = tiny_pipeline.image_processor([picture(10 * n) for n in numbers])["pixel_values"]
            assert torch.equal(found.pixels(), expected) and found.labels.tolist() == [n % 2 for n in numbers]
            assert found.skipped == (1 if streaming or count == 50 else 0)
            assert_stored_are(found, tmp_path / "shards", source, tiny_pipeline.image_processor, data, count)
        with pytest.raises(ConfigError, match=r"max_skipped_fraction: received 0\.05, but 1 of the 10 images"):
            read_real_images(source, tiny_pipeline.image_processor, 50, max_skipped_fraction=0.05)
