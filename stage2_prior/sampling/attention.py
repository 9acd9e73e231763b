"""An attention for one token that reads exactly the places that have been written, behind transformers' interface."""

import logging
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from stage2_prior.compat import attention_of, uses_attention_interface
from stage2_prior.sampling.cache import PreallocatedCache
from stage2_prior.sampling.decoder import forward

# The name of the attention in a model's configuration.
NAME = "tessella_decode"

# Settings that models pass to every attention, and that change nothing for one query of a model in evaluation mode.
HARMLESS = {"is_causal", "output_attentions", "output_hidden_states", "position_ids", "use_cache"}

logger = logging.getLogger(__name__)


class UnknownAttentionError(NotImplementedError):
    """The kernel does not compute the attention of this model."""


def decode_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attention of one query, as transformers calls it.

    Args:
        module: the attention layer, unused.
        query: `(R, heads, 1, width)`.
        key, value: `(R, key-value heads, places, width)`.
        attention_mask: not a mask, but the last place that is seen, int64 `(1, 1, 1, 1)`. Models hand tensors of four
            dimensions on unchanged.
        scaling: of the scores; None is width^-½.
        dropout: must be 0.
        settings: soft caps, sinks, sliding windows and the like must be absent or None.

    Raises:
        UnknownAttentionError: the kernel does not compute such an attention.
    """
    from stage2_prior.sampling.attention_kernel import attend, fits

    unknown = sorted(name for name, setting in settings.items() if setting is not None and name not in HARMLESS)
    if unknown or dropout:
        raise UnknownAttentionError(f"its attention has {', '.join(unknown) or 'dropout'}")
    if not fits(query, key, value):
        raise UnknownAttentionError(
            f"queries {tuple(query.shape)} and keys {tuple(key.shape)} do not fit one program of the kernel"
        )
    return attend(query, key, value, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling), None


AttentionInterface.register(NAME, decode_attention)


def use_decode_attention(model: PreTrainedModel) -> bool:
    """Gives a model `decode_attention` if its attention is plain; otherwise a warning says why it keeps its own.

    Returns:
        Whether the model has it now. Its forward then takes one token of each row, and the place of that token, int64
        `(1, 1, 1, 1)`, as `attention_mask`.
    """
    before = attention_of(model)
    cache = PreallocatedCache(model.config.num_hidden_layers, 1, 1, model.device)
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    try:
        if find_spec("triton") is None:
            raise UnknownAttentionError("triton is not installed")
        if not uses_attention_interface(model):
            raise UnknownAttentionError("it does not use transformers' attention interface")
        model.set_attn_implementation(NAME)
        with torch.inference_mode():
            opened = cache.open_at(slice(0, 1), token[0], 1)
            forward(model, token, opened, position_ids=token, attention_mask=token[None, None])
    except UnknownAttentionError as error:
        model.set_attn_implementation(before)
        logger.warning(
            "attention of this %s reads a window of the cache, more than has been written: %s",
            model.config.model_type,
            error,
        )
        return False
    return True
