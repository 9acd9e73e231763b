"""What a command reports as saved is on the disk: it is there after a power cut that follows the last line."""

from dataclasses import replace

import numpy as np
import torch

from configs.checkpoints import complete_checkpoints, read_checkpoint
from pipelines import VQGANPipeline
from pipelines.build import BuildConfig, build
from stage1_vqgan import load_tokenizer
from stage1_vqgan.training.run import train as train_stage1
from stage2_prior import load_prior
from stage2_prior.code_store import CodeStore
from stage2_prior.tokenize import tokenize
from stage2_prior.training.run import train as train_stage2
from tests.power_cuts import Disk


def weights(*models):
    return {(number, name): value for number, model in enumerate(models) for name, value in model.state_dict().items()}


def rows(store):
    return [np.concatenate([*part.read(np.arange(len(part)))[:2]], axis=None) for part in map(store.split, SPLITS)]


SPLITS = ("train", "validation")


def test_finished_commands_survive_a_power_cut(tiny_runs, tmp_path, monkeypatch):
    made, restored = tmp_path / "made", tmp_path / "restored"
    made.mkdir()
    paths = {name: str(made / name) for name in ("vqgan", "codes", "prior", "pipeline")}
    stage2 = replace(
        tiny_runs.stage2, tokenizer=paths["vqgan"], code_store=paths["codes"], output_dir=paths["prior"], max_steps=3
    )
    disk = Disk(made, monkeypatch)
    tokenizer = train_stage1(replace(tiny_runs.stage1, output_dir=paths["vqgan"], max_steps=2))
    store = tokenize(stage2)
    prior = train_stage2(stage2)
    build(BuildConfig(tokenizer=paths["vqgan"], prior=paths["prior"], output_dir=paths["pipeline"]))

    disk.restore(restored)
    torch.testing.assert_close(weights(load_tokenizer(str(restored / "vqgan"))), weights(tokenizer), rtol=0, atol=0)
    torch.testing.assert_close(weights(load_prior(str(restored / "prior"))), weights(prior), rtol=0, atol=0)
    np.testing.assert_equal(rows(CodeStore(restored / "codes")), rows(store))
    pipeline = VQGANPipeline.from_pretrained(restored / "pipeline")
    torch.testing.assert_close(weights(pipeline.vqgan, pipeline.prior), weights(tokenizer, prior), rtol=0, atol=0)
    for name in ("vqgan", "prior"):
        (checkpoint,) = complete_checkpoints(restored / name)
        assert read_checkpoint(checkpoint.path) == checkpoint
        assert (restored / name / "train_results.json").stat().st_size and (restored / name / "config.yaml").is_file()
