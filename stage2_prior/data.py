"""Batches of a code store for a causal language model, with condition dropout."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from configs.randomness import uniform
from stage2_prior.code_store import CodeSplit
from stage2_prior.vocabulary import TokenLayout

# The losses of transformers ignore this target.
IGNORED = -100


@dataclass(frozen=True)
class CodeDataset(Dataset):
    """Sequences of codes. `__getitems__` reads a whole batch at once, so `collate` has nothing to do.

    Args:
        split: rows of a code store.
        layout: the token layout.
        condition_dropout: fraction of the sequences in which the null token replaces the condition.
        seed: a hash of (seed, epoch, row) selects these sequences.
    """

    split: CodeSplit
    layout: TokenLayout
    condition_dropout: float = 0.0
    seed: int = 0

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, indices: np.ndarray | Sequence[int]) -> dict[str, Tensor]:
        """One batch.

        Args:
            indices: int64 `(B, 2)`, (epoch, row); or `(B,)`, rows of epoch 0. A row below 0 pads the batch; the
                loss ignores it.

        Returns:
            `input_ids` int64 `(B, L)`: `[condition] + codes[:-1]`; `labels` and `shift_labels` int64 `(B, L)`: the
            codes, aligned with the logits that predict them.
        """
        indices = np.asarray(indices, dtype=np.int64)
        epochs, rows = indices.T if indices.ndim == 2 else (np.zeros_like(indices), indices)
        codes, classes = self.split.read(rows.clip(0))
        input_ids, targets = np.empty(codes.shape, dtype=np.int64), codes.astype(np.int64)
        input_ids[:, 1:] = codes[:, :-1]
        input_ids[:, 0] = self.layout.null_token if classes is None else self.layout.class_tokens(classes)
        if self.condition_dropout:
            dropped = uniform(np.array([self.seed]), epochs, rows) < self.condition_dropout
            input_ids[dropped, 0] = self.layout.null_token
        targets[rows < 0] = IGNORED
        labels = torch.from_numpy(targets)
        return {"input_ids": torch.from_numpy(input_ids), "labels": labels, "shift_labels": labels}


def collate(batch: Any) -> dict[str, Tensor]:
    """Returns the batch that `__getitems__` has read."""
    return batch
