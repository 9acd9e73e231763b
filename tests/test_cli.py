"""The command line: a real launch from a user's own folder, mistakes that end in a message, and fast start-up."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command, launch_command_parser

from configs import run
from stage1_vqgan import Stage1Config, VQGANModel
from stage1_vqgan.training.run import train as train_tokenizer
from stage2_prior import Stage2Config
from stage2_prior.tokenize import tokenize
from stage2_prior.training.run import train as train_prior
from tests.slow import few

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
LAUNCH = "--num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"

WITH_TINY = [f"--{key}={value}" for key, value in TINY.items()]


def python(arguments: list[str], folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True)


def test_training_is_launched_from_a_folder_of_ones_own(tmp_path, monkeypatch, capfd):
    """Calls what `accelerate launch` calls. It starts the training in a process of its own."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.yaml").write_text("learning_rate: 1.0e-3\n")
    monkeypatch.chdir(tmp_path)
    command = [*LAUNCH.split(), "-m", "stage1_vqgan.train", "digits/stage1", *WITH_TINY]
    launch_command(launch_command_parser().parse_args(command))  # it exits if the process fails
    assert "tokenizer saved in" in capfd.readouterr().out
    assert VQGANModel.from_pretrained(tmp_path / "run").config.num_embeddings == 16


def test_a_misspelt_key_is_a_message(tmp_path):
    """This holds even in a folder that has the name of a package and of a preset folder."""
    (tmp_path / "configs" / "digits").mkdir(parents=True)
    command = ["-m", "stage1_vqgan.train", "digits/stage1", "--loss.perceptual_wight", "2", "--max_step", "3"]
    done = python(command, tmp_path)
    assert done.returncode == 2
    assert "loss.perceptual_wight: unknown key; did you mean 'perceptual_weight'?" in done.stderr
    assert "max_step: unknown key; did you mean 'max_steps'?" in done.stderr
    assert "Traceback" not in done.stderr and [path.name for path in tmp_path.iterdir()] == ["configs"]


# The import of each takes half a second or more.
HEAVY = [
    "torch",
    "numpy",
    "transformers",
    "accelerate",
    "datasets",
    "huggingface_hub",
    "lpips",
    "torchvision",
    "PIL",
    "gradio",
]
QUICK_ANSWERS = """
import runpy, sys
module, sys.argv[1:] = sys.argv[1], sys.argv[2:]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
except SystemExit as exited:
    print("exit code", exited.code)
print("heavy modules", [name for name in {heavy} if name in sys.modules])
""".replace("{heavy}", str(HEAVY))

# module, arguments with a mistake, message
MISTAKES = {
    "tokenizer": ("stage1_vqgan.train", "digits/stage1 --max_stpes 3", "did you mean 'max_steps'?"),
    "model section": ("stage1_vqgan.train", "digits/stage1 --model.base_chanels 3", "did you mean 'base_channels'?"),
    "model shape": (
        "stage1_vqgan.train",
        "digits/stage1 --model.image_size 18",
        "divisible by the downsampling factor",
    ),
    "weight of a loss": ("stage1_vqgan.train", "digits/stage1 --loss.l2_weight x", "must be a number from 0 up"),
    "dry run": ("stage1_vqgan.data", "digits/stage1 --contact_shet x", "did you mean 'contact_sheet'?"),
    "reconstruction": ("stage1_vqgan.evaluate", "--modle x", "did you mean 'model'?"),
    "feature network": ("stage1_vqgan.train_features", "--data.dataset x --max_stpes 3", "did you mean 'max_steps'?"),
    "conversion": ("stage1_vqgan.convert", "--form taming", "did you mean 'from'?"),
    "conversion of a prior": ("stage2_prior.convert", "--from llamagen --tokeniser x", "did you mean 'tokenizer'?"),
    "codes": ("stage2_prior.tokenize", "digits/stage2 --num_veiws 3", "did you mean 'num_views'?"),
    "prior": ("stage2_prior.train", "digits/stage2 --condition_dropuot 3", "did you mean 'condition_dropout'?"),
    "pipeline": ("pipelines.build", "--tokeniser x", "did you mean 'tokenizer'?"),
    "generation": ("pipelines.generate", "runs/x --temperatur 3", "did you mean 'temperature'?"),
    "pictures of images": ("pipelines.reconstruct", "runs/x --imges y", "did you mean 'images'?"),
    "scores": ("pipelines.score", "runs/x --tabel y", "did you mean 'table'?"),
    "prompts of CLIP": ("pipelines.clip_guidance", "runs/x --clip y --output z.png --txet a", "did you mean 'text'?"),
    "demo app": ("pipelines.app", "runs/x --prot 1", "did you mean 'port'?"),
    "upload": ("pipelines.push", "runs/x --hub_modle_id me/x", "did you mean 'hub_model_id'?"),
    "choice of settings": ("pipelines.tune", "runs/x --num_sample 3", "did you mean 'num_samples'?"),
    "evaluation": ("pipelines.evaluate", "digits/evaluate --guidance 3", "did you mean 'guidance_scale'?"),
}


@pytest.mark.parametrize(
    "module",
    few(
        sorted({module for module, _, _ in MISTAKES.values()}),
        "stage1_vqgan.train",
        "stage1_vqgan.convert",
        "stage2_prior.train",
        "pipelines.app",
        "pipelines.evaluate",
        "pipelines.push",
    ),
)
def test_help_imports_nothing_heavy(module, tmp_path):
    done = python(["-c", QUICK_ANSWERS, module, "--help"], tmp_path)
    assert re.search(rf"-m {module} (\[CONFIG\]|PIPELINE|MODEL|FOLDER) \[--key", done.stdout)
    assert done.stdout.endswith("heavy modules []\n"), done.stderr


@pytest.mark.parametrize(
    "case",
    few(
        MISTAKES,
        "tokenizer",
        "model shape",
        "weight of a loss",
        "conversion of a prior",
        "codes",
        "generation",
        "choice of settings",
        "evaluation",
    ),
)
def test_a_mistake_is_named_before_anything_heavy_is_imported(case, tmp_path):
    module, arguments, message = MISTAKES[case]
    done = python(["-c", QUICK_ANSWERS, module, *arguments.split()], tmp_path)
    assert message in done.stderr and done.stdout == "exit code 2\nheavy modules []\n"


STAGES = {
    "stage1_vqgan.train": (
        Stage1Config,
        train_tokenizer,
        ["digits/stage1", *WITH_TINY, "--report_to=[tensorboard]"],
        "--data.dataset=./nowhere",
    ),
    "stage2_prior.tokenize": (Stage2Config, tokenize, ["digits/stage2", "--num_views=1"], "--data.dataset=./nowhere"),
    "stage2_prior.train": (
        Stage2Config,
        train_prior,
        [
            *("digits/stage2", "--max_steps=2", "--warmup_steps=0", "--report_to=[tensorboard]", "--num_views=2"),
            "--data.augmentation={rotate: 10, translate: 0.06, scale: 0.1}",
        ],
        "--model.hidden_size=33",
    ),
}


@pytest.mark.parametrize("stage", few(STAGES, "stage1_vqgan.train", "stage2_prior.tokenize"))
def test_after_a_mistake_the_same_folder_can_be_used_and_no_secret_is_written(tiny_runs, tmp_path, monkeypatch, stage):
    secrets = {
        "HF_TOKEN": f"hf_{'aB3' * 12}",
        "HUGGING_FACE_HUB_TOKEN": f"hf_{'cD4' * 12}",
        "WANDB_API_KEY": "eF5" * 13,
    }
    for name, secret in secrets.items():
        monkeypatch.setenv(name, secret)
    monkeypatch.chdir(tmp_path)
    config_class, main, arguments, mistake = STAGES[stage]
    if config_class is Stage2Config:
        codes = "codes" if main is tokenize else tiny_runs.codes
        folders = {"tokenizer": tiny_runs.vqgan, "code_store": codes, "output_dir": "run"}
        arguments = [*arguments, *(f"--{key}={value}" for key, value in folders.items())]
    with pytest.raises(SystemExit):
        run(config_class, main, "command", [*arguments, mistake])
    run(config_class, main, "command", arguments)
    for path in filter(Path.is_file, tmp_path.rglob("*")):  # no file, not even a log of TensorBoard, holds a secret
        assert not any(secret.encode() in path.read_bytes() for secret in secrets.values()), path


def test_help_may_be_cut_off():
    """As by `--help | head`."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "stage1_vqgan.evaluate", "--help"], stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert done.returncode == 0 and not done.stderr
