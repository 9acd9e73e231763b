"""Settings of tiny models that several test files train, and a function that lists all tensors of a result."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

VQGAN = {
    "image_size": 16,
    "in_channels": 1,
    "base_channels": 8,
    "channel_multiplier": [1, 1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "norm_num_groups": 4,
    "latent_channels": 8,
    "embed_dim": 4,
    "num_embeddings": 32,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
# wide initialisation, so that the logits of a random prior differ clearly
RANDOM_PRIORS = {
    "llama": {**LLAMA, "initializer_range": 0.3},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3},
    "qwen3": {**LLAMA, "model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3},
}
MASKED_PRIORS = {
    "bert": {**BERT, "initializer_range": 0.3},
    "modernbert": {**BERT, "model_type": "modernbert", "initializer_range": 0.3},
}
DATA = {"dataset": "digits", "augmentation": {"rotate": 10, "translate": 0.06, "scale": 0.1}}


def tensors(value: Any, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor and number inside nested containers, by its path."""
    items: Iterable[tuple[Any, Any]]
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return {} if value is None or isinstance(value, str) else {prefix: torch.as_tensor(value)}
    return {path: leaf for key, item in items for path, leaf in tensors(item, f"{prefix}/{key}").items()}
