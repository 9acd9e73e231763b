"""The number of images that can be sampled at once in the memory of a device."""

import torch
from transformers import PreTrainedModel

from configs.memory import USABLE, free_memory
from stage2_prior.sampling.decoder import EagerDecoder
from stage2_prior.vocabulary import Family

# Larger batches are not faster per image: attention dominates, and its work is proportional to the number of images.
LARGEST_BATCH = {"cpu": 64, "cuda": 256}

# A step holds this many 8-byte numbers at once for each image and each code: logits, probabilities, random numbers.
NUMBERS_PER_CODE = 10

# A forward of a masked prior holds this many features of a token at once, as multiples of its width, and as many copies
# of its logits.
FEATURES_AT_ONCE, LOGITS_AT_ONCE = 24, 5


def batch_size_that_fits(prior: PreTrainedModel, length: int, rows_per_image: int, family: Family = "causal") -> int:
    """The number of images to sample at once, at least 1.

    Args:
        prior: language model, on its device.
        length: tokens of a sequence.
        rows_per_image: see `SamplingOptions.rows_per_image`.
        family: "causal" or "masked".
    """
    device = prior.device
    if family == "masked":
        each = rows_per_image * length * forward_bytes_per_token(prior)
    else:
        each = rows_per_image * length * bytes_per_token(prior) + 8 * NUMBERS_PER_CODE * prior.config.vocab_size
    return max(1, min(LARGEST_BATCH.get(device.type, 64), int(USABLE * free_memory(device)) // each))


def forward_bytes_per_token(prior: PreTrainedModel) -> int:
    """Bytes of one token in a forward of a masked prior, and of its logits in a step."""
    config = prior.config
    return prior.dtype.itemsize * FEATURES_AT_ONCE * config.hidden_size + 4 * LOGITS_AT_ONCE * config.vocab_size


@torch.inference_mode()
def bytes_per_token(prior: PreTrainedModel) -> int:
    """Bytes of the keys and values of one token in the cache."""
    decoder = EagerDecoder(prior, 1, 1)
    decoder.read(slice(0, 1), torch.zeros(1, 1, dtype=torch.int64, device=prior.device), 0)
    return sum(buffer.nbytes for buffer in decoder.cache.buffers(slice(0, 1)))
