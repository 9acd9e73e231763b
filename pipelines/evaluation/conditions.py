"""The classes of real images in each condition: the class, and the further conditions that have classes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from configs import ConfigError, Problem
from configs.names import one_form
from configs.problems import listed
from pipelines.evaluation.config import ComparisonConfig
from pipelines.evaluation.real_images import RealImages
from pipelines.pipeline_vqgan import VQGANPipeline
from stage1_vqgan import DataConfig, Images, load_images
from stage2_prior import CLASS, Segment, TokenLayout
from stage2_prior.condition_sources import class_names
from stage2_prior.manifest import read_manifest
from stage2_prior.training.condition_config import ConditionConfig

# Classes int64 `(N,)` of the training images and of the validation images, by the name of the condition.
RealLabels = dict[str, tuple[np.ndarray, np.ndarray]]


def load_splits(data: DataConfig, pipeline: VQGANPipeline | None) -> tuple[Images, Images]:
    """The training and the validation split of real images, see `load_images`.

    Args:
        data: the data.
        pipeline: the one that is evaluated; None for the images of a file.

    Raises:
        ConfigError: they cannot be read. If the labels are wrong, and the prior has no class, they are not needed.
    """
    try:
        return load_images(data)
    except ConfigError as error:
        (problem, *_) = error.problems
        if problem.key != "data.label_column" or pipeline is None or pipeline.class_names:
            raise
        message = "received true, but this prior has no class; give data.use_labels false"
        raise ConfigError([Problem("data.use_labels", f"{message} ({problem})")]) from error


def real_labels(config: ComparisonConfig, layout: TokenLayout, train: RealImages, validation: RealImages) -> RealLabels:
    """The classes of real images in each condition. A condition is missing if the images do not have its column.

    Raises:
        ConfigError: the column of a condition holds other classes than those of the prior.
    """
    found: RealLabels = {}
    if train.labels is not None and validation.labels is not None:
        found[CLASS] = train.labels, validation.labels
    segments = [segment for segment in layout.segments if segment.kind == "class" and segment.num_tokens > 1]
    if not segments or config.code_store is None:
        return found
    conditions = read_manifest(Path(config.code_store))["origin"]["conditions"]
    columns = {segment.name: conditions[segment.name]["column"] for segment in segments}
    try:
        kept = list(dict.fromkeys([*config.data.columns, *columns.values()]))
        sources = load_images(replace(config.data, columns=kept))
    except ConfigError as error:
        print(f"no accuracy of {', '.join(columns)}: {error.problems[0].message}")
        return found
    for segment in segments:
        column = columns[segment.name]
        names, labels = class_names(segment.name, ConditionConfig(kind="class", column=column), *sources)
        _require_same(segment, column, names)
        if labels[0] is not None and labels[1] is not None:  # those of a stream cannot be read by number
            found[segment.name] = labels[0][train.numbers], labels[1][validation.numbers]
    return found


def require_same_classes(layout: TokenLayout, names: Sequence[str]) -> None:
    """Refuses data whose classes are others than those of the prior, or stand in another order.

    Args:
        layout: the token layout. Where its names are mere numbers, as of a converted prior, only their count is known.
        names: of the classes of the data; empty without classes.

    Raises:
        ConfigError: they are others.
    """
    own, found = layout.class_names, tuple(map(one_form, names))
    are_numbers = len(own) == len(found) and own == tuple(map(str, range(len(own)))) and set(own) != set(found)
    if own and found and own != found and not are_numbers:
        classes = f"has the classes {listed(found, 8)}, but the prior has {listed(own, 8)}"
        advice = "give the data of the training, or data.use_labels false"
        raise ConfigError([Problem("data.dataset", f"it {classes}; {advice}")])


def _require_same(segment: Segment, column: str, names: list[str]) -> None:
    if tuple(map(one_form, names)) != segment.class_names:
        classes = f"has the classes {', '.join(names)}, but the prior has {', '.join(segment.class_names)}"
        advice = "give the data that the code store was made of"
        raise ConfigError([Problem("data.dataset", f"its column {column!r} {classes}; {advice}")])
