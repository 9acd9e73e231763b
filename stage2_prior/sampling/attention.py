"""Attention of one token that reads only the written places of the cache, registered in transformers' interface."""

import logging
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from stage2_prior.compat import attention_of, uses_attention_interface
from stage2_prior.sampling.cache import PreallocatedCache
from stage2_prior.sampling.decoder import forward

# The name of this attention in the configuration of a model.
NAME = "tessella_decode"

# Models pass these arguments to every attention. They do not change the result of one query in evaluation mode.
HARMLESS = {"is_causal", "output_attentions", "output_hidden_states", "position_ids", "use_cache"}

logger = logging.getLogger(__name__)


class UnknownAttentionError(NotImplementedError):
    """The kernel does not support the attention of this model."""


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
    """Attention of one query, with the arguments that transformers passes.

    Args:
        module: the attention layer, unused.
        query: `(R, heads, 1, width)`.
        key, value: `(R, key-value heads, places, width)`.
        attention_mask: not a mask, but the last place to attend to, int64 `(1, 1, 1, 1)`. It has four dimensions,
            because models pass such tensors on unchanged.
        scaling: factor of the scores; None is width^-½.
        dropout: must be 0.
        settings: soft caps, sinks, sliding windows and the like must be absent or None.

    Raises:
        UnknownAttentionError: the kernel does not support these arguments or shapes.
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
    """Replaces the attention of a model by `decode_attention` if the kernel supports it; otherwise logs the reason.

    Returns:
        Whether the attention was replaced. If so, the forward takes one token of each row and, as `attention_mask`, the
        place of this token, int64 `(1, 1, 1, 1)`.
    """
    before = attention_of(model)
    cache = PreallocatedCache(model.config.num_hidden_layers, 1, 1, model.device)
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    try:
        if find_spec("triton") is None:
            raise UnknownAttentionError("triton is not installed")
        if not uses_attention_interface(model):
            raise UnknownAttentionError("the model does not use transformers' attention interface")
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
