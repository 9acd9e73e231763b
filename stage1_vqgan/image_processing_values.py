"""Pixel values of any type → 256 levels, by one range for all images of a data set."""

import math
from typing import Any, NamedTuple

import numpy as np

LARGEST_VALUE = 1e30  # float32 computes with it
ADVICE = "give a value_range, the values that become black and white (in training data.value_range)"


class ValueRange(NamedTuple):
    """The pixel values that become black and white. All images of a data set share one range.

    Attributes:
        low: the value that becomes level 0; lower values become 0 too.
        high: the value that becomes level 255; higher values become 255 too.
        of_bytes: whether the range holds for 8-bit images too. If it does not, they are ordinary pictures, in which 0
            is black and 255 white.
    """

    low: float
    high: float
    of_bytes: bool = False


def to_levels(values: np.ndarray, value_range: ValueRange | None = None) -> np.ndarray:
    """Converts pixel values to levels. The values of an image decide nothing, so all images are treated alike.

    Args:
        values: numbers of any shape.
        value_range: the values that become 0 and 255; those between become the nearest level. None takes the range of
            the dtype: false to true, 0 to 255 (uint8), or 0 to 65535 (uint16).

    Returns:
        uint8, of the same shape.

    Raises:
        ValueError: the values are not numbers, one is not finite, or the dtype has no range of its own.
    """
    if values.dtype.kind not in "buif":
        raise ValueError("image: received rows of different lengths, or values that are no numbers")
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype == np.uint8 and not (value_range and value_range.of_bytes):
        return values
    if value_range is None:
        if values.dtype != np.uint16:
            raise ValueError(f"image: received {described(values)}; such numbers have no range of their own: {ADVICE}")
        return ((values.astype(np.int32) + 128) // 257).astype(np.uint8)
    if not np.isfinite(values).all():
        raise ValueError("image: received values that are NaN or infinite; replace them by numbers")
    scaled = (values.astype(np.float64) - value_range.low) * (255 / (value_range.high - value_range.low))
    return np.rint(scaled.clip(0, 255)).astype(np.uint8)


def described(values: np.ndarray) -> str:
    """The type and the range of values, in words."""
    return f"{values.dtype} from {values.min():g} to {values.max():g}" if values.size else f"no {values.dtype}"


def read_range(value: Any, of_bytes: bool = False) -> ValueRange | None:
    """The range that a configuration gives as `[low, high]`, or None.

    Raises:
        ValueError: it has another form, or `low` is not below `high`.
    """
    if value is None:
        return None
    is_pair = isinstance(value, list | tuple) and len(value) == 2 and {type(bound) for bound in value} <= {int, float}
    if not is_pair or not all(abs(bound) <= LARGEST_VALUE for bound in value) or not value[0] < value[1]:
        received = repr(value)[:60] if isinstance(value, list | tuple | str | float) else type(value).__name__
        raise ValueError(f"value_range: received {received}; needs two numbers [low, high], low below high")
    low, high = map(float, value)
    if not math.isfinite(255 / (high - low)):
        raise ValueError(f"value_range: received {value!r}; the two numbers are too close to each other")
    return ValueRange(low, high, of_bytes)


__all__ = ["ValueRange", "described", "read_range", "to_levels"]
