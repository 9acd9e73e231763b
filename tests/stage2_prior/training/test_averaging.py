"""The moving average of the weights: its values, its use in evaluation, and that it does not change the training."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from configs import ConfigError, load_config
from stage2_prior import Stage2Config
from stage2_prior.training.averaging import FILE_NAME
from stage2_prior.training.run import RunCallback, train
from tests.resealing import reseal
from tests.slow import few


@pytest.fixture(scope="module")
def make_config(tiny_runs, stage2_values, tmp_path_factory):
    root = tmp_path_factory.mktemp("averaging")

    def make(name, **changes):
        values = stage2_values(root, tiny_runs.vqgan, code_store=str(tiny_runs.codes), output_dir=str(root / name))
        values |= {"max_steps": 6, "save_steps": 2, "eval_steps": 3, "save_total_limit": 5, "ema_decay": 0.3}
        return load_config(Stage2Config, overrides={**values, "gradient_accumulation_steps": 2, **changes})

    return make


@pytest.fixture(scope="module")
def straight(make_config):
    """A run with averaging, and its weights after every step."""
    snapshots = []

    def snapshot(callback, args, state, control, model=None, **kwargs):
        snapshots.append({name: weight.detach().double().cpu().clone() for name, weight in model.named_parameters()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunCallback, "on_train_begin", snapshot)
        patch.setattr(RunCallback, "on_step_end", snapshot)
        config = make_config("straight")
        train(config)
    return Path(config.output_dir), snapshots


def test_the_average_is_the_recursion_over_optimizer_steps(straight):
    run, snapshots = straight
    assert len(snapshots) == 7  # at the beginning, and after each step of two batches
    average = dict(snapshots[0])
    for step, weights in enumerate(snapshots[1:]):
        decay = min(0.3, (1 + step) / (10 + step))
        average = {name: decay * average[name] + (1 - decay) * weights[name] for name in weights}
    saved = load_file(run / "checkpoint-6" / FILE_NAME)
    assert saved.keys() == average.keys()
    for name, value in average.items():
        torch.testing.assert_close(saved[name].double(), value, rtol=1e-5, atol=1e-7)
        assert not torch.allclose(saved[name].double(), snapshots[-1][name], rtol=1e-5, atol=1e-7)


def test_the_average_is_what_is_shipped_and_evaluated(straight, make_config):
    run, _ = straight
    shipped, averaged = load_file(run / "model.safetensors"), load_file(run / "checkpoint-6" / FILE_NAME)
    assert shipped.keys() == averaged.keys()
    assert all(torch.equal(shipped[name], averaged[name]) for name in shipped)
    results = json.loads((run / "train_results.json").read_text())
    config = make_config("again", model_name_or_path=str(run), model={}, max_steps=1, learning_rate=1e-30, ema_decay=0)
    train(config)
    again = json.loads((run.parent / "again" / "train_results.json").read_text())
    assert again["eval_loss"] == pytest.approx(results["eval_loss"], rel=1e-6)


def test_training_does_not_notice_the_average(straight, make_config):
    run, _ = straight
    plain = make_config("plain", ema_decay=0)
    train(plain)
    for step in (2, 4, 6):
        weights = [(run.parent / name / f"checkpoint-{step}" / "model.safetensors").read_bytes() for name in
                   ("straight", "plain")]  # fmt: skip
        assert weights[0] == weights[1]
    assert not (run.parent / "plain" / "checkpoint-6" / FILE_NAME).exists()
    last = AutoModelForCausalLM.from_pretrained(run.parent / "plain" / "checkpoint-6")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(plain.output_dir).lm_head.weight, last.lm_head.weight)


def test_a_resumed_run_has_the_same_average(straight, make_config):
    run, _ = straight
    config = make_config("resumed")
    shutil.copytree(run, config.output_dir)
    resumed = run.parent / "resumed"
    for step in (4, 6):
        shutil.rmtree(resumed / f"checkpoint-{step}")
    for name in ("model.safetensors", "train_results.json"):
        (resumed / name).unlink()
    train(config)
    for name in ("checkpoint-6/model.safetensors", f"checkpoint-6/{FILE_NAME}", "model.safetensors"):
        assert (run / name).read_bytes() == (resumed / name).read_bytes(), name


@pytest.fixture
def no_collection(monkeypatch):
    """Without the garbage collection at the start of every run, which takes a second."""
    monkeypatch.setattr(Accelerator, "free_memory", lambda accelerator, *objects: list(objects))


CHANGES = {
    "missing": lambda tensors, name: tensors.pop(name),
    "of another shape": lambda tensors, name: tensors.update({name: torch.ones(3)}),
    "not finite": lambda tensors, name: tensors.update({name: torch.full_like(tensors[name], torch.inf)}),
}


@pytest.mark.parametrize("name", few(["average", "optimizer", "model"], "average"))
def test_missing_and_damaged_states_are_refused(straight, make_config, name, tmp_path, no_collection):
    run, _ = straight
    config = make_config("damaged", output_dir=str(tmp_path), resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    shutil.copytree(run / "checkpoint-4", tmp_path / "checkpoint-4")
    shutil.copy(run / "config.yaml", tmp_path)
    file = tmp_path / "checkpoint-4" / f"{name}.safetensors"
    for change in CHANGES.values():
        tensors = load_file(run / "checkpoint-4" / file.name)
        entry = sorted(tensors)[1]
        change(tensors, entry)
        save_file(tensors, file)
        reseal(file.parent)
        with pytest.raises(ConfigError, match=re.escape(f"{file}: {entry}: ")):
            train(config)
    file.unlink()
    reseal(file.parent)
    with pytest.raises(ConfigError, match=re.escape(f"{file}: this file is missing")):
        train(config)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("trainer_state.json", None),
        ("trainer_state.json", "{"),
        ("trainer_state.json", '{"global_step": 3, "stateful_callbacks": {}}'),
        ("trainer_state.json", '{"global_step": 4, "stateful_callbacks": {}, "log_history": [{"step": "a"}]}'),
        ("trainer_state.json", '{"global_step": 4, "other": 1}'),
        ("optimizer.json", None),
        ("optimizer.json", "[]"),
        ("best/evaluation.json", None),
        ("best/evaluation.json", '{"step": 3}'),
    ],
)
def test_malformed_json_names_its_file(straight, make_config, name, content, tmp_path, no_collection):
    run, _ = straight
    config = make_config("damaged", output_dir=str(tmp_path), resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    shutil.copytree(run / "checkpoint-4", tmp_path / "checkpoint-4")
    shutil.copy(run / "config.yaml", tmp_path)
    (tmp_path / "checkpoint-4" / name).unlink()
    if content is not None:
        (tmp_path / "checkpoint-4" / name).write_text(content)
    reseal(tmp_path / "checkpoint-4")
    with pytest.raises(ConfigError, match=rf"resume_from_checkpoint: {re.escape(str(tmp_path))}.*{name}: "):
        train(config)


@pytest.mark.slow
def test_averaging_may_begin_with_a_run_under_way(make_config, caplog):
    """The average starts with the weights of that step, as it does in a new run."""
    train(make_config("late", ema_decay=0, max_steps=2))
    config = make_config("late", max_steps=4, save_steps=1, allow_config_changes=True)
    train(config)
    assert "checkpoint-2/average.safetensors does not exist: the run begins a new one" in caplog.text
    weights = [load_file(f"{config.output_dir}/checkpoint-{step}/model.safetensors") for step in (2, 3, 4)]
    average = weights[0]
    for decay, new in zip((3 / 12, 0.3), weights[1:], strict=True):
        average = {name: decay * average[name] + (1 - decay) * new[name] for name in new}
    saved = load_file(f"{config.output_dir}/checkpoint-4/{FILE_NAME}")
    torch.testing.assert_close(saved, average)


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_decays_that_average_nothing_are_refused(make_config, decay):
    with pytest.raises(ConfigError, match=rf"ema_decay: received {decay}"):
        make_config("refused", ema_decay=decay)
