"""Checks safetensors files: what they hold according to their headers, and whether it fits a model.

A header tells how large a model is, so a wrong configuration is refused before a model of its size is built.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from configs.problems import listed, one_line

FLOATS = {"F64", "F32", "F16", "BF16"}


class Stored(NamedTuple):
    """A tensor of a file: its shape, and its dtype as safetensors names it, for instance "F32"."""

    shape: tuple[int, ...]
    dtype: str


def read_header(path: str | Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, without their values.

    Raises:
        ValueError: the file is damaged, or in another format.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: Stored(tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except SafetensorError as error:
        reason = str(error).rpartition("header: ")[2]
        raise ValueError(
            f"{path}: this weights file is damaged, or is not a safetensors file ({reason}); save or download it again"
        ) from error


def read_headers(paths: Iterable[Path]) -> dict[str, Stored]:
    """The tensors of all shards of a model.

    Raises:
        ValueError: a file is damaged, or two files hold a tensor of the same name.
    """
    found: dict[str, Stored] = {}
    for path in paths:
        header = read_header(path)
        if twice := header.keys() & found.keys():
            raise ValueError(f"{path}: another file of this model holds these tensors too: {listed(sorted(twice))}")
        found |= header
    return found


def size(tensors: Mapping[str, Stored]) -> int:
    """The number of values in all tensors."""
    return sum(math.prod(tensor.shape) for tensor in tensors.values())


def require_fit(
    stored: Mapping[str, Stored], expected: Mapping[str, Any], where: str | Path, model: str = "config.json"
) -> None:
    """Compares a file with the tensors of a model: names, shapes, and whether values are floating-point.

    Args:
        stored: tensors of the file.
        expected: tensors of the model; they may be on the device "meta".
        where: file or folder for the message.
        model: what describes the model, for the message.

    Raises:
        ValueError: names the first tensors that are missing, unexpected, or of another shape or dtype.
    """
    both = [name for name in expected if name in stored]
    shapes = {name: tuple(expected[name].shape) for name in both}
    dtypes = [name for name in both if expected[name].is_floating_point() != (stored[name].dtype in FLOATS)]
    require_none(
        where,
        model,
        missing=[name for name in expected if name not in stored],
        unexpected=[name for name in stored if name not in expected],
        misshapen=[
            f"{name} {stored[name].shape}, needed {shapes[name]}" for name in both if stored[name].shape != shapes[name]
        ],
        wrong_dtype=[f"{name} {stored[name].dtype}" for name in dtypes],
    )


def require_none(where: str | Path, model: str, **misfits: Collection[str]) -> None:
    """Raises ValueError if a list of misfits is not empty; the message counts them and shows the first ones."""
    found = [f"{len(names):,} {kind.replace('_', ' ')}: {listed(names)}" for kind, names in misfits.items() if names]
    if found:
        raise ValueError(
            f"{where}: the weights do not fit {model}: {'; '.join(found)}; save or download the folder again"
        )


def require_finite(tensors: Iterable[tuple[str, Any]], where: str | Path) -> None:
    """Refuses weights that hold infinite values or "not a number". It reads every value once, and copies none.

    Args:
        tensors: pairs of a name and a tensor.
        where: file or folder for the message.

    Raises:
        ValueError: names the first tensors with such values.
    """
    wrong = [name for name, value in tensors if value.is_floating_point() and not _is_finite(value)]
    if wrong:
        raise ValueError(
            f"{where}: these weights hold values that are not finite: {listed(wrong)}; save or download the folder "
            "again, or load it in a wider dtype"
        )


def _is_finite(value: Any) -> bool:
    # the extremes of values that are not all finite are not finite either
    return not value.numel() or all(map(math.isfinite, (float(extreme) for extreme in value.aminmax())))


@contextmanager
def in_our_words(where: str | Path) -> Iterator[None]:
    """Turns what a library raises while it reads `where` into ValueError; each architecture has its own exceptions.

    Raises:
        MemoryError, OSError: as raised inside.
        ValueError: the message is one line.
    """
    try:
        yield
    except (MemoryError, OSError):
        raise
    except Exception as error:
        reason = one_line(str(error).rpartition("Error: ")[2] or type(error).__name__, 800)
        raise ValueError(f"{where}: this cannot be loaded: {reason}") from error
