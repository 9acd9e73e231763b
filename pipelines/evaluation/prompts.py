"""Prompts of held-out images: what a prior with several conditions is asked for when it is evaluated."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs import ConfigError, Problem
from configs.problems import shown
from pipelines.evaluation.config import ComparisonConfig, EvaluationConfig
from stage1_vqgan import DataConfig
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
        ConfigError: it is missing, its tokens have another meaning, or the prior was trained on the validation images.
    """
    if config.code_store is None:
        names = ", ".join(segment.name for segment in layout.segments)
        message = f"this prior has further conditions ({names}); give the code store, whose validation images have them"
        raise ConfigError([Problem("code_store", message)])
    store = CodeStore(config.code_store)
    if meaning(store.layout) != meaning(layout):
        message = f"received {config.code_store!r}, whose tokens or conditions are not those of the prior"
        raise ConfigError([Problem("code_store", f"{message}; give the store that it was trained on")])
    _require_held_out(config.data, store.manifest["origin"]["data"], needs_store=bool(layout.segments))
    return store


def _require_held_out(data: DataConfig, trained: Mapping[str, Any], needs_store: bool) -> None:
    """Refuses validation images that the prior was trained on, as far as the settings of its code store tell.

    Args:
        data: the settings of the evaluation.
        trained: those of the code store.
        needs_store: whether the prior cannot be evaluated without a code store.
    """
    if any(trained.get(key) != getattr(data, key) for key in ("dataset", "dataset_config_name")):
        return
    train_split, own_split = trained.get("train_split"), trained.get("validation_split")
    key = "validation_split"
    if data.validation_split is None and own_split is None and data.train_split == train_split:
        key = "validation_fraction"
        is_wrong = data.validation_fraction != trained.get(key)
    else:
        split = data.validation_split or data.train_split
        is_wrong = split == train_split and split != own_split
    if is_wrong:
        message = f"received {shown(getattr(data, key))}, with which training images of the prior count as held out"
        advice = f"give {shown(trained.get(key))}, as in its code store"
        advice += "" if needs_store else "; code_store null measures with these all the same"
        raise ConfigError([Problem(f"data.{key}", f"{message}; {advice}")])


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
