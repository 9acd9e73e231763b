"""Code store → batches for a causal language model, with condition dropout."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from stage2_prior.code_store import CodeSplit
from stage2_prior.randomness import uniform
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

    def __getitems__(self, keys: Sequence[tuple[int, int, int] | int]) -> dict[str, Tensor]:
        """One batch.

        Args:
            keys: `(epoch, row, view)` with view 0, or just rows (epoch 0); a row below 0 fills up a batch and counts
                for nothing.

        Returns:
            `input_ids` int64 `(B, L)`: `[condition] + codes[:-1]`; `labels` and `shift_labels` int64 `(B, L)`: the
            codes, aligned with the logits that predict them.
        """
        pairs = np.array([key[:2] if isinstance(key, tuple) else (0, key) for key in keys], dtype=np.int64)
        codes, labels = self.split.read(pairs[:, 1].clip(0))
        targets = torch.from_numpy(codes.astype(np.int64))
        counted = torch.where(torch.from_numpy(pairs[:, 1:2] < 0), IGNORED, targets)
        null = torch.full((len(targets),), self.layout.null_token)
        condition = null if labels is None else self.layout.class_tokens(torch.from_numpy(labels))
        if self.condition_dropout:
            epoch, row = torch.from_numpy(pairs).unbind(1)
            dropped = uniform(torch.full_like(row, self.seed), epoch, row) < self.condition_dropout
            condition = torch.where(dropped, null, condition)
        return {
            "input_ids": torch.cat([condition[:, None], targets[:, :-1]], 1),
            "labels": counted,
            "shift_labels": counted,
        }


def collate(batch: Any) -> dict[str, Tensor]:
    """The batch is one already."""
    return batch
