"""The tokenizers of conditions: of texts, and of condition images. They are in a pipeline's folder `conditions/<name>`.

Shape letters: n values of a condition.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from configs.arguments import instance
from configs.checksums import verify_checksums
from configs.files import make_folder
from configs.problems import listed
from pipelines.chunks import encode_in_chunks
from pipelines.prompts import Given
from stage1_vqgan import VQGANImageProcessor, VQGANModel, load_image_processor, load_vqgan
from stage2_prior import CLASS, Segment, TokenLayout, encode_texts, load_text_tokenizer, text_fingerprint

FOLDER = "conditions"


@dataclass(frozen=True)
class ImageTokenizer:
    """The tokenizer of condition images, with the image processor that prepares them."""

    vqgan: VQGANModel
    image_processor: VQGANImageProcessor

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the tokenizer."""
        return self.vqgan.config.fingerprint or self.vqgan.compute_fingerprint()

    def ids(self, images: list[Any], segment: Segment, key: str) -> Tensor:
        """Codes of images, resized to `segment.image_shape`, int64 `(n, length)`.

        Raises:
            ValueError: an image has another type, shape, dtype or range; the message names `key`.
        """
        processor = copy.copy(self.image_processor)
        processor.size = dict(zip(("height", "width"), segment.image_shape, strict=True))
        try:
            pixel_values = processor(images)["pixel_values"]
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
        return encode_in_chunks(self.vqgan, pixel_values).flatten(1).cpu()


ConditionTokenizer = PreTrainedTokenizerBase | ImageTokenizer


@torch.no_grad()
def condition_ids(given: Given, layout: TokenLayout, tokenizers: Mapping[str, ConditionTokenizer]) -> Tensor:
    """The ids of given values among the tokens of their condition, int64 `(n, length)`.

    Raises:
        ValueError: a class is unknown, or a text or an image cannot be encoded.
    """
    segment = given.segment
    if segment.kind == "class":
        classes = layout.class_ids if segment.name == CLASS else segment.classes.ids
        return classes(given.values)[:, None]
    tokenizer: Any = tokenizers[segment.name]
    if segment.kind == "text":
        return encode_texts(tokenizer, list(given.values), segment)
    return tokenizer.ids(list(given.values), segment, given.key)


# ---------------------------------------------------------------------- saving and loading


def own_segments(layout: TokenLayout) -> list[Segment]:
    """The conditions that need a tokenizer beside that of the pipeline's images."""
    return [
        segment
        for segment in layout.segments
        if segment.kind == "text" or (segment.kind == "image" and segment.fingerprint != layout.tokenizer_fingerprint)
    ]


def require_tokenizers(
    layout: TokenLayout, conditions: Mapping[str, ConditionTokenizer], own: ImageTokenizer
) -> dict[str, ConditionTokenizer]:
    """The tokenizer of each condition of texts or images. Images may have the tokenizer of the pipeline.

    Args:
        layout: the token layout.
        conditions: tokenizers by the names of the conditions.
        own: the tokenizer of the pipeline's images.

    Raises:
        ValueError: a tokenizer is missing, is that of no condition, or is another one than in the training.
    """
    needed = {segment.name: segment for segment in own_segments(layout)}
    if unknown := sorted(conditions.keys() - needed.keys()):
        advice = f"the prior needs {listed([repr(name) for name in needed], 10) or 'none'}"
        raise ValueError(f"conditions: received a tokenizer of {unknown[0]!r}; {advice}")
    if missing := [name for name in needed if name not in conditions]:
        raise ValueError(f"conditions: the tokenizer of {missing[0]!r} is missing; it is saved with the prior")
    for name, segment in needed.items():
        _require_tokenizer(segment, conditions[name])
    shared = {segment.name: own for segment in layout.segments if segment.kind == "image"}
    return {**shared, **conditions}


def _require_tokenizer(segment: Segment, tokenizer: ConditionTokenizer) -> None:
    kind = ImageTokenizer if segment.kind == "image" else PreTrainedTokenizerBase
    instance(f"conditions.{segment.name}", tokenizer, kind, f"the tokenizer of {segment.kind}s")
    found = tokenizer.fingerprint if isinstance(tokenizer, ImageTokenizer) else text_fingerprint(tokenizer)
    if found != segment.fingerprint:
        raise ValueError(
            f"conditions.{segment.name}: received the tokenizer {found}, but the prior was trained with "
            f"{segment.fingerprint}; use that tokenizer"
        )


def save_conditions(folder: Path, conditions: Mapping[str, ConditionTokenizer], **options: Any) -> None:
    """Writes each tokenizer to `conditions/<name>/` of a folder.

    Args:
        folder: folder of the pipeline.
        conditions: tokenizers by the names of the conditions.
        **options: passed to `VQGANModel.save_pretrained`, for instance `max_shard_size`.
    """
    for name, tokenizer in conditions.items():
        target = make_folder(folder / FOLDER / name)
        if isinstance(tokenizer, ImageTokenizer):
            tokenizer.vqgan.save_pretrained(target, **options)
            tokenizer.image_processor.save_pretrained(target)
        else:
            tokenizer.save_pretrained(target)


def load_conditions(folder: Path, layout: TokenLayout, **options: Any) -> dict[str, ConditionTokenizer]:
    """Loads the tokenizers in `conditions/` of the folder of a pipeline or a prior. It may come from a stranger.

    Args:
        folder: the folder.
        layout: the token layout.
        **options: passed to `VQGANModel.from_pretrained`, for instance `dtype`.

    Raises:
        FileNotFoundError: a tokenizer is missing.
        OSError, ValueError: a file is damaged, or refers to code or files outside the folder.
    """
    found: dict[str, ConditionTokenizer] = {}
    for segment in own_segments(layout):
        place = folder / FOLDER / segment.name
        if not place.is_dir():
            raise FileNotFoundError(f"{place}: this folder is missing, the tokenizer of the condition {segment.name!r}")
        if segment.kind == "text":
            verify_checksums(place, ["tokenizer.json"])
            found[segment.name] = load_text_tokenizer(place)
        else:
            vqgan = load_vqgan(place, **options)
            found[segment.name] = ImageTokenizer(vqgan, load_image_processor(place, vqgan.config))
    return found
