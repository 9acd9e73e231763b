"""What the machine decides: `auto` becomes a plain value, which the run keeps; no discriminator is trained in vain."""

import os

import pytest
import torch
from safetensors.torch import load_file

from configs import ConfigError, load_config, save_config
from configs.automatic import decided, has_bfloat16
from configs.index_sampler import IndexSampler
from configs.machine import hardware, usual_workers
from configs.yaml_files import read_yaml
from stage1_vqgan import Stage1Config
from stage1_vqgan.training.run import train


def settings(folder, **changes):
    values = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 180,
        "bf16": "auto",
        "dataloader_num_workers": "auto",
        "model.image_size": 8,
        "model.base_channels": 8,
        "model.channel_multiplier": [1, 2],
        "model.latent_channels": 8,
        "codebook.kmeans_init_batches": 1,
        "loss.adversarial_start_step": 5,
        "discriminator.base_channels": 8,
        "discriminator.num_layers": 1,
        "report_to": [],
    }
    return load_config(Stage1Config, "digits/stage1", values | changes)


@pytest.fixture
def cores(monkeypatch):
    def cores(number):
        monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(number)))

    return cores


@pytest.mark.parametrize(
    "number, processes, workers", [(1, "1", 1), (2, "1", 1), (8, "1", 4), (64, "1", 8), (16, "4", 2), (2, "x", 1)]
)
def test_workers_are_half_of_the_cores(cores, monkeypatch, number, processes, workers):
    cores(number)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert usual_workers() == workers


def test_precision_is_that_of_the_device(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    cpu_can(monkeypatch, avx512_bf16=False)
    for supported in (True, False):
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation, answer=supported: answer)
        assert has_bfloat16(cuda) is supported and not has_bfloat16(cpu)
    monkeypatch.setitem(decided.__globals__["LAUNCHED_WITH"], "MIXED_PRECISION", "bf16")
    assert has_bfloat16(cpu)


@pytest.mark.parametrize(
    "abilities, wanted",
    [
        ({}, False),
        ({"avx512_f": True, "amx_bf16": False}, False),
        ({"amx_bf16": True}, True),
        ({"avx512_bf16": 1}, True),
    ],
)
def test_a_cpu_with_instructions_for_bfloat16_uses_it(abilities, wanted, monkeypatch):
    cpu_can(monkeypatch, **abilities)
    assert has_bfloat16(torch.device("cpu")) is wanted


def cpu_can(monkeypatch, **abilities):
    """Pretends that the CPU has these abilities."""
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: abilities, raising=False)


def test_a_launch_with_a_precision_and_auto_agree(monkeypatch, tmp_path):
    monkeypatch.setitem(decided.__globals__["LAUNCHED_WITH"], "MIXED_PRECISION", "bf16")
    assert decided(settings(tmp_path)).mixed_precision == "bf16"


def test_a_resumed_run_keeps_what_was_decided(tmp_path, monkeypatch, capsys):
    """Also on a machine that would decide otherwise."""
    config = settings(tmp_path)
    cpu_can(monkeypatch)
    start = decided(config)
    assert start.bf16 is False
    save_config(start, tmp_path / "config.yaml")
    monkeypatch.setattr("configs.automatic.has_bfloat16", lambda device: True)
    assert decided(config).bf16 is True  # nothing has been trained in this folder
    (tmp_path / "train_results.json").write_text('{"global_step": 2}')
    assert decided(config).bf16 is False
    printed = [line.partition(" (")[0] for line in capsys.readouterr().out.splitlines()]
    assert printed == ["bf16: false", "bf16: true", "bf16: false"]


def test_a_run_that_ends_before_the_adversarial_start_has_no_discriminator(tmp_path, caplog, cores, monkeypatch):
    """Its weights are those of a run without adversarial loss, and config.yaml states what was decided."""
    cpu_can(monkeypatch)
    cores(2)
    train(settings(tmp_path / "early"))
    assert "(5) is not below max_steps (2): this run has no discriminator" in caplog.text
    assert "--loss.adversarial_start_step 0.25 starts them after a quarter" in caplog.text
    train(settings(tmp_path / "never", **{"loss.adversarial_weight": 0}))
    early, never = (tmp_path / name / "checkpoint-2" for name in ("early", "never"))
    assert sorted(os.listdir(early)) == sorted(os.listdir(never))
    for name in ("model", "average"):
        pair = [load_file(folder / f"{name}.safetensors") for folder in (early, never)]
        assert all(torch.equal(pair[0][key], pair[1][key]) for key in pair[1])
    with pytest.raises(ConfigError, match=r"loss.adversarial_weight: .* step 5\), but .* without a discriminator"):
        train(settings(tmp_path / "early", max_steps=9, allow_config_changes=True))
    written = read_yaml(str(tmp_path / "early" / "config.yaml"))[0]
    assert (written["bf16"], written["dataloader_num_workers"], written["warmup_steps"]) == (False, 1, 1)


def test_too_few_images_name_the_batch_that_fits():
    with pytest.raises(ConfigError, match=r"received 64, but the data has only 38 .*; use at most 38$"):
        IndexSampler(38, 64, 0, 1, 0)
    with pytest.raises(ConfigError, match=r"use at most 19 \(or 38 for global_batch_size\)$"):
        IndexSampler(38, 64, 0, 1, 0, world_size=2)
    with pytest.raises(ConfigError, match="use fewer processes"):
        IndexSampler(3, 64, 0, 1, 0, world_size=4)
    assert len(list(IndexSampler(38, 38, 0, 3, 0))) == 3


def test_a_run_on_the_cpus_of_a_machine_with_a_gpu_names_its_cpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H200")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert hardware(8) == "8 × NVIDIA H200"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.delattr("os.sched_getaffinity", raising=False)  # macOS has none
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    assert hardware(2) == "6 CPU cores, 2 processes"
