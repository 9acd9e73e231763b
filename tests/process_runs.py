"""Runs of both stages that leave what each process holds at the end; for tests/test_processes.py.

As a script, on several processes: `accelerate launch … -m tests.process_runs FOLDER OTHER`, where OTHER holds the runs
of one process. Imported, on the one there is.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from configs import load_config
from stage1_vqgan import Stage1Config, training
from stage1_vqgan.training_step import VQGANTrainer
from stage2_prior import Stage2Config
from stage2_prior import training as prior_training
from stage2_prior.tokenize import tokenize
from tests import tiny

GLOBAL_BATCH = 32


def stage1_config(folder: Path, **changes: Any) -> Stage1Config:
    values = {
        "output_dir": str(folder / "vqgan"),
        "max_steps": 10,
        "global_batch_size": GLOBAL_BATCH,
        "per_device_eval_batch_size": 180,
        "learning_rate": 1e-4,
        "warmup_steps": 2,
        "logging_steps": 5,
        "report_to": [],
        "model": {**tiny.VQGAN, "num_embeddings": 256},
        "data": dict(tiny.DATA),
        "loss": {"perceptual_weight": 0, "adversarial_weight": 0.5, "adversarial_start_step": 3},
        "discriminator": {"base_channels": 8, "num_layers": 2, "norm_type": "group"},
        "codebook": {"kmeans_init_batches": 2, "restart_interval": 4},
    }
    return load_config(Stage1Config, overrides={**values, **changes})


def stage2_config(folder: Path, **changes: Any) -> Stage2Config:
    values = {
        "tokenizer": str(folder / "vqgan"),
        "code_store": str(folder / "codes"),
        "output_dir": str(folder / "prior"),
        "data": dict(tiny.DATA),
        "num_views": 2,
        "max_steps": 10,
        "global_batch_size": GLOBAL_BATCH,
        "per_device_eval_batch_size": 100,
        "learning_rate": 1e-3,
        "logging_steps": 5,
        "condition_dropout": 0.2,
        "model": dict(tiny.LLAMA),
        "report_to": [],
    }
    return load_config(Stage2Config, overrides={**values, **changes})


def leave(folder: Path, name: str, state: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / f"{name}-{PartialState().process_index}.pt")


def run_stage1(config: Stage1Config, folder: Path, name: str = "stage1", bypass: bool = False) -> None:
    """Trains; leaves generator, discriminator, moving average and how many codes restarted, of this process."""
    finish, care = training.finish, VQGANTrainer._care_for_codebook
    restarted = []

    def finish_and_leave(config: Stage1Config, accelerator: Any, trainer: VQGANTrainer) -> Any:
        parts = {"generator": trainer.model, "average": trainer.average, "discriminator": trainer.discriminator}
        state = {key: accelerator.unwrap_model(part).state_dict() for key, part in parts.items()}
        leave(folder, name, {**state, "restarted": sum(restarted)})
        return finish(config, accelerator, trainer)

    def care_and_count(trainer: VQGANTrainer, *args: Any) -> Any:
        if bypass:  # a version of the code that trains without the wrapper which averages gradients
            trainer.generator = trainer.model
        found = care(trainer, *args)
        restarted.append(int(found.get("codebook/restarted", 0)))
        return found

    training.finish, VQGANTrainer._care_for_codebook = finish_and_leave, care_and_count
    try:
        training.train(config)
    finally:
        training.finish, VQGANTrainer._care_for_codebook = finish, care


def run_stage2(config: Stage2Config, folder: Path) -> None:
    """Trains; leaves the prior of this process."""
    evaluate = prior_training.PriorTrainer.evaluate

    def evaluate_and_leave(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        leave(folder, "stage2", trainer.accelerator.unwrap_model(trainer.model).state_dict())
        return evaluate(trainer, *args, **kwargs)

    prior_training.PriorTrainer.evaluate = evaluate_and_leave  # type: ignore[method-assign]
    try:
        prior_training.train(config)
    finally:
        prior_training.PriorTrainer.evaluate = evaluate  # type: ignore[method-assign]


def run_all(folder: Path) -> None:
    run_stage1(stage1_config(folder), folder / "states")
    config = stage2_config(folder)
    tokenize(config)
    run_stage2(config, folder / "states")


if __name__ == "__main__":
    root, other = map(Path, sys.argv[1:])
    run_all(root)
    tokenize(stage2_config(other, code_store=str(root / "codes_of_other")))
    bypassed = stage1_config(root / "bypassed", max_steps=4)
    run_stage1(bypassed, root / "states", "bypassed", bypass=True)
