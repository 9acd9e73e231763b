"""Decoding with an attention that reads exactly the positions that are there, behind transformers' interface."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from stage2_prior.sampling.cache import PreallocatedCache

# The name that models find the attention by.
NAME = "tessella_decode"

# What models tell any attention, and changes nothing for one query in a model that is not trained.
HARMLESS = {"is_causal", "output_attentions", "output_hidden_states", "position_ids", "use_cache"}

logger = logging.getLogger(__name__)


class UnknownAttentionError(NotImplementedError):
    """A model's attention is not plain softmax attention of heads that fit the kernel."""


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

    `attention_mask` is not one: it holds the last position that is seen, int64 `(1, 1, 1, 1)`, because models pass on
    what has four dimensions as it is. `settings` (soft caps, sinks, sliding windows and the like) must be known.

    Raises:
        UnknownAttentionError: this is the one place that decides which models keep attention over windows.
    """
    from stage2_prior.sampling.attention_kernel import attend, fits

    unknown = sorted(name for name, setting in settings.items() if setting is not None and name not in HARMLESS)
    if unknown or dropout:
        raise UnknownAttentionError(f"its attention has {', '.join(unknown) or 'dropout'}")
    if not fits(query, key, value):
        raise UnknownAttentionError(f"queries {tuple(query.shape)} of keys {tuple(key.shape)} do not fit a program")
    return attend(query, key, value, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling), None


AttentionInterface.register(NAME, decode_attention)


@contextmanager
def decoding(prior: PreTrainedModel) -> Iterator[None]:
    """Forwards of the model have `decode_attention`."""
    before = prior.config._attn_implementation
    prior.config._attn_implementation = NAME
    try:
        yield
    finally:
        prior.config._attn_implementation = before


@torch.inference_mode()
def attends_plainly(prior: PreTrainedModel, forward: Callable[..., Tensor]) -> bool:
    """Whether a model can decode with `decode_attention`; it is tried for one token. If not, there is a warning.

    Args:
        prior: the model.
        forward: `forward(prior, tokens, cache, **inputs)`, logits.
    """
    token = torch.zeros(1, 1, dtype=torch.int64, device=prior.device)
    cache = PreallocatedCache(prior, 1, 1).open_window(slice(0, 1), token[0], 1)
    try:
        if find_spec("triton") is None:
            raise UnknownAttentionError("triton is not installed")
        if not prior._supports_attention_backend:
            raise UnknownAttentionError("it does not use transformers' attention interface")
        with decoding(prior):
            forward(prior, token, cache, position_ids=token, attention_mask=token[None, None])
    except UnknownAttentionError as error:
        logger.warning("attention of a %s reads more positions than are there: %s", prior.config.model_type, error)
        return False
    return True
