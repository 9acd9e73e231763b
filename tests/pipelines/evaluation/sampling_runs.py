"""Evaluations of a small pipeline in small shards; test_shared_sampling.py runs them on one and on two processes."""

import dataclasses
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from configs import load_config
from pipelines import VQGANPipeline
from pipelines.evaluate import EvaluationConfig, evaluate
from stage1_vqgan import VQGANConfig, VQGANImageProcessor, VQGANModel
from stage2_prior import TokenLayout
from stage2_prior.prior import build_prior
from tests import tiny


def make_pipeline(**changes: object) -> VQGANPipeline:
    """An untrained pipeline of the ten digits."""
    torch.manual_seed(0)
    vqgan = VQGANModel(VQGANConfig(**tiny.VQGAN))
    vqgan.config.fingerprint = vqgan.compute_fingerprint()
    layout = TokenLayout(32, tuple(map(str, range(10))), (4, 4), 4, vqgan.config.fingerprint)
    layout = dataclasses.replace(layout, **changes)
    pipeline = VQGANPipeline(vqgan, build_prior(tiny.LLAMA, layout), VQGANImageProcessor(16, 1), layout)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def config_of(folder: Path, output: str, **values: object) -> EvaluationConfig:
    given = {"pipeline": str(folder / "pipeline"), "output_dir": str(folder / output), "data": {"dataset": "digits"}}
    sizes = {
        "samples_per_class": 3,
        "guidance_scale": 1.5,
        "max_real_images": 60,
        "metrics": {"feature_networks": []},
        "feature_size": 4,
        "num_components": 8,
    }
    return load_config(EvaluationConfig, overrides={**given, **sizes, **values})


@contextmanager
def small_shards(size: int = 8) -> Iterator[None]:
    """Inside this context, a shard has so many images."""
    with (
        patch("pipelines.evaluation.shards.SHARD_SIZE", size),
        patch("pipelines.evaluation.real_images.SHARD_SIZE", size),
    ):
        yield


def evaluate_in_small_shards(folder: Path, output: str) -> None:
    with small_shards():
        evaluate(config_of(folder, output))


def killed_at_the_third_shard(folder: Path, output: str) -> None:
    """An evaluation that SIGKILL ends while it writes its third shard of generated images."""
    save, names = np.save, []

    def save_or_die(file: Any, images: np.ndarray, **options: Any) -> None:
        names.append(file.name)
        if len([name for name in names if "samples" in name]) == 3:
            file.write(b"a part of it")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(file, images, **options)

    with patch("numpy.save", save_or_die):
        evaluate_in_small_shards(folder, output)
