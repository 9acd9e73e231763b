"""Batches of a code store for a causal language model, with condition dropout."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from configs.randomness import uniform
from stage2_prior.code_store import CodeSplit, Rows
from stage2_prior.vocabulary import TokenLayout

# The losses of transformers ignore this target.
IGNORED = -100


@dataclass(frozen=True)
class CodeDataset(Dataset):
    """Sequences of prompt and codes. `__getitems__` reads a whole batch at once, so `collate` has nothing to do.

    Args:
        split: rows of a code store.
        layout: the token layout.
        condition_dropout: fraction of the sequences in which null tokens replace all conditions.
        seed: a hash of (seed, epoch, row) selects these sequences.
        segment_dropout: fraction of the sequences in which null tokens replace one condition, by its name; the choice
            is independent of that for other conditions.
    """

    split: CodeSplit
    layout: TokenLayout
    condition_dropout: float = 0.0
    seed: int = 0
    segment_dropout: Mapping[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, indices: np.ndarray | Sequence[int]) -> dict[str, Tensor]:
        """One batch.

        Args:
            indices: int64 `(B, 2)`, (epoch, row); or `(B,)`, rows of epoch 0. A row below 0 pads the batch; the
                loss ignores it.

        Returns:
            `input_ids` int64 `(B, P + L - 1)`: `prompt + codes[:-1]`; `labels` and `shift_labels` int64 of the same
            shape, aligned with the logits: the codes, and IGNORED at the first P - 1 places.
        """
        _, rows, prompts, codes = self.read(indices)
        length = prompts.shape[1]
        input_ids = np.concatenate([prompts, codes[:, :-1]], 1)
        targets = np.full_like(input_ids, IGNORED)
        targets[:, length - 1 :] = codes
        targets[rows < 0] = IGNORED
        labels = torch.from_numpy(targets)
        return {"input_ids": torch.from_numpy(input_ids), "labels": labels, "shift_labels": labels}

    def read(self, indices: np.ndarray | Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Epochs and rows `(B,)`, prompts `(B, P)` after dropout, and codes `(B, L)`, int64; see `__getitems__`."""
        indices = np.asarray(indices, dtype=np.int64)
        epochs, rows = indices.T if indices.ndim == 2 else (np.zeros_like(indices), indices)
        found = self.split.read(rows.clip(0))
        prompts = self._prompts(found)
        for name, dropped in self._dropped(epochs, rows).items():
            prompts[np.ix_(dropped, np.r_[self.layout.places[name]])] = self.layout.null_of(name)
        return epochs, rows, prompts, found.codes.astype(np.int64)

    def _prompts(self, found: Rows) -> np.ndarray:
        """The prompts of rows, int64 `(B, P)`, without dropout."""
        layout = self.layout
        parts = [] if found.conditions is None else [found.conditions.astype(np.int64)]
        if len(layout.segments) < len(layout.conditions):
            labels = np.full(len(found.codes), layout.num_classes) if found.labels is None else found.labels
            parts.insert(0, labels[:, None])  # the null token follows the classes
        return np.concatenate(parts, 1) + layout.offsets.numpy()

    def _dropped(self, epochs: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Whether a null token replaces each condition of each row: bool `(B,)` by name."""
        seed, names = np.array([self.seed]), list(self.layout.places)
        none = np.zeros(len(rows), bool)
        everything = uniform(seed, epochs, rows) < self.condition_dropout if self.condition_dropout else none
        dropped = {name: everything.copy() for name in names if self.condition_dropout}
        for name, share in self.segment_dropout.items():
            number = np.full_like(rows, names.index(name) + 1)
            dropped[name] = dropped.get(name, none) | (uniform(seed, epochs, rows, number) < share)
        return dropped


def collate(batch: Any) -> dict[str, Tensor]:
    """Returns the batch that `__getitems__` has read."""
    return batch
