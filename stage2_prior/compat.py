"""Every call of a non-public function of torch or transformers that this package needs.

tests/stage2_prior/test_compat.py fails when one of them changes.
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations import WandbCallback


def cache_argument(prior: PreTrainedModel) -> str:
    """The argument of `prior.forward` that takes the keys and values: `cache`, or `past_key_values` before
    transformers 5.2x renamed it for this model. The old name is removed in 5.40."""
    base: Any = prior.get_base_model() if hasattr(prior, "get_base_model") else prior  # type: ignore[operator]  # of peft
    return _cache_argument(type(base))  # type: ignore[arg-type]


@lru_cache
def _cache_argument(model_class: type[PreTrainedModel]) -> str:
    return "cache" if "cache" in inspect.signature(model_class.forward).parameters else "past_key_values"


def uses_attention_interface(prior: PreTrainedModel) -> bool:
    """Whether the model looks its attention up in `transformers.AttentionInterface`."""
    return bool(prior._supports_attention_backend)


def attention_of(prior: PreTrainedModel) -> str:
    """The name of the attention that the model computes with, such as "sdpa"."""
    return str(prior.config._attn_implementation)


def without_data() -> AbstractContextManager[Any]:
    """Inside, tensors have shapes but no memory, so a forward of a model only counts its operations."""
    from torch._subclasses import FakeTensorMode

    return FakeTensorMode()


def log_to_wandb(callback: WandbCallback, name: str, pixels: np.ndarray, step: int) -> None:
    """Logs a picture, uint8 `(H, W, 3)`, to the run of Weights & Biases that Trainer has opened, if it has."""
    if callback._wandb is not None:
        callback._wandb.log({name: callback._wandb.Image(pixels), "train/global_step": step})


def trace(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    """The operations of `function(*inputs)` as one TorchScript function.

    `torch.jit.trace` does the same, but keeps the weights of every recording until the process ends.
    """
    graph, _ = torch.jit._get_trace_graph(function, inputs)
    return torch._C._create_function_from_graph("recorded", graph)


def allow_recompiles(limit: int) -> AbstractContextManager[Any]:
    """Inside, torch.compile compiles up to `limit` versions of one function; its default is 8."""
    return torch._dynamo.config.patch(recompile_limit=limit)
