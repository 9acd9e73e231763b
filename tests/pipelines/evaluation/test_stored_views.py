"""Views of training images from a code store, and copies of them."""

from contextlib import nullcontext
from dataclasses import replace
from shutil import copytree
from types import SimpleNamespace

import pytest
import torch

from configs import ConfigError, load_config, to_dict
from pipelines import VQGANPipeline
from pipelines.evaluation.config import EvaluationConfig
from pipelines.evaluation.copying import copying_check
from pipelines.evaluation.prompts import _require_held_out, open_store
from pipelines.evaluation.reconstructions import Reconstructions
from pipelines.evaluation.run import evaluate, read_splits
from pipelines.evaluation.stored_views import stored_views, view_rows
from pipelines.tuning.config import TuneConfig
from pipelines.tuning.judge import Judge
from stage1_vqgan import DataConfig
from stage1_vqgan.networks import load_network
from tests.image_sets import TensorImages
from tests.resealing import edit_manifest


def config_of(pipeline, codes, output_dir="x", **values) -> EvaluationConfig:
    values = {"pipeline": str(pipeline), "code_store": str(codes), "output_dir": str(output_dir), **values}
    values |= {"data.dataset": "digits", "metrics.feature_networks": [], "samples_per_class": 3}
    return load_config(EvaluationConfig, overrides=values)


@pytest.fixture(scope="module")
def pipe(tiny_runs):
    return VQGANPipeline.from_pretrained(str(tiny_runs.pipeline))


def test_the_views_of_a_store_are_those_of_the_images(tiny_runs, pipe):
    config = config_of(tiny_runs.pipeline, tiny_runs.codes)
    store, train = open_store(config, pipe.layout), read_splits(config, pipe)[0]
    views = stored_views(store, pipe.vqgan, 5000)
    assert len(views) == store.manifest["origin"]["num_views"] == 2 and len(views[0]) == len(train) == 1437
    known = Reconstructions(train, pipe.vqgan)
    for rows in (range(5), range(1430, 1437)):
        torch.testing.assert_close(views[0].read(rows), known.read(rows), rtol=0, atol=1 / 255 + 1e-4)
    assert not torch.equal(views[1].read(range(50)), views[0].read(range(50)))
    few = stored_views(store, pipe.vqgan, 100)
    assert [len(view) for view in few] == [100, 100]
    assert torch.equal(few[1].read(range(99, 100)), views[1].read(range(int(few[1].rows[99]) - 1437, 1437))[:1])


def test_rows_of_views_in_several_shards():
    split = SimpleNamespace(starts=[0, 6], ends=[6, 10])  # three images in two views, then two
    assert view_rows(split, 2).tolist() == [[0, 1, 2, 6, 7], [3, 4, 5, 8, 9]]


def test_copies_of_views_are_found():
    """A generator that repeats a view of each image, all of them far from the images."""
    rng = torch.Generator().manual_seed(0)
    images, held_out, others = (torch.rand(200, 1, 8, 8, generator=rng) * 2 - 1 for _ in range(3))
    views = [TensorImages(images), TensorImages(images.flip(2)), TensorImages(images.roll(4, 3))]
    generated, network = TensorImages(images.roll(4, 3)[:50]), load_network("pixels@8")
    shares = [
        copying_check(made, known, TensorImages(held_out), network).figures["suspected_copies"]
        for made, known in ((generated, views[:1]), (generated, views), (TensorImages(others), views))
    ]
    assert shares[0] < 0.2 and shares[1] == 1 and shares[2] < 0.2


def test_the_store_of_another_prior_is_refused_before_the_sampling(tiny_runs, pipe, tmp_path):
    config = config_of(tiny_runs.pipeline, tiny_runs.codes)
    other = replace(pipe.layout, tokenizer_fingerprint="0" * 16)
    with pytest.raises(ConfigError, match=r"code_store: received .*; give the store that it was trained on"):
        open_store(config, other)
    with pytest.raises(ConfigError, match=str(tmp_path / "no_store")):
        evaluate(config_of(tiny_runs.pipeline, tmp_path / "no_store", tmp_path / "evaluation"))
    assert not (tmp_path / "evaluation" / "samples").exists()


@pytest.mark.parametrize(
    ("trained", "given", "message"),
    [
        ({}, {}, None),
        ({}, {"validation_fraction": 0.2}, r"validation_fraction: received 0.2, .*; give 0.05, as in its code store"),
        ({}, {"validation_split": "test"}, None),
        ({}, {"validation_split": "train"}, r"validation_split: received 'train', .*; give null, as in its code store"),
        ({"validation_split": "test"}, {"validation_split": "test"}, None),
        ({"validation_split": "test"}, {}, r"validation_split: received null, .*; give 'test', as in its code store"),
        ({"train_split": "part"}, {}, None),
        ({"dataset": "others"}, {"validation_fraction": 0.2}, None),
    ],
    ids=str,
)
def test_training_images_are_not_measured_as_held_out_ones(tiny_runs, pipe, tmp_path, trained, given, message):
    store, settings = copytree(tiny_runs.codes, tmp_path / "codes"), {"dataset": "images"} | trained
    edit_manifest(store, lambda manifest: manifest["origin"]["data"].update(settings))
    config = replace(config_of(tiny_runs.pipeline, store), data=DataConfig(**{"dataset": "images"} | given))
    with nullcontext() if message is None else pytest.raises(ConfigError, match=rf"data\.{message}"):
        open_store(config, pipe.layout)


@pytest.mark.parametrize("needs_store", [False, True])
def test_no_store_is_only_advised_where_none_is_needed(needs_store):
    trained = to_dict(DataConfig(dataset="images"))
    with pytest.raises(ConfigError, match="as in its code store") as refused:
        _require_held_out(DataConfig(dataset="images", validation_fraction=0.2), trained, needs_store)
    assert ("code_store null" in str(refused.value)) != needs_store


def test_a_search_for_settings_refuses_them_too(tiny_runs, pipe):
    data = {"dataset": "digits", "validation_fraction": 0.2}
    values = {"pipeline": str(tiny_runs.pipeline), "code_store": str(tiny_runs.codes), "data": data}
    with pytest.raises(ConfigError, match=r"data\.validation_fraction: received 0.2, .*; give 0.05"):
        Judge(load_config(TuneConfig, overrides=values), pipe)
