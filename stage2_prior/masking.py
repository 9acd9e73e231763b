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
        sequences: the sequences for a causal prior, whose conditions these have too. A hash of (its seed, epoch, row)
            says which codes are hidden.
    """

    sequences: CodeDataset

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
        epochs, rows, prompts, codes = self.sequences.read(indices)
        hidden = hidden_places(self.sequences.seed, epochs, rows, layout.length)
        tokens = np.concatenate([prompts, np.where(hidden, layout.mask_token, codes)], 1)
        labels = np.full_like(tokens, IGNORED)
        labels[:, prompts.shape[1] :] = np.where(hidden & (rows >= 0)[:, None], codes, IGNORED)
        return {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}


def for_family(sequences: CodeDataset) -> CodeDataset | MaskedCodeDataset:
    """The sequences as a prior of the layout's family needs them."""
    return MaskedCodeDataset(sequences) if sequences.layout.family == "masked" else sequences


def hidden_places(seed: int, epochs: np.ndarray, rows: np.ndarray, length: int) -> np.ndarray:
    """Which codes are hidden, bool `(B, L)`: at least one of each row.

    The share of hidden codes is cos(π/2 · u) with a uniform u, rounded up to whole codes; any codes are equally likely.

    Args:
        seed: integer.
        epochs, rows: int64 `(B,)`. Each row of the result is a hash of the seed, the epoch and the row.
        length: L.
    """
    key = (np.array([seed]), epochs[:, None], rows[:, None], np.array([HIDING]))
    draws = uniform(*key, np.arange(length + 1))
    counts = np.ceil(np.cos(math.pi / 2 * draws[:, :1]) * length)
    return draws[:, 1:].argsort(1).argsort(1) < counts
