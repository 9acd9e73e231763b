"""Token dropout, as in LlamaGen: in training, some values of the token embeddings that a prior reads are 0."""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import dropout


def add_token_dropout(prior: Any, probability: float) -> None:
    """Adds dropout to the token embeddings of a prior, for as long as this object lives. No saved file shows it.

    Each value of an embedding becomes 0 with this probability, and the others are divided by 1 - probability. This
    holds for conditions and codes alike, and in training mode only.

    Args:
        prior: a language model, with or without adapters; changed in place.
        probability: from 0 to below 1; 0 changes nothing.
    """

    def drop(embedding: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return dropout(output, probability, embedding.training)

    if probability:
        prior.get_input_embeddings().register_forward_hook(drop)
