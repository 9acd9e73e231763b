"""Code store → batches for a causal language model, with condition dropout."""

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

# A target that transformers leaves out of a loss.
IGNORED = -100


@dataclass(frozen=True)
class CodeDataset(Dataset):
    """Batches of sequences, read as a whole: `__getitems__` returns the batch, `collate` leaves it as it is.

    Args:
        split: rows of a code store.
        layout: the token space.
        condition_dropout: share of sequences whose condition is replaced by the null token.
        seed: with (epoch, row), decides which those are.
    """

    split: CodeSplit
    layout: TokenLayout
    condition_dropout: float = 0.0
    seed: int = 0

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, keys: np.ndarray | Sequence[int]) -> dict[str, Tensor]:
        """One batch.

        Args:
            keys: int64 `(B, 2)`, (epoch, row); or `(B,)`, rows of epoch 0. A row below 0 fills up a batch and counts
                for nothing.

        Returns:
            `input_ids` int64 `(B, L)`: `[condition] + codes[:-1]`; `labels` and `shift_labels` int64 `(B, L)`: the
            codes, aligned with the logits that predict them.
        """
        keys = np.asarray(keys, dtype=np.int64)
        epochs, rows = keys.T if keys.ndim == 2 else (np.zeros_like(keys), keys)
        codes, labels = self.split.read(rows.clip(0))
        input_ids, targets = np.empty(codes.shape, dtype=np.int64), codes.astype(np.int64)
        input_ids[:, 1:] = codes[:, :-1]
        input_ids[:, 0] = self.layout.null_token if labels is None else self.layout.class_tokens(labels)
        if self.condition_dropout:
            dropped = uniform(np.array([self.seed]), epochs, rows) < self.condition_dropout
            input_ids[dropped, 0] = self.layout.null_token
        targets[rows < 0] = IGNORED
        counted = torch.from_numpy(targets)
        return {"input_ids": torch.from_numpy(input_ids), "labels": counted, "shift_labels": counted}


def collate(batch: Any) -> dict[str, Tensor]:
    """The batch is one already."""
    return batch
