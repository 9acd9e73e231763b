"""Sharded training (FSDP 2, two CPU processes) equals training on one process; impossible launches are refused."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from configs import ConfigError, sections
from stage2_prior import CodeStore
from stage2_prior.training.run import train
from stage2_prior.training.sharding import check_sharding
from tests import sharded_runs
from tests.devices import cpu_only

pytestmark = cpu_only


@pytest.fixture(scope="module")
def runs(tiny_runs, tmp_path_factory):
    """The same run on one process, sharded over two, and sharded with an interruption."""
    folder = tmp_path_factory.mktemp("sharded")
    for part in (tiny_runs.vqgan, tiny_runs.codes):
        shutil.copytree(part, folder / part.name)
    train(sharded_runs.config(folder, "whole"))
    sharded_runs.run_on_two_processes(folder)
    return folder


def logged(run, name):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def test_sharded_training_is_training(runs):
    for name, steps in (("loss", 6), ("grad_norm", 6), ("eval_loss", 2)):
        whole, sharded = (logged(runs / folder, name) for folder in ("whole", "sharded"))
        assert len(whole) == steps and sharded == pytest.approx(whole, rel=2e-6), name
    for name in ("model.safetensors", "checkpoint-6/model.safetensors", "checkpoint-3/average.safetensors"):
        whole, sharded = (load_file(runs / folder / name) for folder in ("whole", "sharded"))
        torch.testing.assert_close(sharded, whole, rtol=0, atol=2e-6)


def test_a_resumed_sharded_run_equals_a_straight_one(runs):
    for name in ("model.safetensors", "checkpoint-6/model.safetensors", "checkpoint-6/average.safetensors"):
        assert (runs / "sharded" / name).read_bytes() == (runs / "resumed" / name).read_bytes(), name
    assert logged(runs / "sharded", "eval_loss") == logged(runs / "resumed", "eval_loss")


def test_a_sharded_run_draws_the_grids_of_a_whole_one(runs):
    """Sampling from a sharded prior needs all processes."""
    whole, sharded = (sorted((runs / folder / "samples").iterdir()) for folder in ("whole", "sharded"))
    assert [path.name for path in whole] == [path.name for path in sharded] and len(whole) == 2
    assert [path.read_bytes() for path in whole] == [path.read_bytes() for path in sharded]


@torch.no_grad()
def test_one_process_loads_what_was_sharded(runs):
    prior = AutoModelForCausalLM.from_pretrained(runs / "sharded")
    codes, labels = CodeStore(runs / "codes").split("validation").read(np.arange(360))[:2]
    sequences = torch.from_numpy(np.concatenate([32 + labels[:, None], codes], 1))
    loss = torch.nn.functional.cross_entropy(prior(input_ids=sequences[:, :-1]).logits.mT, sequences[:, 1:])
    results = json.loads((runs / "sharded" / "train_results.json").read_text())
    assert results["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)


def launched(fsdp=None, version=2, state_dict_type="StateDictType.FULL_STATE_DICT"):
    plugin = SimpleNamespace(fsdp_version=version, state_dict_type=state_dict_type)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    return SimpleNamespace(is_fsdp_enabled=bool(fsdp), accelerator=accelerator)


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (launched(fsdp=True, version=1), r"fsdp_version: received 1, which flattens the weights"),
        (launched(fsdp=True, state_dict_type="StateDictType.SHARDED_STATE_DICT"), "received SHARDED_STATE_DICT"),
    ],
)
def test_shards_without_an_average_or_a_model_are_refused(trainer, message):
    with pytest.raises(ConfigError, match=message):
        check_sharding(trainer, 0.999)
    check_sharding(launched(fsdp=True), 0.999)


def test_a_launch_that_would_not_shard_is_refused(monkeypatch):
    monkeypatch.setitem(sections.LAUNCHED_WITH, "USE_FSDP", "true")
    with pytest.raises(ConfigError, match="FSDP: accelerate shards on GPUs"):
        check_sharding(launched(), 0)
