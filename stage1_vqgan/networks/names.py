"""The names of frozen networks. Settings are checked with it, before torch is imported."""

import re
from collections.abc import Iterator
from pathlib import Path

SINGLE = ("efficientnet-lite0", "pixels")  # whose names have no second part
FAMILIES = ("torchvision", "timm", "transformers", "stlpips", *SINGLE)
ALLOWED = (
    "torchvision/<model>, timm/<model>, transformers/<Hub id or folder>, efficientnet-lite0, stlpips/alex, stlpips/vgg "
    "or pixels, each with @ and a size behind it for images of another size"
)


def name_problems(key: str, name: str) -> Iterator[tuple[str, str, str]]:
    """The problem of a setting that names a network, in the form of a section's `problems`."""
    try:
        split_name(name)
    except ValueError:
        yield key, name, f"allowed are {ALLOWED}"


def weights_problems(key: str, weights: str) -> Iterator[tuple[str, str, str]]:
    """The problem of a setting that names the weights of a network, in the form of a section's `problems`."""
    is_of_torchvision = re.fullmatch(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+", weights)
    if weights not in ("pretrained", "random") and not is_of_torchvision and not Path(weights).is_file():
        allowed = "'pretrained', a file with the weights, a name of torchvision such as 'IMAGENET1K_V1', or 'random'"
        yield key, weights, f"there is no such file; allowed are {allowed}"


def split_name(name: str) -> tuple[str, str, int | None]:
    """Family, model and size of images: "timm/resnet18@64" is ("timm", "resnet18", 64).

    Raises:
        ValueError: the name has another form.
    """
    known, _, digits = name.rpartition("@")
    size = int(digits) if known and digits.isdecimal() else None
    family, _, model = (known if size else name).partition("/")
    if family not in FAMILIES or bool(model) == (family in SINGLE):
        raise ValueError(f"received {name!r}; allowed are {ALLOWED}")
    return family, model, size
