"""Opens the conditions of a code store that is being written: their segments, tokenizers and sources."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from stage1_vqgan import ImageDataset, Images, ValueRange, VQGANModel, trained_range
from stage2_prior.condition_sources import (
    ClassCondition,
    Condition,
    ImageCondition,
    TextCondition,
    class_names,
    load_condition_images,
)
from stage2_prior.condition_text import load_text_tokenizer, read_tokenizer_file, text_fingerprint, vocabulary_size
from stage2_prior.condition_tokenizers import FOLDER, image_segment
from stage2_prior.conditions import Segment
from stage2_prior.training.condition_config import ConditionConfig
from stage2_prior.training.config import Stage2Config

SPLITS = ("train", "validation")


def conditions_origin(
    config: Stage2Config,
    texts: Mapping[str, str],
    images: Mapping[str, VQGANModel],
    train: Images,
    validation: Images,
) -> dict[str, Any]:
    """What determines the tokens of the conditions, for the origin of a code store; empty without conditions.

    Args:
        config: the settings.
        texts: the `tokenizer.json` of each text.
        images: the tokenizer of each condition image.
        train, validation: the images.

    Raises:
        ConfigError: the classes of a column cannot be read.
    """
    found = {}
    for name, condition in config.conditions.items():
        if condition.kind == "class":
            decides: dict[str, Any] = {"class_names": class_names(name, condition, train, validation)[0]}
        elif condition.kind == "text":
            decides = {"fingerprint": text_fingerprint(texts[name])}
        else:
            decides = {"fingerprint": images[name].config.fingerprint}
        found[name] = condition.identity() | decides
    return {"conditions": found} if found else {}


def open_conditions(
    config: Stage2Config, images: Mapping[str, VQGANModel], train: Images, validation: Images
) -> dict[str, list[Condition]]:
    """The conditions of each split, in the order of the settings; reads the text tokenizers in the code store.

    Args:
        config: the settings.
        images: the tokenizer of each condition image.
        train, validation: the images, with the columns of the conditions.

    Raises:
        ConfigError: a column cannot be read.
    """
    found: dict[str, list[Condition]] = {split: [] for split in SPLITS}
    for name, condition in config.conditions.items():
        if condition.kind == "class":
            pair = _classes(name, condition, train, validation)
        elif condition.kind == "text":
            pair = _texts(name, condition, Path(config.code_store) / FOLDER / name)
        else:
            pair = _images(config, name, condition, images[name])
        for split, opened in zip(SPLITS, pair, strict=True):
            found[split].append(opened)
    return found


def _classes(name: str, condition: ConditionConfig, train: Images, validation: Images) -> list[Condition]:
    names, labels = class_names(name, condition, train, validation)
    segment = Segment(name, "class", len(names), class_names=tuple(names))
    return [ClassCondition(segment, str(condition.column), ids) for ids in labels]


def _texts(name: str, condition: ConditionConfig, folder: Path) -> list[Condition]:
    tokenizer, fingerprint = load_text_tokenizer(folder), text_fingerprint(read_tokenizer_file(folder))
    places = condition.max_tokens or 1
    segment = Segment(name, "text", vocabulary_size(tokenizer), places, fingerprint=fingerprint)
    return [TextCondition(segment, str(condition.column), tokenizer)] * len(SPLITS)


def _images(config: Stage2Config, name: str, condition: ConditionConfig, tokenizer: VQGANModel) -> list[Condition]:
    segment = image_segment(name, condition, tokenizer)
    sources: tuple[Images | None, ...] = (None, None)
    if condition.column is not None:
        sources = load_condition_images(name, condition.column, config.data)
    values = trained_range(replace(config.data, value_range=None), condition.tokenizer or config.tokenizer)
    views = (config.num_views, 1)
    return [
        ImageCondition(
            segment, tokenizer, None if source is None else view_dataset(config, source, tokenizer, num, values)
        )
        for source, num in zip(sources, views, strict=True)
    ]


def view_dataset(
    config: Stage2Config, source: Images, tokenizer: VQGANModel, num_views: int, values: ValueRange | None
) -> ImageDataset:
    """The images that a tokenizer encodes, and their augmented views.

    Every source gives the views with the same numbers the same crops and flips.
    """
    return ImageDataset(
        source,
        tokenizer.config.image_shape,
        tokenizer.config.in_channels,
        config.data.augmentation if num_views > 1 else None,
        config.seed,
        first_view_plain=True,
        aspect_ratio=config.data.aspect_ratio,
        value_range=values,
    )


def tell_of_cut_texts(processes: PartialState, conditions: Sequence[Condition]) -> None:
    """Prints how many of the texts that all processes have encoded now were cut. All processes must call it."""
    for text in conditions:
        if not isinstance(text, TextCondition):
            continue
        counts = sum(gather_object([text.counts]), Counter[str]())
        name, places = text.segment.name, text.segment.length
        if counts["cut"]:
            processes.print(
                f"{name}: {counts['cut']:,} of {counts['texts']:,} texts have more than {places} tokens and lose their "
                f"end (conditions.{name}.max_tokens)"
            )
