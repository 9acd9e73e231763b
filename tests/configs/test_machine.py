"""What a machine can run: more worker processes, and larger batches of pixels, are refused before the work begins."""

import resource

import pytest

from configs import ConfigError, load_config
from configs.machine import most_workers
from configs.memory import total_memory
from pipelines.evaluation.config import EvaluationConfig
from stage1_vqgan import Stage1Config
from stage1_vqgan.evaluate import ReconstructionConfig
from stage2_prior import Stage2Config

UNLIMITED = resource.RLIM_INFINITY


@pytest.fixture
def machine(monkeypatch):
    def machine(cores=2, memory=2**34, files=1024, processes=UNLIMITED):
        limits = {resource.RLIMIT_NOFILE: files, resource.RLIMIT_NPROC: processes}
        monkeypatch.setattr("os.cpu_count", lambda: cores)
        monkeypatch.setattr("configs.machine.total_memory", lambda: memory)
        monkeypatch.setattr("resource.getrlimit", lambda kind: (limits[kind], UNLIMITED))

    return machine


@pytest.mark.parametrize(
    "limits, most",
    [
        ({}, 102),  # open files
        ({"files": UNLIMITED}, 128),  # cores
        ({"cores": 96, "files": 2**20, "memory": 2**40}, 6144),
        ({"cores": 96, "files": 2**20}, 1638),  # memory
        ({"cores": 96, "files": 2**20, "processes": 50}, 50),
        ({"cores": None, "files": 2**20}, 64),  # the number of cores is not known
    ],
)
def test_each_limit_counts(machine, limits, most):
    machine(**limits)
    assert most_workers() == most


COMMANDS = {
    Stage1Config: {"output_dir": "x", "max_steps": 9, "data.dataset": "digits", "loss.perceptual_weight": 0},
    Stage2Config: {"output_dir": "z", "max_steps": 9, "data.dataset": "digits", "tokenizer": "x", "code_store": "y"},
    ReconstructionConfig: {"model": "x", "data.dataset": "digits"},
    EvaluationConfig: {"pipeline": "x", "output_dir": "x", "data.dataset": "digits"},
}


@pytest.mark.parametrize("kind", COMMANDS)
def test_too_many_workers_are_refused_in_every_command(machine, kind):
    machine()
    values = COMMANDS[kind] | ({"model.model_type": "llama"} if kind is Stage2Config else {})
    assert load_config(kind, None, values | {"dataloader_num_workers": 102}).dataloader_num_workers == 102
    for number in (103, 5000):
        with pytest.raises(
            ConfigError, match=f"dataloader_num_workers: received {number}; this machine .* at most 102"
        ):
            load_config(kind, None, values | {"dataloader_num_workers": number})


def test_pixels_of_a_batch_must_fit(machine, monkeypatch):
    monkeypatch.setattr("stage1_vqgan.training.config.total_memory", lambda: 2**30)
    values = COMMANDS[Stage1Config] | {"model.in_channels": 1, "per_device_train_batch_size": 4}
    assert load_config(Stage1Config, None, values | {"model.image_size": 8192}).model["image_size"] == 8192  # 1 GiB
    for more in ({"model.image_size": 8208}, {"per_device_train_batch_size": 5}, {"dataloader_num_workers": 2}):
        with pytest.raises(
            ConfigError, match=r"model.image_size: .* GB for their pixels, but this machine has 1\.1 GB;"
        ):
            load_config(Stage1Config, None, {**values, "model.image_size": 8192, **more})


def test_the_memory_of_this_machine_is_known():
    assert 2**28 < total_memory() < 2**50
