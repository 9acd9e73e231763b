"""Batches for a masked prior: which codes are hidden, and what the loss counts."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from stage2_prior.code_store import Rows
from stage2_prior.data import CodeDataset
from stage2_prior.masking import MaskedCodeDataset, hidden_places

ROWS = 4000


class Store:
    """Rows in memory, with the interface of `CodeSplit`."""

    def __init__(self, layout):
        rng = np.random.default_rng(0)
        self.codes = rng.integers(layout.num_codes, size=(ROWS, layout.length)).astype(np.uint16)
        self.labels = rng.integers(5, size=ROWS)

    def __len__(self):
        return ROWS

    def read(self, rows):
        return Rows(self.codes[rows], self.labels[rows], None)


@pytest.fixture(scope="module")
def make(masked_layout):
    def make(dropout=0.0, seed=0):
        return MaskedCodeDataset(CodeDataset(Store(masked_layout), masked_layout, dropout, seed))

    return make


def keys(epoch, rows):
    return np.array([(epoch, row) for row in rows])


def test_a_sequence_is_the_condition_and_codes_of_which_some_are_hidden(make, masked_layout):
    dataset, rows = make(), [7, 3, 3999]
    batch = dataset.__getitems__(keys(2, rows))
    codes = torch.from_numpy(dataset.sequences.split.codes[rows].astype(np.int64))
    labels = torch.from_numpy(dataset.sequences.split.labels[rows])
    assert batch.keys() == {"input_ids", "labels"} and all(part.dtype == torch.int64 for part in batch.values())
    assert torch.equal(batch["input_ids"][:, 0], masked_layout.num_codes + labels)
    assert (batch["labels"][:, 0] == -100).all()
    tokens, targets = batch["input_ids"][:, 1:], batch["labels"][:, 1:]
    hidden = tokens == masked_layout.mask_token
    assert hidden.any(1).all() and not hidden.all()
    assert torch.equal(tokens[~hidden], codes[~hidden]) and (targets[~hidden] == -100).all()
    assert torch.equal(targets[hidden], codes[hidden])


def test_rows_that_fill_up_a_batch_count_for_nothing(make):
    batch = make().__getitems__([5, -1, 9])
    assert (batch["labels"][1] == -100).all() and (batch["labels"][[0, 2]] >= 0).any(1).all()
    kept = make().__getitems__([5, 9])
    assert all(torch.equal(batch[name][[0, 2]], kept[name]) for name in kept)


def test_the_share_of_hidden_codes_follows_the_cosine():
    hidden = hidden_places(3, np.zeros(ROWS, np.int64), np.arange(ROWS), 8)
    counts = np.bincount(hidden.sum(1), minlength=9)
    # for a uniform u, cos(π/2 · u) has this distribution function; counts are rounded up
    below = 1 - np.arccos(np.arange(9) / 8) / (math.pi / 2)
    assert counts[0] == 0 and stats.chisquare(counts[1:], np.diff(below) * ROWS).pvalue > 1e-3
    # any place is as likely as another; the deviation of a share is at most √(0.25 / rows)
    assert abs(hidden.mean(0) - hidden.mean()).max() < 4 * (0.25 / ROWS) ** 0.5


def test_hidden_codes_are_keyed_by_seed_epoch_and_row(make):
    def hidden(epoch=0, seed=0, rows=range(100)):
        return make(seed=seed).__getitems__(keys(epoch, rows))["labels"][:, 1:] >= 0

    assert torch.equal(hidden(), hidden()) and torch.equal(hidden(rows=range(50, 100)), hidden()[50:])
    assert not torch.equal(hidden(), hidden(epoch=1)) and not torch.equal(hidden(), hidden(seed=1))
    assert not torch.equal(hidden()[:50], hidden()[50:])


def test_condition_dropout_is_that_of_a_causal_prior_and_independent_of_the_hidden_codes(make, masked_layout):
    dataset, chosen = make(dropout=0.3), keys(1, range(ROWS))
    batch, causal = dataset.__getitems__(chosen), dataset.sequences.__getitems__(chosen)
    assert torch.equal(batch["input_ids"][:, 0], causal["input_ids"][:, 0])
    dropped = batch["input_ids"][:, 0] == masked_layout.null_token
    counts = (batch["labels"] >= 0).sum(1)
    assert stats.ks_2samp(counts[dropped], counts[~dropped]).pvalue > 1e-3
    assert 0.25 < dropped.double().mean() < 0.35
