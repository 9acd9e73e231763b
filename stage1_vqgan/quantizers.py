"""All kinds of quantizers, by their names in a configuration.

To add a quantizer: write a subclass of `Quantizer` with its options in a file quantizer_NAME.py, and add one line to
`QUANTIZERS`. Configuration, training, tokenization and saving then support it. quantizer_fsq.py is the shortest
example; quantizer_base.py documents the methods.
"""

from collections.abc import Iterator
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, get_type_hints

from huggingface_hub.dataclasses import type_validator

from .quantizer_base import CodebookQuantizer, Quantizer, QuantizerBase, QuantizerOptions, QuantizerOutput, nearest_code
from .quantizer_bsq import BSQuantizer
from .quantizer_ema import EMAQuantizer
from .quantizer_fsq import FSQuantizer
from .quantizer_grids import Grids, codes_shape, grids_text, num_codes
from .quantizer_gumbel import GumbelQuantizer
from .quantizer_ibq import IBQuantizer
from .quantizer_lfq import LFQuantizer
from .quantizer_product import ProductQuantizer
from .quantizer_pyramid import PyramidQuantizer
from .quantizer_residual import ResidualQuantizer
from .quantizer_simvq import SimVQuantizer
from .quantizer_vq import VectorQuantizer

# `VQGANConfig.quantizer` → class.
QUANTIZERS: dict[str, type[QuantizerBase]] = {
    "vq": VectorQuantizer,
    "ema": EMAQuantizer,
    "simvq": SimVQuantizer,
    "ibq": IBQuantizer,
    "gumbel": GumbelQuantizer,
    "fsq": FSQuantizer,
    "lfq": LFQuantizer,
    "bsq": BSQuantizer,
    "residual": ResidualQuantizer,
    "product": ProductQuantizer,
    "pyramid": PyramidQuantizer,
}


def option_problems(
    name: str, values: dict[str, Any], num_embeddings: int, embed_dim: int
) -> Iterator[tuple[str, Any, str]]:
    """Every invalid field of a quantizer's configuration, as `(field of VQGANConfig, value received, what is allowed)`.

    Args:
        name: `VQGANConfig.quantizer`.
        values: `VQGANConfig.quantizer_options`.
        num_embeddings: K.
        embed_dim: D.
    """
    if name not in QUANTIZERS:
        yield "quantizer", name, f"must be one of {', '.join(QUANTIZERS)}"
        return
    kind = QUANTIZERS[name].Options
    hints = {field.name: get_type_hints(kind)[field.name] for field in fields(kind)}
    wrong = False
    for option, value in values.items():
        if option not in hints:
            wrong = True
            nearest = "".join(f"; did you mean '{match}'?" for match in get_close_matches(str(option), hints, n=1))
            yield f"quantizer_options.{option}", value, f"unknown, {name} has {', '.join(hints)}{nearest}"
        elif not _fits(value, hints[option]):
            wrong = True
            words = {bool: "true or false", int: "a whole number", float | int: "a number"}
            allowed = f"must be {words.get(hints[option], 'a list of whole numbers')}"
            yield f"quantizer_options.{option}", value, allowed
    if wrong:
        return
    for field, value, allowed in kind(**values).problems(num_embeddings, embed_dim):
        yield f"quantizer_options.{field}" if field in hints else field, value, allowed


def build_quantizer(name: str, num_embeddings: int, embed_dim: int, options: dict[str, Any]) -> QuantizerBase:
    """Builds a quantizer; the arguments are the fields of [`VQGANConfig`]."""
    return QUANTIZERS[name](num_embeddings, embed_dim, build_options(name, options))


def build_options(name: str, options: dict[str, Any]) -> QuantizerOptions:
    """The options of a quantizer; the arguments are the fields of [`VQGANConfig`]."""
    return QUANTIZERS[name].Options(**options)


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(value, bool) and hint is not bool:  # Python counts True as the number 1
        return False
    try:
        type_validator("", value, hint)
    except TypeError:
        return False
    return True


__all__ = [
    "QUANTIZERS",
    "CodebookQuantizer",
    "Grids",
    "Quantizer",
    "QuantizerBase",
    "QuantizerOutput",
    "VectorQuantizer",
    "build_options",
    "build_quantizer",
    "codes_shape",
    "grids_text",
    "nearest_code",
    "num_codes",
    "option_problems",
]
