"""All calls of non-public functions of torch and transformers in this package.

tests/stage2_prior/test_compat.py fails when one of them changes.
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback


def cache_argument(prior: PreTrainedModel) -> str:
    """The name of the argument of `prior.forward` that takes the cache of keys and values.

    It is `past_key_values` until transformers renames it to `cache` for the model. transformers 5.40 removes the old
    name.
    """
    base: Any = prior.get_base_model() if hasattr(prior, "get_base_model") else prior  # type: ignore[operator]
    return _cache_argument(type(base))  # type: ignore[arg-type]


@lru_cache
def _cache_argument(model_class: type[PreTrainedModel]) -> str:
    return "cache" if "cache" in inspect.signature(model_class.forward).parameters else "past_key_values"


def uses_attention_interface(prior: PreTrainedModel) -> bool:
    """Whether the model looks its attention up in `transformers.AttentionInterface`."""
    return bool(prior._supports_attention_backend)


def attention_of(prior: PreTrainedModel) -> str:
    """The name of the attention implementation of the model, for instance "sdpa"."""
    return str(prior.config._attn_implementation)


def without_data() -> AbstractContextManager[Any]:
    """Inside this context, tensors have shapes but no data, so a forward takes no memory and computes nothing."""
    from torch._subclasses import FakeTensorMode

    return FakeTensorMode()


def tracker_of(callback: TrainerCallback) -> Any:
    """The module wandb or trackio of a callback of Trainer, with the run that Trainer has opened; None for others."""
    return getattr(callback, "_wandb", None) or getattr(callback, "_trackio", None)


def trace(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    """Records the operations of `function(*inputs)` as a TorchScript function.

    Not `torch.jit.trace`: it holds the weights of every recording in memory until the process ends.
    """
    graph, _ = torch.jit._get_trace_graph(function, inputs)
    return torch._C._create_function_from_graph("recorded", graph)


def allow_recompiles(limit: int) -> AbstractContextManager[Any]:
    """Inside this context, torch.compile compiles up to `limit` versions of one function; the default is 8."""
    return torch._dynamo.config.patch(recompile_limit=limit)
