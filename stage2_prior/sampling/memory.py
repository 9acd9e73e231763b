"""How many images can be sampled at once in the memory that a device has left."""

from typing import cast

import psutil
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

# More images at once take as much time each: attention, which every image has of its own, is all of it then.
LARGEST_BATCH = {"cpu": 64, "cuda": 256}

# Of what is free; the rest is for activations, and for decoding the codes.
USABLE = 0.6

# Numbers of 8 bytes that a step has at once for each code of each image: logits, probabilities, random numbers.
NUMBERS_PER_CODE = 10


def batch_size_that_fits(prior: PreTrainedModel, length: int, guided: bool) -> int:
    """Images to sample at once, at least 1.

    Args:
        prior: causal language model, on its device.
        length: tokens of a sequence.
        guided: whether there is an unconditional row beside that of each image.
    """
    device = prior.device
    each = (2 if guided else 1) * length * bytes_per_token(prior) + 8 * NUMBERS_PER_CODE * prior.config.vocab_size
    return max(1, min(LARGEST_BATCH.get(device.type, 64), int(USABLE * free_memory(device)) // each))


@torch.no_grad()
def bytes_per_token(prior: PreTrainedModel) -> int:
    """Of the keys and values that a token leaves in the cache."""
    cache = DynamicCache()
    prior(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=prior.device), past_key_values=cache, use_cache=True)
    states = [state for layer in cast(list[DynamicLayer], cache.layers) for state in (layer.keys, layer.values)]
    return sum(state.nbytes for state in states if state is not None)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + cached
