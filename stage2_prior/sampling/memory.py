"""How many images a device has the memory to sample at once."""

import torch
from transformers import PreTrainedModel

from configs.memory import USABLE, free_memory
from stage2_prior.sampling.decoder import EagerDecoder

# Larger batches take as much time for each image: attention dominates, and no two images share its work.
LARGEST_BATCH = {"cpu": 64, "cuda": 256}

# Numbers of 8 bytes that a step holds at once for each image and each code: logits, probabilities, random numbers.
NUMBERS_PER_CODE = 10


def batch_size_that_fits(prior: PreTrainedModel, length: int, guided: bool) -> int:
    """Images to sample at once, at least 1.

    Args:
        prior: causal language model, on its device.
        length: tokens of a sequence.
        guided: whether each image has an unconditional row as well.
    """
    device = prior.device
    each = (2 if guided else 1) * length * bytes_per_token(prior) + 8 * NUMBERS_PER_CODE * prior.config.vocab_size
    return max(1, min(LARGEST_BATCH.get(device.type, 64), int(USABLE * free_memory(device)) // each))


@torch.inference_mode()
def bytes_per_token(prior: PreTrainedModel) -> int:
    """Bytes of the keys and values that one token leaves in the cache."""
    decoder = EagerDecoder(prior, 1, 1)
    decoder.read(slice(0, 1), torch.zeros(1, 1, dtype=torch.int64, device=prior.device), 0)
    return sum(buffer.nbytes for buffer in decoder.cache.buffers(slice(0, 1)))
