"""The command line: a real launch from someone's own folder, and mistakes that end in a message."""

import subprocess
import sys
from pathlib import Path

import pytest

from configs import run
from stage1_vqgan import Stage1Config, VQGANModel
from stage1_vqgan.training.run import train as train_tokenizer
from stage2_prior import Stage2Config
from stage2_prior.tokenize import tokenize
from stage2_prior.training.run import train as train_prior

TINY = {
    "output_dir": "run",
    "model.base_channels": 8,
    "model.channel_multiplier": [1, 1, 2],
    "model.norm_num_groups": 4,
    "model.num_embeddings": 16,
    "discriminator.base_channels": 8,
    "codebook.kmeans_init_batches": 1,
    "loss.adversarial_start_step": 0,
    "per_device_train_batch_size": 8,
    "max_steps": 2,
    "warmup_steps": 0,
    "report_to": [],
}
LAUNCH = "-m accelerate.commands.launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"

WITH_TINY = [f"--{key}={value}" for key, value in TINY.items()]


def python(arguments: list[str], folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True)


def test_training_is_launched_from_a_folder_of_ones_own(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.yaml").write_text("learning_rate: 1.0e-3\n")
    command = [
        *LAUNCH.split(),
        "-m",
        "stage1_vqgan.train",
        "digits/stage1",
        *WITH_TINY,
    ]
    done = python(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tokenizer saved in" in done.stdout
    assert VQGANModel.from_pretrained(tmp_path / "run").config.num_embeddings == 16


def test_a_misspelt_key_is_a_message(tmp_path):
    """Also in a folder whose name is that of a package, and of a preset's folder."""
    (tmp_path / "configs" / "digits").mkdir(parents=True)
    command = ["-m", "stage1_vqgan.train", "digits/stage1", "--loss.perceptual_wight", "2", "--max_step", "3"]
    done = python(command, tmp_path)
    assert done.returncode == 2
    assert "loss.perceptual_wight: unknown key; did you mean 'perceptual_weight'?" in done.stderr
    assert "max_step: unknown key; did you mean 'max_steps'?" in done.stderr
    assert "Traceback" not in done.stderr and [path.name for path in tmp_path.iterdir()] == ["configs"]


STAGES = {
    "stage1_vqgan.train": (Stage1Config, train_tokenizer, ["digits/stage1", *WITH_TINY], "--data.dataset=./nowhere"),
    "stage2_prior.tokenize": (Stage2Config, tokenize, ["digits/stage2", "--num_views=1"], "--data.dataset=./nowhere"),
    "stage2_prior.train": (
        Stage2Config,
        train_prior,
        [
            *("digits/stage2", "--max_steps=2", "--warmup_steps=0", "--report_to=[]", "--num_views=2"),
            "--data.augmentation={rotate: 10, translate: 0.06, scale: 0.1}",
        ],
        "--model.hidden_size=33",
    ),
}


@pytest.mark.parametrize("stage", STAGES)
def test_after_a_mistake_the_same_folder_can_be_used(tiny_runs, tmp_path, monkeypatch, stage):
    monkeypatch.chdir(tmp_path)
    config_class, main, arguments, mistake = STAGES[stage]
    if config_class is Stage2Config:
        codes = "codes" if main is tokenize else tiny_runs.codes
        folders = {"tokenizer": tiny_runs.vqgan, "code_store": codes, "output_dir": "run"}
        arguments = [*arguments, *(f"--{key}={value}" for key, value in folders.items())]
    with pytest.raises(SystemExit):
        run(config_class, main, "command", [*arguments, mistake])
    run(config_class, main, "command", arguments)
