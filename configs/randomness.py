"""Counter-based random numbers: each is a hash of its counters (seed, position, …), so earlier draws do not change it.

Both stages take all random numbers from here: `uniform`, `exponential` and `uniform_rows` for images and codes,
`seed_from` and `draw_seeds` for seeds of torch's generators.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", for the idea; the mixing function is
SplitMix64's (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
"""

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from configs.arguments import described

# Data loaders use numpy arrays: for a few numbers, numpy takes a third of the time of torch.
Numbers = TypeVar("Numbers", Tensor, np.ndarray)

# Unsigned 64-bit constants, written as the signed integers of torch. Products wrap around in the same way.
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


def uniform(*counters: Numbers) -> Numbers:
    """Uniform random numbers in (0, 1), one for each combination of counters.

    Args:
        counters: int64 tensors or arrays, which are broadcast against each other.

    Returns:
        float64 with 52 random bits; float32 with 23 bits on devices without float64.
    """
    state = mix(counters[0])
    for counter in counters[1:]:
        state = mix(state ^ mix(counter))
    # Half a step is added, so that no value is 0 or 1. All values are exact.
    if isinstance(state, np.ndarray):
        return (_shift_right(state, 12) + 0.5) * 2.0**-52
    dtype, bits = (torch.float32, 23) if state.device.type == "mps" else (torch.float64, 52)
    return (_shift_right(state, 64 - bits).to(dtype) + 0.5) * 2.0**-bits


def uniform_rows(seed: int, counters: np.ndarray, count: int) -> np.ndarray:
    """Rows of random numbers, one row for each image. A row is a hash of the seed and of its counters.

    A numpy generator for each row would be slower: a tenth of the time to decode a JPEG of 384×288 pixels.

    Args:
        seed: integer, at least 0.
        counters: int64 `(n, k)`, at least 0.
        count: numbers in a row.

    Returns:
        float64 `(n, count)`, uniform in [0, 1).
    """
    state = mix(np.full(len(counters), seed, dtype=np.int64))
    for counter in counters.astype(np.int64).T:
        state = mix(state ^ counter)
    draws = mix(state[:, None] ^ np.arange(count))
    return _shift_right(draws, 11) * 2.0**-53


def exponential(*counters: Tensor) -> Tensor:
    """Exponentially distributed float32 (mean 1), above 0, one for each combination of int64 counters."""
    return -uniform(*counters).log().float()


def seed_from(*numbers: int) -> int:
    """Combines numbers into one 63-bit seed, which depends on all of them and on their order."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return mixed


def draw_seeds(count: int, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
    """Draws one seed for each image.

    Args:
        count: number of images.
        generator: one generator for all seeds, a list with one for each image, or None for torch's global generator.

    Returns:
        int64 `(count,)`, on the CPU.

    Raises:
        ValueError: `generator` is no generator, or a list of another length.
    """
    if isinstance(generator, (list, tuple)):
        if len(generator) != count:
            raise ValueError(f"generator: received a list of {len(generator)} for {count} images; needs one each")
        if all(isinstance(one, torch.Generator) for one in generator):
            return torch.cat([draw_seeds(1, one) for one in generator])
    if not isinstance(generator, torch.Generator | None) or getattr(generator, "device", None) == torch.device("meta"):
        allowed = "needs a torch.Generator (with manual_seed), or a list with one for each image"
        raise ValueError(f"generator: received {described(generator)}; {allowed}")
    device = generator.device if generator is not None else "cpu"
    return torch.randint(2**63 - 1, (count,), generator=generator, device=device).cpu()


def _shift_right(x: Numbers, bits: int) -> Numbers:
    shifted = x >> bits
    shifted &= (1 << (64 - bits)) - 1
    return shifted
