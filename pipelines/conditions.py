"""The tokenizers of conditions: of texts, and of condition images. They are in a pipeline's folder `conditions/<name>`.

Shape letters: n values of a condition.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from configs.arguments import described, instance
from configs.problems import listed
from pipelines.chunks import encode_in_chunks
from stage1_vqgan import VQGANImageProcessor, VQGANModel, load_image_processor, load_vqgan
from stage2_prior import Segment, TokenLayout
from stage2_prior.condition_images import condition_pixels
from stage2_prior.condition_text import (
    TOKENIZER_NAME,
    encode_texts,
    read_tokenizer_file,
    save_text_tokenizer,
    text_fingerprint,
    text_tokens,
    tokenizer_of,
    vocabulary_size,
)
from stage2_prior.condition_tokenizers import FOLDER, saved_names

logger = logging.getLogger(__name__)

# The argument of `VQGANPipeline.generate` for conditions of each kind.
ARGUMENTS = {"class": "class_labels", "text": "text", "image": "condition_images"}


@dataclass(frozen=True)
class TextTokenizer:
    """The tokenizer of texts.

    Args:
        json: the text of its `tokenizer.json`.
    """

    json: str

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, which neither cuts nor pads texts."""
        return tokenizer_of(self.json, Path(TOKENIZER_NAME))

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the tokenizer."""
        return text_fingerprint(self.json)

    @property
    def num_tokens(self) -> int:
        """Number of its tokens."""
        return vocabulary_size(self.tokenizer)

    def ids(self, texts: Sequence[str], segment: Segment, key: str) -> Tensor:
        """Tokens of texts, int64 `(n, length)`; unused places hold the null token.

        Raises:
            ValueError: the tokenizer has no token for a text; the message names `key`.
        """
        counts = [len(tokens) for tokens in text_tokens(self.tokenizer, texts)]
        if 0 in counts:
            unknown = described(texts[counts.index(0)])
            raise ValueError(f"{key}: received {unknown}; the tokenizer has no token for it; use other words")
        if max(counts) > segment.length:
            message = "%s: a text has %d tokens, of which the prior takes the first %d, as in its training"
            logger.warning(message, key, max(counts), segment.length)
        return encode_texts(self.tokenizer, texts, segment)


@dataclass(frozen=True)
class ImageTokenizer:
    """The tokenizer of condition images, with the image processor that prepares them."""

    vqgan: VQGANModel
    image_processor: VQGANImageProcessor

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the tokenizer."""
        return self.vqgan.config.fingerprint or self.vqgan.compute_fingerprint()

    @property
    def num_tokens(self) -> int:
        """Number of its codes."""
        return self.vqgan.config.num_embeddings

    def ids(self, images: Sequence[Any], segment: Segment, key: str) -> Tensor:
        """Codes of the condition images of images, see `condition_pixels`; int64 `(n, length)`.

        Raises:
            ValueError: an image has another type, shape, dtype or range, or is no drawing where one is needed; the
                message names `key`.
        """
        processor = self.image_processor
        try:
            read = processor.read(list(images))
            pixels = [
                condition_pixels(levels, segment, processor.aspect_ratio, f"images[{number}]")
                for number, levels in enumerate(read)
            ]
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
        codes = encode_in_chunks(self.vqgan, torch.stack(pixels)).flatten(1).cpu()
        if codes.shape[1] != segment.length:
            found = f"{key}: the tokenizer makes {codes.shape[1]} codes of such images, the token layout has "
            raise ValueError(f"{found}{segment.length}; restore the layout that was saved with the prior")
        return codes


ConditionTokenizer = TextTokenizer | ImageTokenizer
KINDS: dict[str, type] = {"text": TextTokenizer, "image": ImageTokenizer}


def not_learnt(layout: TokenLayout, nulls: Iterable[str]) -> list[Segment]:
    """The conditions in `nulls` whose null token training has not seen in a prompt with all of these null tokens."""
    without = [segment for segment in layout.conditions if segment.name in set(nulls)]
    if len(without) == len(layout.conditions) and layout.has_null:
        return []
    return [segment for segment in without if not segment.has_null]


def _needed(layout: TokenLayout) -> dict[str, Segment]:
    """The conditions, by name, that need a tokenizer beside that of the pipeline's images."""
    return {segment.name: segment for segment in layout.segments if segment.name in saved_names(layout)}


def require_tokenizers(
    layout: TokenLayout, conditions: Mapping[str, ConditionTokenizer], own: ImageTokenizer
) -> dict[str, ConditionTokenizer]:
    """The tokenizer of each condition of texts or images. Condition images may have that of the pipeline's images.

    Args:
        layout: the token layout.
        conditions: tokenizers by the names of the conditions.
        own: the tokenizer of the pipeline's images.

    Raises:
        ValueError: a tokenizer is missing, is that of no condition, or is another one than in the training.
    """
    needed = _needed(layout)
    if unknown := sorted(conditions.keys() - needed.keys()):
        names = listed([repr(name) for name in needed], 10)
        raise ValueError(f"conditions: received a tokenizer of {unknown[0]!r}; this prior needs {names or 'none'}")
    for name in needed:
        if name not in conditions:
            raise ValueError(f"conditions: the tokenizer of {name!r} is missing; its training saved it with the prior")
    shared = {one.name: own for one in layout.segments if one.kind == "image" and one.name not in needed}
    found = {**shared, **conditions}
    for segment in layout.segments:
        if segment.name in found:
            _require_tokenizer(segment, found[segment.name])
    return found


def _require_tokenizer(segment: Segment, tokenizer: ConditionTokenizer) -> None:
    kind = KINDS[segment.kind]
    instance(f"conditions.{segment.name}", tokenizer, kind, f"of type {kind.__name__}")
    if tokenizer.fingerprint != segment.fingerprint:
        trained = f"but the prior was trained with {segment.fingerprint}; use that tokenizer"
        raise ValueError(f"conditions.{segment.name}: received the tokenizer {tokenizer.fingerprint}, {trained}")
    if tokenizer.num_tokens != segment.num_tokens:
        received = f"received {segment.num_tokens} tokens, but its tokenizer has {tokenizer.num_tokens}"
        advice = "restore the layout that was saved with the prior"
        raise ValueError(f"token_layout.segments.{segment.name}: {received}; {advice}")


# ---------------------------------------------------------------------- saving and loading


def save_conditions(folder: Path, conditions: Mapping[str, ConditionTokenizer], **options: Any) -> None:
    """Writes each tokenizer to `conditions/<name>/` of a folder.

    Args:
        folder: folder of the pipeline.
        conditions: tokenizers by the names of the conditions.
        **options: passed to `VQGANModel.save_pretrained`, for instance `max_shard_size`.
    """
    for name, tokenizer in conditions.items():
        target = folder / FOLDER / name
        if isinstance(tokenizer, TextTokenizer):
            save_text_tokenizer(tokenizer.json, target)
        else:
            tokenizer.vqgan.save_pretrained(target, **options)
            tokenizer.image_processor.save_pretrained(target)


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
    for name, segment in _needed(layout).items():
        place = folder / FOLDER / name
        if segment.kind == "text":
            found[name] = TextTokenizer(read_tokenizer_file(place))
        else:
            vqgan = load_vqgan(place, **options)
            found[name] = ImageTokenizer(vqgan, load_image_processor(place, vqgan.config))
    return found
