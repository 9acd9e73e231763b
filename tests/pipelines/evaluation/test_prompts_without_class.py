"""Evaluations of priors whose conditions are named: the rows of samples.png, labels that nobody needs, duplicates."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from configs import ConfigError
from pipelines.evaluation.conditions import load_splits
from pipelines.evaluation.config import EvaluationConfig
from pipelines.evaluation.measuring import measure
from pipelines.evaluation.reading import PixelImages
from pipelines.evaluation.real_images import RealImages
from pipelines.evaluation.report import prompt_rows, save_samples
from stage1_vqgan import DataConfig
from tests import conditioned
from tests.prompted import make, make_parts, make_segments, prompts_of


@pytest.fixture(scope="module")
def parts():
    return make_parts()


@pytest.fixture(scope="module")
def pipeline(parts):
    segments = make_segments(parts)
    return make(parts, [segments["style"], segments["caption"]])


@pytest.fixture
def config(tmp_path):
    data = DataConfig(dataset="digits")
    return EvaluationConfig(pipeline="p", data=data, output_dir=str(tmp_path), feature_size=4, num_components=2)


def test_the_picture_has_a_row_for_each_prompt(pipeline, config, tmp_path, monkeypatch):
    asked = {
        "class_labels": ["shaded", "flat", "shaded", "flat"],
        "text": ["a red cat", "two dogs", "a dog", "two dogs"],
    }
    prompts = prompts_of(pipeline, monkeypatch, **asked)
    numbers, names = prompt_rows(pipeline, prompts)
    words = [f"{text} · {style}" for text, style in zip(asked["text"], asked["class_labels"], strict=True)]
    assert [names[number] for number in numbers] == words and len(names) == 3
    save_samples(config, PixelImages(torch.zeros(4, 1, 16, 16)), (numbers, names), pipeline.image_processor.postprocess)
    picture = Image.open(tmp_path / "samples.png")
    assert picture.height == 3 * 50 + 2 and picture.width > 2 * 50 + 2 + 60  # the words stand on the left


def test_labels_that_a_prior_without_a_class_does_not_need(parts, pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    conditioned.write_data(tmp_path / "data")  # with two columns of classes
    where = {"dataset": str(tmp_path / "data"), "validation_split": "validation", "image_column": "image"}
    message = (
        r"data\.use_labels: received true, but this prior has no class; give data\.use_labels false \(data\.label_"
    )
    with pytest.raises(ConfigError, match=message):
        load_splits(DataConfig(**where), pipeline)
    assert load_splits(DataConfig(**where, use_labels=False), pipeline)[0].labels is None
    for other in (None, make(parts, [], ("left", "right"))):
        with pytest.raises(ConfigError, match=r"  - data\.label_column: several columns hold class labels; name one"):
            load_splits(DataConfig(**where), other)


def test_without_held_out_images_of_their_own_there_is_no_ratio(config):
    images = torch.rand(40, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def metrics_of(validation):
        train, held_out = (
            RealImages(PixelImages(one), np.arange(len(one)), None, 0) for one in (images[:30], validation)
        )
        return measure(config, None, train, held_out, {}, PixelImages(images[20:]), {})

    metrics = metrics_of(images[30:])
    assert metrics["nearest_neighbour_ratio"] == pytest.approx(0.5) and metrics["details"]["nearest_neighbour_ratio"]
    metrics = metrics_of(images[5:25])
    assert not {"nearest_neighbour_ratio"} & (metrics.keys() | metrics["details"].keys())
    assert metrics["left_out"]["nearest_neighbour_ratio"].startswith("all validation images equal training images")
