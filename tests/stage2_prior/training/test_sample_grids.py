"""Grids of samples: their images, their files, that they do not change the training, and their requirements."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs import ConfigError, load_config
from pipelines.build import BuildConfig, build
from stage1_vqgan import image_grid, with_row_labels
from stage2_prior import Stage2Config, TokenLayout
from stage2_prior.training.grid_prompts import grid_prompts
from stage2_prior.training.run import train
from stage2_prior.training.sample_grids import load_decoder
from tests.devices import DEVICE


@pytest.fixture(scope="module")
def make_config(tiny_runs, tmp_path_factory, stage2_values) -> Callable[..., Stage2Config]:
    """Makes the configuration of a run of four steps, with an evaluation after every second."""
    changes = {"max_steps": 4, "eval_steps": 2, "save_steps": 2, "seed": 7, "model.attention_dropout": 0.1}

    def make(**more: object) -> Stage2Config:
        values = stage2_values(tmp_path_factory.mktemp("run"), tiny_runs.vqgan, code_store=str(tiny_runs.codes))
        return load_config(Stage2Config, overrides={**values, **changes, **more})

    return make


@pytest.fixture(scope="module")
def with_grids(make_config) -> Stage2Config:
    config = make_config(num_sample_images=20, report_to=["tensorboard"], keep_best=False)
    train(config)
    return config


def grids(config: Stage2Config) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (Path(config.output_dir) / "samples").iterdir()}


def test_a_grid_shows_what_the_pipeline_generates(with_grids, tiny_runs, tmp_path):
    """Ten rows of two images. The last grid shows samples of the weights that are saved as the prior."""
    pipeline = build(
        BuildConfig(tokenizer=str(tiny_runs.vqgan), prior=with_grids.output_dir, output_dir=str(tmp_path / "pipeline"))
    )
    pipeline.to(DEVICE).set_progress_bar_config(disable=True)
    out = pipeline.generate(range(10), num_images_per_label=2, guidance_scale=1.5, seed=7)
    expected = np.asarray(with_row_labels(image_grid(out.images, 2, min_tile=48), [str(digit) for digit in range(10)]))
    path = Path(with_grids.output_dir) / "samples" / "step_00000004.png"
    assert np.array_equal(np.asarray(Image.open(path)), expected)
    assert set(grids(with_grids)) == {"step_00000002.png", "step_00000004.png"}


def test_trackers_get_the_grids(with_grids):
    (folder,) = (Path(with_grids.output_dir) / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    assert [image.step for image in events.Images("samples")] == [2, 4]
    (event,) = events.Tensors("config/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert text.startswith("```yaml\n") and "num_sample_images: 20\n" in text


def test_a_run_is_the_same_with_and_without_grids(with_grids, make_config):
    without = make_config(num_sample_images=0, keep_best=False)
    train(without)
    assert not (Path(without.output_dir) / "samples").exists()
    one, other = (Path(config.output_dir) / "model.safetensors" for config in (with_grids, without))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_a_resumed_run_draws_the_same_grids(with_grids, tmp_path):
    resumed = replace(with_grids, output_dir=str(tmp_path / "resumed"))
    shutil.copytree(with_grids.output_dir, resumed.output_dir)
    (tmp_path / "resumed" / "train_results.json").unlink()
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-4")
    shutil.rmtree(tmp_path / "resumed" / "samples")
    train(resumed)
    assert grids(resumed) == {"step_00000004.png": grids(with_grids)["step_00000004.png"]}


def test_a_finished_run_needs_no_tokenizer(with_grids):
    train(replace(with_grids, tokenizer="gone/away", allow_config_changes=True))


def test_without_its_tokenizer_a_run_does_not_start(make_config, tmp_path):
    config = make_config(num_sample_images=4, tokenizer=str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match=r"tokenizer: received .*gone.* num_sample_images 0"):
        train(config)
    assert not (Path(config.output_dir) / "config.yaml").exists()
    train(replace(config, num_sample_images=0))


def test_another_tokenizer_is_refused(tiny_runs, tmp_path):
    layout = TokenLayout.from_pretrained(tiny_runs.prior)
    with pytest.raises(ConfigError, match=r"tokenizer: received .* codes are of another tokenizer \(0123\)"):
        load_decoder(str(tiny_runs.vqgan), replace(layout, tokenizer_fingerprint="0123"))
    folder = tmp_path / "vqgan"
    shutil.copytree(tiny_runs.vqgan, folder)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer: received .* preprocessor_config\.json: this file is missing"):
        load_decoder(str(folder), layout)


def test_rows_are_classes_spread_evenly(layout):
    assert grid_prompts(layout, 10, 2).squeeze(1).tolist() == [40, 40, 41, 41, 42, 42, 43, 43, 44, 44]
    assert grid_prompts(layout, 7, 2).squeeze(1).tolist() == [40, 40, 41, 41, 42, 42, 43]
    many = replace(layout, class_names=tuple(map(str, range(1000))))
    assert grid_prompts(many, 4, 1).squeeze(1).tolist() == [40, 290, 540, 790]
    unconditional = replace(layout, class_names=())
    assert grid_prompts(unconditional, 3, 3).squeeze(1).tolist() == [40] * 3
