"""A run saves its best evaluated weights and stops early without improvement, also after an interruption."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import Trainer

from configs import load_config
from configs.checkpoints import complete_checkpoints
from configs.interruption import Diverged
from stage2_prior import Stage2Config
from stage2_prior.training.run import train
from stage2_prior.training.selection import is_exhausted
from tests.slow import few


@pytest.mark.parametrize(
    ("losses", "patience", "exhausted"),
    [
        ([], 1, False),
        ([3.0], 1, False),
        ([3.0, 2.0, 2.5], 1, True),
        ([3.0, 2.0, 2.5], 2, False),
        ([3.0, 2.0, 2.0, 2.0], 2, True),  # an equal loss is not lower
        ([3.0, 2.0, 2.5, 1.9], 1, False),
        ([3.0, 4.0, 5.0, 6.0], 0, False),
    ],
)
def test_patience(losses, patience, exhausted):
    history = [{"step": 1, "loss": 9.0}, *({"step": step, "eval_loss": loss} for step, loss in enumerate(losses))]
    assert is_exhausted(history, patience) is exhausted


@pytest.fixture(scope="module")
def make_config(tiny_runs, stage2_values, tmp_path_factory):
    """Settings of a run with a much too high learning rate, so that its loss goes up and down."""
    root = tmp_path_factory.mktemp("selection")

    def make(name, **changes):
        values = stage2_values(root, tiny_runs.vqgan, code_store=str(tiny_runs.codes), output_dir=str(root / name))
        values |= {
            "max_steps": 12,
            "save_steps": 5,
            "eval_steps": 1,
            "learning_rate": 0.5,
            "save_total_limit": 5,
            "warmup_steps": 2,
            "ema_decay": 0.2,
        }
        return load_config(Stage2Config, overrides={**values, **changes})

    return make


@pytest.fixture(scope="module")
def straight(make_config):
    """The folder of a run without interruption, and its evaluations."""
    config = make_config("straight")
    train(config)
    return Path(config.output_dir), evaluations(config)


def evaluations(config):
    lines = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}


def results(config):
    found = json.loads((Path(config.output_dir) / "train_results.json").read_text())
    del found["train_runtime"]
    return found


def weights(config):
    return (Path(config.output_dir) / "model.safetensors").read_bytes()


def test_the_best_weights_are_those_of_a_run_that_ends_there(straight, make_config):
    folder, losses = straight
    best = min(losses, key=losses.get)
    assert 1 < best < 12 and sorted(losses) == list(range(1, 13))
    whole, short = make_config("straight"), make_config("short", max_steps=best, keep_best=False)
    train(short)
    assert weights(whole) == weights(short)
    assert results(whole) == {**results(short), "global_step": 12}
    assert results(whole)["model_step"] == best and results(whole)["eval_loss"] == losses[best]
    assert not (folder / "best").exists() and not list(Path(short.output_dir).rglob("best"))


@pytest.mark.parametrize("step", few([5, 12], 5))
def test_an_interrupted_run_selects_the_same(straight, make_config, step):
    """This holds even if the killed run had found better weights after its last checkpoint."""
    config = interrupted(make_config("straight"), make_config(f"from-{step}"), step)
    train(config)
    assert weights(config) == weights(make_config("straight"))
    assert results(config) == results(make_config("straight")) and evaluations(config) == straight[1]


def interrupted(whole, config, step):
    """The files of a run that was killed just before its end, with its newest checkpoint at a step."""
    folder = Path(config.output_dir)
    shutil.copytree(whole.output_dir, folder)
    for checkpoint in complete_checkpoints(folder):
        if checkpoint.step > step:
            shutil.rmtree(checkpoint.path)
    assert complete_checkpoints(folder)[-1].step == step
    shutil.copytree(folder / f"checkpoint-{step}" / "best", folder / "best")
    (folder / "best" / "evaluation.json").write_text('{"step": 99, "eval_loss": 0}')
    for name in ("train_results.json", "model.safetensors"):
        (folder / name).unlink()
    return config


def test_a_run_that_gets_no_better_ends(straight, make_config, capsys):
    _, losses = straight
    expected = next(step for step in losses if step - min(range(1, step + 1), key=losses.get) >= 2)
    assert 2 < expected < 12
    config = make_config("stopped", early_stopping_patience=2)
    train(config)
    assert evaluations(config) == {step: losses[step] for step in range(1, expected + 1)}
    found = results(config)
    assert (found["global_step"], found["early_stopping_patience"]) == (expected, 2)
    assert f"stopped at step {expected}: no lower loss in the last 2 evaluations" in capsys.readouterr().out

    before = {path: path.stat().st_mtime_ns for path in Path(config.output_dir).rglob("*")}
    train(config)
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in Path(config.output_dir).rglob("*")} == before

    for step in (checkpoint.step for checkpoint in complete_checkpoints(config.output_dir)):
        other = make_config(f"stopped-{step}", early_stopping_patience=2)
        train(interrupted(config, other, step))  # the run had already stopped early, and takes no further step
        assert weights(other) == weights(config) and results(other) == found
        assert evaluations(other) == evaluations(config)

    patient = make_config("stopped", early_stopping_patience=0, allow_config_changes=True)
    train(patient)
    assert weights(patient) == weights(make_config("straight")) and results(patient) == results(make_config("straight"))


def test_a_validation_loss_that_is_not_finite_is_not_the_lowest(make_config, monkeypatch):
    """In half precision, finite weights can have a loss that is not finite."""
    monkeypatch.setattr(Trainer, "prediction_step", lambda *args, **kwargs: (torch.tensor(math.nan), None, None))
    with pytest.raises(Diverged, match=r"the validation loss is not finite \(now at step 1\)"):
        train(make_config("overflow"))
