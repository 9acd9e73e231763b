"""A run's folder: same settings go on, other settings are refused, finished means finished."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from configs import ConfigError, Section, load_config
from configs.run_folder import CONFIG_NAME, FREE_KEYS, finish_run, open_run


@dataclass(kw_only=True)
class Part(Section):
    rotate: float = 1.0
    save_steps: int = 1


@dataclass(kw_only=True)
class Run(Section):
    output_dir: str
    learning_rate: float = 1e-5
    save_steps: int = 10
    report_to: list[str] = field(default_factory=list)
    part: Part = field(default_factory=Part)
    model: dict[str, Any] = field(default_factory=dict)


@pytest.fixture
def config(tmp_path):
    return Run(output_dir=str(tmp_path / "a" / "run"), model={"widths": [1, 2], "cost": 0.25})


def start(config):
    """A run that was interrupted after a checkpoint."""
    open_run(config)
    (Path(config.output_dir) / "checkpoint-10").mkdir()


def test_new_folder_gets_the_resolved_configuration(config):
    assert open_run(config) is None
    assert load_config(Run, f"{config.output_dir}/{CONFIG_NAME}") == config


def test_other_processes_than_the_main_one_write_nothing(config, tmp_path):
    assert open_run(config, is_main_process=False) is None
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_work_starts_anew(config):
    open_run(config)
    changed = replace(config, learning_rate=0.1)
    assert open_run(changed) is None
    assert load_config(Run, f"{config.output_dir}/{CONFIG_NAME}") == changed


def test_going_on_and_finishing(config):
    open_run(config)
    assert open_run(config) is None
    results = {"global_step": 3, "psnr": 20.5}
    finish_run(config, results)
    assert open_run(config) == results == open_run(config, is_main_process=False)


def test_what_has_no_influence_may_change(config):
    start(config)
    assert {"save_steps", "report_to"} <= FREE_KEYS
    assert open_run(replace(config, save_steps=99, report_to=["tensorboard"])) is None


@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_are_refused_with_each_key(config, finished):
    start(config)
    if finished:
        (Path(config.output_dir) / "checkpoint-10").rmdir()
        finish_run(config, {"global_step": 10})
    changed = replace(
        config, learning_rate=0.1, part=Part(rotate=2.0, save_steps=9), model={"widths": [1, 3], "new": 1}
    )
    with pytest.raises(ConfigError) as caught:
        open_run(changed)
    found = {problem.key: problem.message for problem in caught.value.problems}
    # a nested key may be called like a free one and still matter
    keys = {"learning_rate", "part.rotate", "part.save_steps", "model.widths", "model.cost", "model.new"}
    assert set(found) == {*keys, "output_dir"}
    assert found["learning_rate"] == "the run was started with 1e-05, now it is 0.1"
    assert config.output_dir in found["output_dir"]
    assert load_config(Run, f"{config.output_dir}/{CONFIG_NAME}") == config  # and nothing was overwritten


def test_a_tuple_is_the_list_it_becomes_in_yaml(config):
    tupled = replace(config, model={"widths": (1, 2), "cost": 0.25})
    start(tupled)
    assert open_run(tupled) is None
    assert open_run(config) is None
