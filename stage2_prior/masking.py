"""Batches of a code store for a masked language model: some codes are hidden, and the prior learns to find them.

Source: Chang et al. 2022, "MaskGIT: masked generative image transformer", section 3.2, with the cosine schedule.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from configs.randomness import uniform
from stage2_prior.data import IGNORED, CodeDataset

# A counter of its own, so that these random numbers are not those of the condition dropout.
HIDING = 1


@dataclass(frozen=True)
class MaskedCodeDataset(Dataset):
    """Sequences of codes with hidden codes. `__getitems__` reads a whole batch at once, as in `CodeDataset`.

    Args:
        sequences: the sequences for a causal prior, whose conditions these have too.
        seed: a hash of (seed, epoch, row) says which codes are hidden.
    """

    sequences: CodeDataset
    seed: int = 0

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitems__(self, indices: np.ndarray | Sequence[int]) -> dict[str, Tensor]:
        """One batch.

        Args:
            indices: int64 `(B, 2)`, (epoch, row); or `(B,)`, rows of epoch 0. A row below 0 pads the batch; the
                loss ignores it.

        Returns:
            `input_ids` int64 `(B, P + L)`: the condition and the codes, with the mask token in place of hidden codes;
            `labels` int64 `(B, P + L)`: the hidden codes, and -100 everywhere else.
        """
        layout = self.sequences.layout
        batch = self.sequences.__getitems__(indices)
        prompts, codes = batch["input_ids"][:, : 1 - layout.length or None], batch["labels"][:, -layout.length :]
        keys = np.asarray(indices, dtype=np.int64)
        keys = keys if keys.ndim == 2 else np.stack([np.zeros_like(keys), keys], 1)
        hidden = torch.from_numpy(hidden_places(self.seed, keys, layout.length))
        tokens = codes.where(~hidden & (codes != IGNORED), layout.mask_token)
        labels = torch.cat([torch.full_like(prompts, IGNORED), codes.where(hidden, IGNORED)], 1)
        return {"input_ids": torch.cat([prompts, tokens], 1), "labels": labels}


def hidden_places(seed: int, keys: np.ndarray, length: int) -> np.ndarray:
    """Which codes are hidden, bool `(B, L)`: at least one of each row.

    The share of hidden codes is cos(π/2 · u) with a uniform u, rounded up to whole codes; any codes are equally likely.

    Args:
        seed: integer.
        keys: int64 `(B, 2)`, (epoch, row). Each row of the result is a hash of the seed and of its key.
        length: L.
    """
    counters = (np.array([seed]), keys[:, :1], keys[:, 1:], np.array([HIDING]), np.arange(length + 1))
    draws = uniform(*counters)
    counts = np.ceil(np.cos(math.pi / 2 * draws[:, :1]) * length)
    return draws[:, 1:].argsort(1).argsort(1) < counts
