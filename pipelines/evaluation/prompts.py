"""Prompts of held-out images: what a prior with several conditions is asked for when it is evaluated."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs import ConfigError, Problem
from configs.randomness import draw_seeds
from pipelines.evaluation.config import EvaluationConfig
from pipelines.pipeline_vqgan import VQGANPipeline
from pipelines.prompts import require_learnt
from pipelines.requests import unmasking_options
from stage2_prior import CodeStore, SamplingOptions, TokenLayout
from stage2_prior.data import CodeDataset


@torch.no_grad()
def sample_held_out(config: EvaluationConfig, pipeline: VQGANPipeline) -> tuple[Tensor, dict[str, np.ndarray]]:
    """Generates an image for the prompt of each chosen validation image of the code store.

    Returns:
        Pixels float32 `(N, C, H, W)` in [-1, 1], sorted by class, and the classes int64 `(N,)` of each condition that
        has classes, by its name.

    Raises:
        ConfigError: the code store is missing or is that of another prior, it has no validation image of a class, or
            the prior cannot be guided, or a causal one is given steps.
    """
    layout, options = pipeline.layout, SamplingOptions(guidance_scale=config.guidance_scale)
    try:
        require_learnt(layout, [segment.name for segment in layout.conditions], options)
        steps: dict[str, Any] = dict.fromkeys(("num_steps", "order", "order_temperature")) | config.unmasking
        unmasking = unmasking_options(layout, **steps)
    except ValueError as error:
        raise ConfigError([Problem.of_error(error)]) from error
    split = open_store(config, layout).split("validation")
    rows = chosen_rows(
        split.read(np.arange(len(split))).labels, len(split), layout.num_classes, config.samples_per_class
    )
    prompts = torch.from_numpy(CodeDataset(split, layout).read(rows)[2])
    classes = [segment for segment in layout.conditions if segment.kind == "class"]
    labels = {one.name: prompts[:, layout.places[one.name]] - layout.first_tokens[one.name] for one in classes}
    seeds = draw_seeds(len(rows), torch.Generator().manual_seed(config.seed))
    out = pipeline._output(
        pipeline._sampled(prompts, seeds, options, None, None, unmasking=unmasking), "pt", None, seeds
    )
    return out.images.cpu() * 2 - 1, {name: found[:, 0].numpy() for name, found in labels.items()}


def open_store(config: EvaluationConfig, layout: TokenLayout) -> CodeStore:
    """The code store that the prior was trained on, or another one of the same conditions.

    Raises:
        ConfigError: it is missing, or its tokens have another meaning.
    """
    if config.code_store is None:
        names = ", ".join(segment.name for segment in layout.segments)
        message = f"this prior has further conditions ({names}); give the code store, whose validation images have them"
        raise ConfigError([Problem("code_store", message)])
    store = CodeStore(config.code_store)
    if meaning(store.layout) != meaning(layout):
        message = f"received {config.code_store!r}, whose tokens or conditions are not those of the prior"
        raise ConfigError([Problem("code_store", f"{message}; give the store that it was trained on")])
    return store


def meaning(layout: TokenLayout) -> TokenLayout:
    """A layout without what the training of a prior decides."""
    segments = tuple(replace(segment, has_null=True) for segment in layout.segments)
    return replace(layout, has_null=True, segments=segments, family="causal")


def chosen_rows(labels: np.ndarray | None, rows: int, num_classes: int, each: int) -> np.ndarray:
    """Rows int64 `(max(1, C)·each,)`, spread evenly over the rows of each class; few rows occur several times.

    Raises:
        ConfigError: a class has no rows.
    """
    groups = [np.arange(rows)]
    if num_classes and labels is not None:
        groups = [np.flatnonzero(labels == number) for number in range(num_classes)]
    for number, group in enumerate(groups):
        if not len(group):
            message = f"its validation split has no image of class {number}, so no prompt; give another store"
            raise ConfigError([Problem("code_store", message)])
    return np.concatenate([group[np.arange(each) * len(group) // each] for group in groups])
