"""An interrupted run ends bit-identical to an undisturbed one; finished runs and other settings are recognised."""

import json
import re
import shutil

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file

from configs import ConfigError, check, load_config
from configs.checkpoints import complete_checkpoints
from stage1_vqgan import Stage1Config, VQGANImageProcessor, VQGANModel
from stage1_vqgan.training import checkpointing, run
from stage1_vqgan.training.run import build_accelerator, train
from stage1_vqgan.training.step import VQGANTrainer
from tests.slow import few
from tests.tiny import tensors


def make_config(folder, **changes):
    values = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 180,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "min_lr_rate": 0.1,
        "logging_steps": 2,
        "save_steps": 3,
        "report_to": [],
        "num_sample_images": 2,
        "model": {
            "image_size": 8,
            "in_channels": 1,
            "base_channels": 8,
            "channel_multiplier": [1, 2],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "norm_num_groups": 4,
            "dropout": 0.1,
            "latent_channels": 8,
            "embed_dim": 4,
            "num_embeddings": 32,
        },
        "data": {"dataset": "digits", "augmentation": {"rotate": 10, "translate": 0.1}},
        "loss": {
            "perceptual_weight": 0,
            "adversarial_start_step": 2,
            "generator_type": "non_saturating",
            "gradient_penalty_weight": 1.0,
            "lecam_weight": 0.1,
            "schedules": {"adversarial": {"ramp": 2}, "l1": {"end_weight": 0.5}},
        },
        "discriminator": {"base_channels": 8, "num_layers": 1, "norm_type": "actnorm", "weight_decay": 0.1},
        "perturbation": {"image_share": 0.5, "code_share": 0.5, "neighbours": 4},
        "codebook": {"kmeans_init_batches": 2, "restart_interval": 2},
    }
    return load_config(Stage1Config, None, {**values, **changes})


def contents(folder):
    """Every tensor of the last checkpoint and of the saved model."""
    found = {"model": load_file(folder / "model.safetensors")}
    for path in sorted((folder / "checkpoint-6").iterdir()):
        if path.suffix == ".safetensors":
            found[path.name] = load_file(path)
        elif path.name != "complete.json":
            found[path.name] = json.loads(path.read_text())
    return tensors(found)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run without interruption: its folder, and its model."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    return folder, train(make_config(folder))


@pytest.fixture
def copied(straight, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(straight[0], folder)
    return folder


def interrupt(folder, after):
    """The files of a run that was stopped between two checkpoints."""
    for name in ("train_results.json", "model.safetensors", "config.json", "preprocessor_config.json"):
        (folder / name).unlink()
    for checkpoint in complete_checkpoints(folder):
        if checkpoint.step > after:
            shutil.rmtree(checkpoint.path)


def test_what_a_run_leaves(straight):
    folder, model = straight
    assert [checkpoint.path.name for checkpoint in complete_checkpoints(folder)] == ["checkpoint-3", "checkpoint-6"]
    loaded = VQGANModel.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert not model.training and loaded.config.fingerprint == loaded.compute_fingerprint()
    assert VQGANImageProcessor.from_pretrained(folder).num_channels == 1
    names = {path.split("/")[1] for path in contents(folder)}
    kinds = ["model", "average", "optimizer", "monitor", "discriminator", "discriminator_optimizer", "anchors"]
    states = ["optimizer.json", "discriminator_optimizer.json"]
    assert names == {"model", *states, *(f"{kind}.safetensors" for kind in kinds)}
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4 and '"eval/psnr"' in lines[-1]  # three logs, one evaluation
    assert [path.name for path in (folder / "reconstructions").iterdir()] == ["step_00000006.png"]


def test_kmeans_takes_the_batches_of_whole_steps(monkeypatch, tmp_path):
    """With accumulation, as many images as without it."""
    seen = []

    def record(model, average, batches, accelerator, seed):
        seen.extend(len(images) for images in batches)
        raise StopIteration

    monkeypatch.setattr(run, "initialise_codebook", record)
    with pytest.raises(StopIteration):
        train(make_config(tmp_path, **{"gradient_accumulation_steps": 3, "codebook.kmeans_init_batches": 2}))
    assert seen == 6 * [8]


@pytest.mark.parametrize("quantizer", ["ema", pytest.param("gumbel", marks=pytest.mark.slow)])
def test_resuming_is_exact_with_every_quantizer_that_has_a_state(tmp_path, quantizer):
    """And with the StyleGAN discriminator, and augmentation of what it sees."""
    changes = {
        "model": dict(make_config(tmp_path).model, quantizer=quantizer),
        "discriminator": {"type": "stylegan", "base_channels": 4, "augmentation": True},
    }
    train(make_config(tmp_path / "straight", **changes))
    shutil.copytree(tmp_path / "straight", tmp_path / "again")
    interrupt(tmp_path / "again", after=3)
    train(make_config(tmp_path / "again", **changes))
    expected, found = contents(tmp_path / "straight"), contents(tmp_path / "again")
    assert [path for path in expected if not torch.equal(expected[path], found[path])] == []
    assert quantizer != "ema" or any(path.endswith("cluster_size") for path in expected)


@pytest.mark.parametrize(
    ("before", "after", "kind"), [pytest.param(0, 0.5, "without", marks=pytest.mark.slow), (0.5, 0, "with")]
)
def test_a_discriminator_cannot_come_or_go(tmp_path, before, after, kind):
    config = make_config(tmp_path, max_steps=3)
    config.loss.adversarial_weight = before
    train(config)
    longer = make_config(tmp_path, max_steps=6, allow_config_changes=True)
    longer.loss.adversarial_weight = after
    with pytest.raises(ConfigError, match=rf"adversarial_weight: .*checkpoint-3 is of a run {kind} a discriminator"):
        train(longer)
    assert [checkpoint.step for checkpoint in complete_checkpoints(tmp_path)] == [3]


def test_a_saved_discriminator_is_left_out_of_a_run_that_ends_before_its_start(copied):
    interrupt(copied, 3)
    late = {"loss.adversarial_start_step": 6, "loss.discriminator_start_step": 0, "allow_config_changes": True}
    train(make_config(copied, **late))
    assert not (copied / "checkpoint-6" / "discriminator.safetensors").exists()
    assert (copied / "checkpoint-3" / "discriminator.safetensors").exists()


@pytest.mark.parametrize("num_workers", few([0, 2], 2))
def test_resuming_is_exact(straight, copied, num_workers):
    interrupt(copied, after=3)
    (copied / "unfinished" / "checkpoint-6").mkdir(parents=True)  # the next one was not complete yet
    train(make_config(copied, dataloader_num_workers=num_workers, save_total_limit=1))
    expected, found = contents(straight[0]), contents(copied)
    assert expected.keys() == found.keys() and len(expected) > 300
    different = [path for path in expected if not torch.equal(expected[path], found[path])]
    assert different == []
    assert [checkpoint.path.name for checkpoint in complete_checkpoints(copied)] == ["checkpoint-6"]


def test_an_interruption_before_the_last_save_needs_no_training(straight, copied):
    interrupt(copied, after=6)
    before = {path: (copied / path).read_bytes() for path in ("checkpoint-6/model.safetensors",)}
    train(make_config(copied))
    assert {path: (copied / path).read_bytes() for path in before} == before
    expected, found = (load_file(folder / "model.safetensors") for folder in (straight[0], copied))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert (copied / "train_results.json").is_file()


def test_a_finished_run_is_not_repeated(straight):
    folder, model = straight
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again = train(make_config(folder, logging_steps=1))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == files
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_other_settings_are_refused(straight):
    folder, _ = straight
    with pytest.raises(ConfigError) as caught:
        train(make_config(folder, learning_rate=2e-3, **{"data.augmentation.rotate": 5}))
    keys = [problem.key for problem in caught.value.problems]
    assert keys == ["output_dir", "data.augmentation.rotate", "learning_rate"]


def test_a_fresh_start_does_not_mix_with_old_checkpoints(copied):
    interrupt(copied, after=3)
    with pytest.raises(ConfigError, match=r"resume_from_checkpoint.*holds checkpoints"):
        train(make_config(copied, resume_from_checkpoint="none"))


def test_a_checkpoint_beyond_the_end_of_the_run_is_refused(straight, tmp_path):
    checkpoint = str(straight[0] / "checkpoint-6")
    with pytest.raises(ConfigError, match=r"max_steps|resume_from_checkpoint"):
        train(make_config(tmp_path / "shorter", max_steps=4, resume_from_checkpoint=checkpoint))


@pytest.fixture(scope="module")
def loading(straight, tmp_path_factory):
    """A copy of a checkpoint, and a function that loads it into a run."""
    folder = tmp_path_factory.mktemp("loading")
    checkpoint = folder / "checkpoint-6"
    shutil.copytree(straight[0] / checkpoint.name, checkpoint)
    config = check(make_config(folder))
    accelerator = build_accelerator(config)
    trainer = VQGANTrainer(config, accelerator)
    return checkpoint, lambda: checkpointing.load(checkpoint, accelerator, trainer)


DAMAGES = {
    "missing": lambda tensors, name: tensors.pop(name),
    "of another shape": lambda tensors, name: tensors.update({name: torch.ones(3)}),
    "not finite": lambda tensors, name: tensors.update({name: torch.full(tensors[name].shape, torch.inf)}),
}


@pytest.mark.parametrize(
    "kind", ["model", "average", "optimizer", "monitor", "discriminator", "discriminator_optimizer", "anchors"]
)
def test_damaged_entries_are_refused_by_name(loading, kind):
    checkpoint, load = loading
    file = checkpoint / f"{kind}.safetensors"
    before = file.read_bytes()
    for damage in DAMAGES.values():
        tensors = safetensors.torch.load(before)
        name = sorted(tensors)[-1]
        damage(tensors, name)
        save_file(tensors, file)
        with pytest.raises(ConfigError, match=re.escape(f"{file}: {name}: ")):
            load()
    file.unlink()
    with pytest.raises(ConfigError, match=re.escape(f"{file}: this file is missing")):
        load()
    file.write_bytes(before)


def test_a_missing_description_of_an_optimizer_is_refused(loading):
    checkpoint, load = loading
    file = checkpoint / "discriminator_optimizer.json"
    before = file.read_bytes()
    file.unlink()
    with pytest.raises(ConfigError, match=r"discriminator_optimizer\.json: this file is missing"):
        load()
    file.write_bytes(before)
