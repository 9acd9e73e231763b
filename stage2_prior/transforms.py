"""The names of the transforms that make a condition image from the image itself; condition_images.py applies them."""

from typing import NamedTuple

# What the number of each transform must be; "" if the transform takes none.
TRANSFORMS = {
    "downscale": "a whole number from 2 up, such as 'downscale 4'",
    "gray": "",
    "edges": "",
    "mask": "a share above 0 and below 1, such as 'mask 0.5'",
}


class Transform(NamedTuple):
    """A transform.

    Attributes:
        name: "downscale", "gray", "edges" or "mask".
        amount: the factor of "downscale", the share of "mask"; 0 for the others.
    """

    name: str
    amount: float


def parse_transform(text: str) -> Transform:
    """Reads a transform such as "gray" or "downscale 4".

    Raises:
        ValueError: says which transforms there are, or what the number must be.
    """
    name, _, number = text.partition(" ")
    if name not in TRANSFORMS:
        raise ValueError(f"allowed are {', '.join(TRANSFORMS)}")
    if not TRANSFORMS[name]:
        if number:
            raise ValueError(f"{name} takes no number; write {name!r}")
        return Transform(name, 0)
    try:
        amount = float(number)
    except ValueError:
        amount = 0.0
    is_right = amount >= 2 and amount.is_integer() if name == "downscale" else 0 < amount < 1
    if not is_right or amount > 2**16:
        raise ValueError(f"{name} needs {TRANSFORMS[name]}")
    return Transform(name, amount)
