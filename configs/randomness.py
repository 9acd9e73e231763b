"""Counter-based random numbers: a number depends only on its key, not on what was drawn before or beside it.

All randomness of both stages comes from here: draws of images and codes from `uniform`, `exponential` and
`uniform_rows`; seeds for the generators of torch from `seed_from` and `draw_seeds`.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", for the idea; the mixing function is
SplitMix64's (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
"""

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

# Small arrays of a data loader are numpy's: its operations on a few numbers take a third of the time of torch's.
Numbers = TypeVar("Numbers", Tensor, np.ndarray)

# 64-bit constants as the signed integers torch has; products wrap around as unsigned ones would.
_STEP = -7046029254386353131  # 0x9E3779B97F4A7C15
_FIRST = -4658895280553007687  # 0xBF58476D1CE4E5B9
_SECOND = -7723592293110705685  # 0x94D049BB133111EB


def mix(x: Numbers) -> Numbers:
    """SplitMix64's output function on int64 tensors or arrays."""
    x = x + _STEP
    x ^= _shift_right(x, 30)
    x *= _FIRST
    x ^= _shift_right(x, 27)
    x *= _SECOND
    x ^= _shift_right(x, 31)
    return x


def uniform(*keys: Numbers) -> Numbers:
    """float64 in (0, 1), with 52 random bits, for every combination of int64 keys, which broadcast against each other.

    float32 with 23 bits on devices that have no float64.
    """
    state = mix(keys[0])
    for part in keys[1:]:
        state = mix(state ^ mix(part))
    # half a step is added: every value is exact and neither 0 nor 1
    if isinstance(state, np.ndarray):
        return (_shift_right(state, 12) + 0.5) * 2.0**-52
    dtype, bits = (torch.float32, 23) if state.device.type == "mps" else (torch.float64, 52)
    return (_shift_right(state, 64 - bits).to(dtype) + 0.5) * 2.0**-bits


def uniform_rows(seed: int, keys: np.ndarray, count: int) -> np.ndarray:
    """Random numbers for images: each row is a hash of the seed and of its key alone.

    A numpy generator for each key would take a tenth of the time that a JPEG of 384×288 pixels takes to decode.

    Args:
        seed: any integer from 0 up.
        keys: int64 `(n, k)`, not negative.
        count: numbers in a row.

    Returns:
        float64 `(n, count)`, uniform in [0, 1).
    """
    state = mix(np.full(len(keys), seed, dtype=np.int64))
    for part in keys.astype(np.int64).T:
        state = mix(state ^ part)
    draws = mix(state[:, None] ^ np.arange(count))
    return _shift_right(draws, 11) * 2.0**-53


def exponential(*keys: Tensor) -> Tensor:
    """Exponentially distributed float32 (rate 1), above 0, for every combination of int64 keys."""
    return -uniform(*keys).log().float()


def seed_from(*numbers: int) -> int:
    """One 63-bit seed that depends on all of several numbers and on their order."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return mixed


def draw_seeds(count: int, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
    """One int64 seed for each image, `(count,)`.

    Args:
        count: number of images.
        generator: one generator, which draws them all, a list with one for each image, or None for torch's global one.

    Raises:
        ValueError: the list has another length, or this is no generator.
    """
    if isinstance(generator, (list, tuple)):
        if len(generator) != count:
            raise ValueError(f"generator: received a list of {len(generator)} for {count} images; needs one each")
        return torch.cat([draw_seeds(1, one) for one in generator])
    if not isinstance(generator, torch.Generator | None):
        raise ValueError(f"generator: received {generator!r}; needs a torch.Generator (with manual_seed), or a list")
    device = generator.device if generator is not None else "cpu"
    return torch.randint(2**63 - 1, (count,), generator=generator, device=device).cpu()


def _shift_right(x: Numbers, bits: int) -> Numbers:
    shifted = x >> bits
    shifted &= (1 << (64 - bits)) - 1
    return shifted
