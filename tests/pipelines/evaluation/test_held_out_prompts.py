"""A prior with several conditions is evaluated with the conditions of the validation images of its code store."""

import dataclasses

import numpy as np
import pytest
import torch

from configs import ConfigError
from pipelines import VQGANPipeline
from pipelines.evaluation.config import EvaluationConfig
from pipelines.evaluation.prompts import chosen_rows
from pipelines.evaluation.run import generate_samples
from stage1_vqgan import DataConfig, VQGANConfig, VQGANImageProcessor, VQGANModel
from stage2_prior import Segment, TokenLayout
from stage2_prior.code_store import shard_path
from stage2_prior.manifest import write_manifest
from stage2_prior.prior import build_prior
from stage2_prior.shards import read_notes, write_shard
from tests import tiny
from tests.code_stores import ORIGIN

STYLE = Segment("style", "class", 4, class_names=("flat", "drawn", "shaded", "dark"))
LABELS, STYLES = np.array([1, 0, 1, 1, 0, 1]), np.array([0, 1, 2, 3, 0, 1])


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    vqgan = VQGANModel(VQGANConfig(**tiny.VQGAN))
    vqgan.config.fingerprint = vqgan.compute_fingerprint()
    layout = TokenLayout(32, ("ant", "bee"), (4, 4), 4, vqgan.config.fingerprint, segments=(STYLE,))
    made = VQGANPipeline(vqgan, build_prior(tiny.RANDOM_PRIORS["llama"], layout), VQGANImageProcessor(16, 1), layout)
    made.set_progress_bar_config(disable=True)
    return made


def write_store(folder, layout):
    folder.mkdir(exist_ok=True)
    notes = {}
    for split in ("train", "validation"):
        codes = np.zeros((6, 16), np.uint16)
        write_shard(shard_path(folder, split, 0), codes, LABELS, 6, conditions=STYLES[:, None])
        notes[split] = [read_notes(shard_path(folder, split, 0))]
    write_manifest(folder, layout, notes, ORIGIN | {"tokenizer_fingerprint": layout.tokenizer_fingerprint}, 1.0)


def config_of(folder, **values):
    store = {"code_store": str(folder), "samples_per_class": 2, "guidance_scale": 2.0, **values}
    return EvaluationConfig(pipeline="p", data=DataConfig(dataset="digits"), output_dir=str(folder), **store)


def test_images_are_asked_for_with_the_conditions_of_validation_images(pipeline, tmp_path):
    write_store(tmp_path, pipeline.layout)
    pixels, labels = generate_samples(config_of(tmp_path), pipeline)
    assert labels.tolist() == [0, 0, 1, 1]
    seeds = torch.randint(2**63 - 1, (4,), generator=torch.Generator().manual_seed(0)).tolist()
    asked = {"class_labels": {"class": ["ant", "ant", "bee", "bee"], "style": ["drawn", "flat", "flat", "dark"]}}
    expected = pipeline.generate(**asked, guidance_scale=2.0, seed=seeds, output_type="pt").images
    assert torch.equal(pixels, expected * 2 - 1)


def test_what_cannot_be_evaluated_is_refused(pipeline, tmp_path):
    write_store(tmp_path, pipeline.layout)
    with pytest.raises(ConfigError, match=r"code_store: this prior has further conditions \(style\); give the code"):
        generate_samples(config_of(tmp_path, code_store=None), pipeline)
    other = dataclasses.replace(pipeline.layout, segments=(dataclasses.replace(STYLE, name="kind"),))
    write_store(tmp_path / "other", other)
    with pytest.raises(ConfigError, match=r"code_store: received .*; give the store that it was trained on"):
        generate_samples(config_of(tmp_path, code_store=str(tmp_path / "other")), pipeline)


def test_rows_are_spread_over_each_class():
    assert chosen_rows(None, 6, 0, 3).tolist() == [0, 2, 4]
    assert chosen_rows(LABELS, 6, 2, 5).tolist() == [1, 1, 1, 4, 4, 0, 0, 2, 3, 5]
    with pytest.raises(ConfigError, match="no image of class 2"):
        chosen_rows(LABELS, 6, 3, 1)
