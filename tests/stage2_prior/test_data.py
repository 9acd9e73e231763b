"""Batches for the prior: their layout, condition dropout, and the loss they lead to."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from stage2_prior import TokenLayout
from stage2_prior.code_store import Rows
from stage2_prior.data import CodeDataset, collate

ROWS = 4000


@dataclass
class Split:
    """Rows in memory, with the interface of `CodeSplit`."""

    codes: np.ndarray
    labels: np.ndarray | None

    def __len__(self):
        return len(self.codes)

    def read(self, rows):
        return Rows(self.codes[rows], None if self.labels is None else self.labels[rows], None)


@pytest.fixture(scope="module")
def rows(layout):
    rng = np.random.default_rng(0)
    return Split(
        rng.integers(layout.num_codes, size=(ROWS, layout.length)).astype(np.uint16), rng.integers(5, size=ROWS)
    )


def keys(epoch, rows):
    return np.array([(epoch, row) for row in rows])


def test_a_sequence_is_the_condition_and_the_codes(rows, layout):
    chosen = [7, 3, 3999]
    batch = CodeDataset(rows, layout).__getitems__(keys(2, chosen))
    for position, row in enumerate(chosen):
        sequence = [layout.num_codes + rows.labels[row], *rows.codes[row]]
        assert batch["input_ids"][position].tolist() == sequence[:-1]
        assert batch["labels"][position].tolist() == batch["shift_labels"][position].tolist() == sequence[1:]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_rows_alone_are_keys_too(rows, layout):
    dataset = CodeDataset(rows, layout, condition_dropout=0.5)
    assert torch.equal(dataset.__getitems__([5, 9])["input_ids"], dataset.__getitems__(keys(0, [5, 9]))["input_ids"])


def test_rows_that_fill_up_a_batch_count_for_nothing(rows, layout):
    batch = CodeDataset(rows, layout).__getitems__([5, -1, 9])
    assert (batch["labels"][1] == -100).all() and (batch["shift_labels"][1] == -100).all()
    kept = CodeDataset(rows, layout).__getitems__([5, 9])
    assert torch.equal(batch["labels"][[0, 2]], kept["labels"])
    assert torch.equal(batch["input_ids"][[0, 2]], kept["input_ids"])


def dropped(rows, layout, epoch=0, chosen=range(ROWS), **settings):
    batch = CodeDataset(rows, layout, **settings).__getitems__(keys(epoch, chosen))
    return batch["input_ids"][:, 0] == layout.null_token


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_condition_dropout_has_its_share(rows, layout, share):
    frequency = dropped(rows, layout, condition_dropout=share).double().mean().item()
    assert abs(frequency - share) <= 4 * (share * (1 - share) / ROWS) ** 0.5


def test_condition_dropout_leaves_the_rest_alone(rows, layout):
    plain, other = (CodeDataset(rows, layout, share).__getitems__(keys(0, range(ROWS))) for share in (0.0, 0.3))
    kept = other["input_ids"][:, 0] != layout.null_token
    assert torch.equal(plain["input_ids"][kept], other["input_ids"][kept])
    assert torch.equal(plain["input_ids"][:, 1:], other["input_ids"][:, 1:])
    assert torch.equal(plain["labels"], other["labels"])


def test_condition_dropout_is_keyed_by_seed_epoch_and_row(rows, layout):
    first = dropped(rows, layout, epoch=1, condition_dropout=0.3, seed=5)
    order = np.random.default_rng(0).permutation(ROWS)
    shuffled = dropped(rows, layout, epoch=1, chosen=order, condition_dropout=0.3, seed=5)
    assert torch.equal(shuffled, first[order])
    in_parts = [
        dropped(rows, layout, 1, part, condition_dropout=0.3, seed=5) for part in np.array_split(np.arange(ROWS), 9)
    ]
    assert torch.equal(torch.cat(in_parts), first)
    for changed in ({"epoch": 2, "seed": 5}, {"epoch": 1, "seed": 6}):
        other = dropped(rows, layout, condition_dropout=0.3, **changed)
        both = (first & other).double().mean().item()
        assert abs(both - 0.09) < 4 * (0.09 * 0.91 / ROWS) ** 0.5  # the two choices are independent


def test_without_labels_the_condition_is_null(rows, layout):
    unconditional = TokenLayout(layout.num_codes, (), layout.grid, layout.downsampling_factor, "")
    batch = CodeDataset(Split(rows.codes, None), unconditional, 0.1).__getitems__(keys(0, range(8)))
    assert (batch["input_ids"][:, 0] == layout.num_codes).all()
    assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])


def test_workers_make_the_same_batches(rows, layout):
    dataset = CodeDataset(rows, layout, condition_dropout=0.5)
    batches = [keys(epoch, range(4 * epoch, 4 * epoch + 4)) for epoch in range(4)]
    alone, shared = (
        list(DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers)) for workers in (0, 2)
    )
    for one, other in zip(alone, shared, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3"])
@torch.no_grad()
def test_the_loss_is_the_cross_entropy_of_every_code(rows, layout, random_prior, model_type):
    prior, chosen = random_prior(model_type, layout).cpu(), [1, 2, 5]
    loss = prior(**CodeDataset(rows, layout).__getitems__(keys(0, chosen))).loss
    nats = []
    for row in chosen:
        sequence = torch.tensor([[layout.num_codes + rows.labels[row], *rows.codes[row].tolist()]])
        for position in range(1, layout.length + 1):
            logits = prior(input_ids=sequence[:, :position]).logits[0, -1]
            nats.append(-logits.double().softmax(-1)[sequence[0, position]].log().item())
    assert len(nats) == 3 * layout.length
    assert loss.item() == pytest.approx(np.mean(nats), rel=1e-5)
