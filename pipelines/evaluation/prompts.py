"""Prompts of held-out images: what a prior with several conditions is asked for when it is evaluated."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from configs import ConfigError, Problem
from pipelines.evaluation.config import ComparisonConfig, EvaluationConfig
from stage2_prior import CodeStore, TokenLayout
from stage2_prior.data import CodeDataset


def held_out_prompts(config: EvaluationConfig, layout: TokenLayout) -> Tensor:
    """The prompt of each chosen validation image of the code store, int64 `(N, P)`, sorted by class.

    Raises:
        ConfigError: the code store is missing or is that of another prior, or it has no validation image of a class.
    """
    split = open_store(config, layout).split("validation")
    labels = split.read(np.arange(len(split))).labels
    rows = chosen_rows(labels, len(split), layout.num_classes, config.samples_per_class)
    return torch.from_numpy(CodeDataset(split, layout).read(rows)[2])


def open_store(config: ComparisonConfig, layout: TokenLayout) -> CodeStore:
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
