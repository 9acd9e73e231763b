"""Whether a prior is still what it was when something was recorded from it."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


def state_of(prior: PreTrainedModel) -> tuple[Any, ...]:
    """Equal as long as the prior computes the same: its weights have not been written, moved or replaced, and no module
    has another setting (training mode, adapters switched on or off or scaled)."""
    weights = tuple((weight.data_ptr(), weight.dtype, _writes(weight)) for weight in prior.parameters())
    settings = tuple(
        (name, str(value)) for module in prior.modules() for name, value in vars(module).items() if _is_plain(value)
    )
    return weights, settings, prior.config._attn_implementation


def _writes(weight: Tensor) -> int:
    """How often a tensor has been written; those made in inference mode do not count it."""
    return 0 if weight.is_inference() else weight._version


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple | set):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
