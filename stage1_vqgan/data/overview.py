"""What a data set holds, in words: for the dry run `python -m stage1_vqgan.data`, and for the start of a training."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from stage1_vqgan.data.decoding import (
    EncodedImage,
    SkippedImage,
    UndecodableImage,
    decode_pixels,
    decode_values,
    mode_of,
)
from stage1_vqgan.data.indexed import ImageSource
from stage1_vqgan.data.skipped import smallest_fraction
from stage1_vqgan.data.sources import Images, peek
from stage1_vqgan.image_processing_values import ValueRange

# Images that are decoded at the start of a training.
LOOKED_AT_FIRST = 32
MOST_CLASSES, MOST_SKIPPED = 30, 10  # named


@dataclass
class Looked:
    """What was found in some images of a split.

    Attributes:
        total: number of images of the split; None if it is unknown.
        images: number of images that were looked at.
        are_spread: they are spread evenly over the split; otherwise they are its first ones.
        sizes: number of images of each `(width, height)`.
        modes: number of images of each mode.
        values: lowest and highest pixel value of each type of numbers.
        labels: number of images of each class id.
        skipped: images that training would skip.
    """

    total: int | None
    are_spread: bool
    images: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    values: dict[str, tuple[float, float]] = field(default_factory=dict)
    labels: Counter[int] = field(default_factory=Counter)
    skipped: list[SkippedImage] = field(default_factory=list)

    def add(self, number: int, encoded: EncodedImage, channels: int, value_range: ValueRange | None) -> None:
        """Looks at an image."""
        self.images += 1
        try:
            decode_pixels(encoded, channels, value_range)
            values = decode_values(encoded, channels)
        except UndecodableImage as error:
            self.skipped.append(SkippedImage(number, encoded.name, str(error)))
            return
        self.sizes[values.shape[1], values.shape[0]] += 1
        self.modes[mode_of(encoded)] += 1
        finite = values[np.isfinite(values)]
        if finite.size:
            low, high = self.values.get(values.dtype.name, (np.inf, -np.inf))
            self.values[values.dtype.name] = min(low, float(finite.min())), max(high, float(finite.max()))


def look(source: Images, count: int, channels: int, value_range: ValueRange | None = None) -> Looked:
    """Decodes at most `count` images: spread evenly over an indexed source, the first ones of a stream.

    Args:
        source: the images.
        count: largest number of images, at least 1.
        channels: channels of the tokenizer.
        value_range: the pixel values that become black and white; None takes the range of the dtype.
    """
    looked = Looked(source.num_images, isinstance(source, ImageSource))
    for number, encoded, label in peek(source, count):
        looked.add(number, encoded, channels, value_range)
        if label is not None:
            looked.labels[label] += 1
    return looked


def data_facts(
    train: Images, validation: Images, looked: Looked, shape: tuple[int, int], max_skipped: float
) -> dict[str, str]:
    """Facts about a data set, by name, each in a line.

    Args:
        train, validation: its splits.
        looked: what was found in training images.
        shape: height and width of the images of the tokenizer, in pixels.
        max_skipped: `data.max_skipped_fraction`.
    """
    facts = {
        "images": f"{_number(train.num_images)} for training, {_number(validation.num_images)} for validation",
        "classes": _classes(train, looked),
        "looked at": _looked_at(looked),
        "sizes": _sizes(looked.sizes, shape),
        "modes": ", ".join(_counted(looked.modes)),
        "values": "; ".join(f"{kind} from {low:g} to {high:g}" for kind, (low, high) in looked.values.items()),
        "skipped": _skipped(looked, max_skipped),
    }
    return {name: text for name, text in facts.items() if text}


def become(shape: tuple[int, int], num_channels: int, aspect_ratio: str) -> str:
    """What the tokenizer gets of every image."""
    return f"{shape[1]}×{shape[0]} ({aspect_ratio}), channels: {num_channels}"


def _number(count: int | None) -> str:
    return "an unknown number" if count is None else f"{count:,}"


def _looked_at(looked: Looked) -> str:
    if looked.images == looked.total:
        return f"all {looked.images:,} training images"
    where = "spread evenly over" if looked.are_spread else "the first of"
    total = _number(looked.total) + " of" * (looked.total is None)
    return f"{looked.images:,} images, {where} {total} training images"


def _classes(train: Images, looked: Looked) -> str:
    """Classes with the numbers of their training images; of a stream those that were looked at."""
    if not train.has_labels:
        return "none: the model will be unconditional"
    if isinstance(train, ImageSource):
        names = train.class_names or []
        counts: Mapping[int, int] = dict(enumerate(np.bincount(train.labels, minlength=len(names)).tolist()))  # type: ignore[arg-type]
        return f"{len(names):,}, with these numbers of training images: {_few_classes(counts, names)}"
    names = train.class_names or [str(number) for number in range(max(looked.labels, default=-1) + 1)]
    declared = f"{len(names):,} declared" if train.class_names else "an unknown number"
    counts = {number: count for number, count in sorted(looked.labels.items()) if count}
    return f"{declared}; {len(counts)} in the images looked at: {_few_classes(counts, names)}"


def _few_classes(counts: Mapping[int, int], names: Sequence[str]) -> str:
    shown = ", ".join(f"{names[number]} ({count:,})" for number, count in list(counts.items())[:MOST_CLASSES])
    if len(counts) <= MOST_CLASSES:
        return shown
    least, most = min(counts, key=lambda number: counts[number]), max(counts, key=lambda number: counts[number])
    ends = f"the fewest {names[least]}, {counts[least]:,}, the most {names[most]}, {counts[most]:,}"
    return f"{shown}, and {len(counts) - MOST_CLASSES:,} more ({ends})"


def _sizes(sizes: Counter[tuple[int, int]], shape: tuple[int, int]) -> str:
    if not sizes:
        return ""
    shown = ", ".join(_counted(Counter({f"{width}×{height}": count for (width, height), count in sizes.items()})))
    text = f"{shown} (width×height)"
    if len(sizes) > 1:
        small, large = (pick(sizes, key=lambda size: size[0] * size[1]) for pick in (min, max))
        text += f"; the smallest {small[0]}×{small[1]}, the largest {large[0]}×{large[1]}"
    height, width = shape
    enlarged = sum(count for size, count in sizes.items() if size[0] < width or size[1] < height)
    return text + (f"; {enlarged} smaller than {width}×{height}, which are enlarged" if enlarged else "")


def _counted(counter: Counter[str]) -> list[str]:
    """The most common entries with their numbers; without a number if there is only one."""
    if len(counter) == 1:
        return list(counter)
    shown = [f"{name} ({count})" for name, count in counter.most_common(5)]
    return shown + ([f"{len(counter) - 5} others"] if len(counter) > 5 else [])


def _skipped(looked: Looked, max_skipped: float) -> str:
    if not looked.skipped:
        return "none" if looked.images == looked.total else "none of these"
    text = f"{len(looked.skipped)} of {looked.images:,} cannot be used"
    if len(looked.skipped) / looked.images > max_skipped:
        needed = smallest_fraction(len(looked.skipped), looked.images)
        text += f"; to train without them, set data.max_skipped_fraction to {needed:g}"
    shown = [f"{image.name}: {image.reason}" for image in looked.skipped[:MOST_SKIPPED]]
    more = len(looked.skipped) - len(shown)
    return "\n".join([f"{text}:", *shown, *([f"and {more} more"] if more else [])])
