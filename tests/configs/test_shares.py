"""Warm-up, starts and intervals as a share of the run, so that every preset works for a run of any length."""

import pytest
from transformers import TrainingArguments

from configs import ConfigError, load_config
from configs.yaml_files import preset_names
from stage1_vqgan import Stage1Config
from stage2_prior import Stage2Config

DATA = {"data.dataset": "path/to/images"}
PUBLISHED = ("imagenet256/original", "imagenet256/llamagen_f16", "imagenet256/ibq_16k")  # with the steps of the source
TRAININGS = [name for name in preset_names() if "stage" in name and not name.startswith(PUBLISHED)]


def load(name, **changes):
    given = DATA if name.startswith(("own/", "emoji/", "medical/")) else {}
    return load_config(Stage1Config if "stage1" in name else Stage2Config, name, {**given, **changes})


# The steps of the warm-up and of the adversarial start with which the presets were measured.
STEPS = {
    "digits/stage1": (30, 99),
    "digits/stage2": (108, None),
    "fashion_mnist/stage1": (500, 3000),
    "fashion_mnist/stage1_vqvae": (500, 0),
    "fashion_mnist/stage2": (500, None),
    "cifar10/stage1": (500, 3000),
    "cifar10/stage2": (1000, None),
    "imagenet256/stage1": (2000, 20_000),
    "imagenet256/stage2": (5000, None),
}


@pytest.mark.parametrize("name", STEPS)
def test_the_presets_have_the_steps_they_were_measured_with(name):
    config = load(name)
    assert (config.warmup_steps, config.loss.adversarial_start_step if "stage1" in name else None) == STEPS[name]


@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.parametrize("max_steps", [1, 20, 600])
def test_every_preset_works_for_a_short_run(name, max_steps):
    config = load(name, max_steps=max_steps)
    assert 0 < config.warmup_steps <= max_steps
    if max_steps > 1 and "stage1" in name and config.loss.adversarial_weight:
        assert config.has_discriminator and 0 < config.loss.adversarial_start_step < max_steps


@pytest.mark.parametrize("value", [0, 1, 0.05, 0.0333, 0.999, 17])
@pytest.mark.parametrize("max_steps", [1, 7, 320, 12_000])
def test_a_share_is_what_it_is_in_transformers(value, max_steps):
    if value > max_steps:
        pytest.skip("the warm-up must end within the run")
    expected = TrainingArguments(warmup_steps=value, report_to=[], use_cpu=True).get_warmup_steps(max_steps)
    assert load("digits/stage1", max_steps=max_steps, warmup_steps=value).warmup_steps == expected


def test_intervals_may_be_shares_too():
    config = load("digits/stage2", max_steps=250, logging_steps=0.01, eval_steps=0.5, save_steps=0.25)
    assert (config.logging_steps, config.eval_steps, config.save_steps) == (3, 125, 63)


@pytest.mark.parametrize(
    "key", ["warmup_steps", "logging_steps", "eval_steps", "save_steps", "loss.adversarial_start_step"]
)
def test_one_with_a_point_is_not_taken_for_a_single_step(key):
    with pytest.raises(ConfigError, match=rf"{key}: received 1\.0, which is one step or the whole run; write 1, or"):
        load("digits/stage1", **{key: 1.0})
    load("digits/stage1", **{key: 1})


def test_a_ratio_replaces_the_steps_of_the_file_and_steps_replace_the_ratio_of_the_file(tmp_path):
    assert load("digits/stage1", warmup_ratio=0.5).warmup_steps == 150
    assert load("digits/stage1", warmup_ratio=0).warmup_steps == 0
    file = tmp_path / "mine.yaml"
    file.write_text(
        "warmup_ratio: 0.5\nmax_steps: 40\noutput_dir: x\ndata: {dataset: digits}\nmodel: {image_size: 32}\n"
    )
    assert load_config(Stage1Config, str(file)).warmup_steps == 20
    assert load_config(Stage1Config, str(file), {"warmup_steps": 5}).warmup_steps == 5
    assert load_config(Stage1Config, str(file), {"warmup_steps": 5, "warmup_ratio": 0.25}).warmup_steps == 10


def test_a_batch_of_the_command_line_replaces_the_global_batch_of_the_file():
    assert load("own/64/stage1").device_batch_size(1) == 64
    assert load("own/64/stage1", per_device_train_batch_size=8).device_batch_size(1) == 8
    both = load("own/64/stage1", per_device_train_batch_size=8, global_batch_size=32)
    assert both.device_batch_size(2) == 16
