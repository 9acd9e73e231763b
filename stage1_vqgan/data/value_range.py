"""The range of pixel values of a data set: checked on some images, or measured over the training set."""

import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from configs.files import read_json, write_json
from stage1_vqgan.data.config import DataConfig, data_problem
from stage1_vqgan.data.decoding import EncodedImage, UndecodableImage, decode_values
from stage1_vqgan.data.indexed import ImageSource
from stage1_vqgan.data.sources import Images, peek
from stage1_vqgan.image_processing_values import ValueRange, read_range

# Images that are looked at before a training, and that "auto" measures at most.
LOOKED_AT, MEASURED = 50, 10_000
FILE_NAME = "value_range.json"
# A set that uses fewer of the 256 levels gets a warning.
FEW_LEVELS = 128
# Types of 8 bits, and types that `decode_pixels` takes for 8 bits if they hold no other numbers.
BYTES, WIDE = {"bool", "uint8"}, {"int32", "int64", "uint32", "uint64"}

logger = logging.getLogger(__name__)


@dataclass
class Values:
    """The pixel values of some images.

    Attributes:
        low, high: lowest and highest finite value.
        types: number of images of each type of numbers.
        reasons: why images could not be decoded.
    """

    low: float = np.inf
    high: float = -np.inf
    types: Counter[str] = field(default_factory=Counter)
    reasons: list[str] = field(default_factory=list)

    @property
    def of_bytes(self) -> bool:
        """Whether all images have 8 bits or less."""
        return self.low >= 0 and self.high <= 255 and self.types.keys() <= BYTES | WIDE

    @property
    def without_range(self) -> int:
        """Number of images that need a configured range, because their type has none."""
        return 0 if self.of_bytes else sum(self.types[name] for name in self.types.keys() - BYTES - {"uint16"})

    @property
    def images(self) -> int:
        """Number of decoded images."""
        return self.types.total()

    def add(self, encoded: EncodedImage, num_channels: int) -> None:
        """Adds an image, or the reason why it cannot be decoded."""
        try:
            values = decode_values(encoded, num_channels)
        except UndecodableImage as error:
            self.reasons.append(f"{encoded.name}: {error}")
            return
        self.types[values.dtype.name] += 1
        finite = values[np.isfinite(values)]
        if finite.size:
            self.low, self.high = min(self.low, float(finite.min())), max(self.high, float(finite.max()))

    def __str__(self) -> str:
        types = ", ".join(sorted(self.types))
        count = "1 image holds" if self.images == 1 else f"{self.images:,} images hold"
        return f"{count} {types} from {self.low:g} to {self.high:g}"


def training_range(
    config: DataConfig, train: Images, num_channels: int, recorded: ValueRange | None = None, quiet: bool = False
) -> ValueRange | None:
    """The range that a training uses, by `data.value_range`. Every process finds the same range.

    It looks at some images and warns if they use little of the range.

    Args:
        config: null takes `recorded`, else the range of the dtype; `[low, high]` is taken; "auto" is measured.
        train: the training images.
        num_channels: channels of the tokenizer.
        recorded: the range with which this tokenizer was trained before, if it is trained further.
        quiet: show no warnings and no progress, because another process shows them.

    Raises:
        ConfigError: the values have no range of their own, or all lie outside the configured range.
    """
    if config.value_range is None and recorded is not None:
        return recorded
    if config.value_range == "auto":
        return _measured(train, num_channels, quiet)
    values = survey(train, num_channels, LOOKED_AT)
    if not values.images:
        raise data_problem("dataset", f"none of {len(values.reasons)} images can be used: {_few(values.reasons)}")
    found = _configured(config, values)
    if found is None:
        _require_own_range(values, config.max_skipped_fraction)
    elif values.high < found.low or values.low > found.high:
        raise data_problem("value_range", f"received {config.value_range}, but {values}; {_advice(values)}")
    if not quiet:
        _warn(values, found)
    return found


def survey(source: Images, num_channels: int, count: int, progress: bool = False) -> Values:
    """The values of at most `count` images, spread evenly over a split. A stream gives its first images.

    Args:
        source: the images.
        num_channels: channels of the tokenizer, by which the channels of stored arrays are recognised.
        count: largest number of images.
        progress: show a progress bar.
    """
    values = Values()
    total = count if source.num_images is None else min(count, source.num_images)
    images = peek(source, count)
    for _, encoded, _ in tqdm(images, total=total, desc="measuring values", unit="image", disable=not progress):
        values.add(encoded, num_channels)
    return values


def measured_once(path: Path, config: DataConfig) -> ValueRange | None:
    """The range that "auto" measured at the start of a run in this folder; None if there is none."""
    if config.value_range != "auto" or not (path / FILE_NAME).is_file():
        return None
    stored = read_json(path / FILE_NAME)
    return read_range(stored.get("value_range"), stored.get("value_range_of_bytes") is True)


def save_measured(path: Path, config: DataConfig, found: ValueRange | None) -> None:
    """Keeps a range that "auto" measured, so that a resumed run does not measure it again."""
    if config.value_range == "auto" and found is not None:
        write_json(path / FILE_NAME, {"value_range": [found.low, found.high], "value_range_of_bytes": found.of_bytes})


def _configured(config: DataConfig, values: Values) -> ValueRange | None:
    try:
        return read_range(config.value_range, config.value_range is not None and values.of_bytes)
    except ValueError as error:  # numbers that are too large, or too close to each other
        raise data_problem("value_range", str(error).removeprefix("value_range: ")) from error


def _measured(train: Images, num_channels: int, quiet: bool) -> ValueRange:
    values = survey(train, num_channels, MEASURED, progress=not quiet)
    if not values.low < values.high:
        found = str(values) if values.images else f"no image can be used: {_few(values.reasons)}"
        raise data_problem("value_range", f"received 'auto', but {found}; give [lowest, highest]")
    if not quiet:
        _warn(values, ValueRange(values.low, values.high))
        which = "the first" if not isinstance(train, ImageSource) else "evenly spread"
        share = f" ({which} of {train.num_images:,})" if train.num_images and train.num_images > MEASURED else ""
        print(f"data.value_range auto: {values}{share}; the tokenizer keeps this range")
    return ValueRange(values.low, values.high, values.of_bytes)


def _require_own_range(values: Values, max_skipped_fraction: float) -> None:
    if values.without_range > max_skipped_fraction * values.images:
        reason = "such numbers have no range of their own"
        raise data_problem("value_range", f"received null, but {values}; {reason}; {_advice(values)}")


def _warn(values: Values, found: ValueRange | None) -> None:
    """Warns of a set that uses few of the 256 levels, and of 8-bit images for which the range does not hold."""
    low, high = found[:2] if found else (0, 1 if values.types.keys() == {"bool"} else 255 if values.of_bytes else 65535)
    levels = round(255 * (min(values.high, high) - max(values.low, low)) / (high - low)) + 1
    if values.low < values.high and levels < FEW_LEVELS and (found or not values.without_range):
        which = "data.value_range" if found else "that of their type"
        logger.warning(
            "the training images use %d of 256 levels: %s, and the range is [%g, %g], %s; %s",
            *(levels, values, low, high, which, _advice(values)),
        )
    count = sum(values.types[name] for name in BYTES)
    if found and count and not values.of_bytes:
        message = "%d of %d images have 8 bits: data.value_range is not for them, their 0 is black and their 255 white"
        logger.warning(message, count, values.images)


def _few(reasons: list[str]) -> str:
    return "; ".join(reasons[:3]) + ("; …" if len(reasons) > 3 else "")


def _advice(values: Values) -> str:
    if not values.low < values.high:
        return "set data.value_range to the values that shall be black and white"
    return f"set data.value_range to [{values.low:g}, {values.high:g}] or a range you know, or to 'auto'"
