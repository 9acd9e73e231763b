"""Condition contrastive alignment (CCA): fine-tunes a causal prior to sample without guidance as if with it.

For an image's codes x with their own condition c, and the condition c' of another image:

    r(x, c) = log p(x | c) - log p_start(x | c)
    loss    = - log sigmoid(beta · r(x, c)) - lambda · log sigmoid(-beta · r(x, c'))

p_start is the prior before its first step. At the minimum, p(x | c) is proportional to
p_start(x | c) · p(c | x)^(1/beta): images that show their condition clearly become more likely, as with guidance.

Source: Chen et al. 2024, "Toward guidance-free AR visual generation via condition contrastive alignment", and the
authors' code, which divides the loss by max(lambda, 1).
"""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid
from torch.utils.data import Dataset

from configs import ConfigError, Problem
from configs.randomness import uniform
from stage2_prior.data import IGNORED, CodeDataset
from stage2_prior.training.contrastive_config import ContrastiveConfig
from stage2_prior.vocabulary import TokenLayout

# A counter of its own, so that these random numbers are no others' of the same row.
OTHER_IMAGE = 3


@dataclass(frozen=True)
class PairDataset(Dataset):
    """Sequences of codes, each with its own conditions and with those of another image.

    Args:
        sequences: the sequences. A hash of (its seed, epoch, row) chooses the other image among all.
    """

    sequences: CodeDataset

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitems__(self, indices: np.ndarray) -> dict[str, Tensor]:
        """One batch, with the fields of `CodeDataset`: B sequences, then the same codes with other conditions.

        Args:
            indices: int64 `(B, 2)`, (epoch, row).
        """
        epochs, rows = indices.T
        draws = uniform(np.array([self.sequences.seed]), epochs, rows, np.array([OTHER_IMAGE]))
        others = (draws * len(self)).astype(np.int64)
        prompts = torch.from_numpy(self.sequences.read(np.stack([epochs, others], 1))[2])
        batch = self.sequences.__getitems__(indices)
        codes = batch["input_ids"][:, prompts.shape[1] :]
        pairs = {name: labels.repeat(2, 1) for name, labels in batch.items() if name != "input_ids"}
        return pairs | {"input_ids": torch.cat([batch["input_ids"], torch.cat([prompts, codes], 1)])}


class ContrastiveLoss:
    """The loss above, and how often its two terms are right.

    Args:
        prior: the prior before its first step. It is copied, unless it has an adapter: without it, it stays p_start.
        settings: beta and lambda.
    """

    def __init__(self, prior: Any, settings: ContrastiveConfig):
        self.beta, self.negative_weight = settings.beta, settings.negative_weight
        self.start = None if hasattr(prior, "peft_config") else copy.deepcopy(prior).eval().requires_grad_(False)
        self._right: list[Tensor] = []

    def __call__(self, model: Any, prior: Any, inputs: dict[str, Tensor]) -> Tensor:
        """The mean over the B images of a batch of `PairDataset`.

        Args:
            model: the model to train, with its wrappers.
            prior: the same model without wrappers.
            inputs: the batch.
        """
        before = self.log_likelihoods_before(prior, inputs)
        own, other = (self.beta * (log_likelihoods(model, inputs) - before)).chunk(2)
        self._right.append(torch.stack([own.detach() > 0, other.detach() < 0]).float().mean(1))
        loss = -logsigmoid(own) - self.negative_weight * logsigmoid(-other)
        return loss.mean() / max(self.negative_weight, 1.0)

    @torch.no_grad()
    def log_likelihoods_before(self, prior: Any, inputs: dict[str, Tensor]) -> Tensor:
        """log p_start of a batch, float32 `(2B,)`."""
        if self.start is not None:
            self.start.to(inputs["input_ids"].device)
            return log_likelihoods(self.start, inputs)
        prior.eval()
        try:
            with prior.disable_adapter():
                return log_likelihoods(prior, inputs)
        finally:
            prior.train()

    def right(self) -> Tensor:
        """Shares of r(x, c) above 0 and of r(x, c') below 0 since the last call, float32 `(2,)`."""
        shares = torch.stack(self._right).mean(0)
        self._right.clear()
        return shares


def log_likelihoods(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """log p(x | c) of each sequence, float32 `(2B,)`: the sum over its codes."""
    logits = model(input_ids=inputs["input_ids"]).logits.float()
    return -cross_entropy(logits.mT, inputs["labels"], ignore_index=IGNORED, reduction="none").sum(1)


def check_contrast(base: str, known: TokenLayout, layout: TokenLayout) -> None:
    """Refuses codes without different conditions, and a starting prior that does not know the conditions.

    Args:
        base: folder or Hub id of the starting prior.
        known: its token layout.
        layout: the token layout of the codes.

    Raises:
        ConfigError: names what is missing.
    """
    if layout.num_classes < 2 and not layout.segments:
        message = f"this loss compares classes, but the code store has {layout.num_classes}; set it to 0"
        raise ConfigError([Problem("cca.beta", message)])
    if not meanings(layout) <= meanings(known):
        message = (
            f"received {base!r}, which lacks classes or conditions of the codes; with cca it must know all of them"
        )
        raise ConfigError([Problem("model_name_or_path", message)])


def meanings(layout: TokenLayout) -> set[tuple[Any, ...]]:
    """The classes of a token layout, and its further conditions."""
    classes = {("class", name) for name in layout.class_names}
    return classes | {(s.name, s.kind, s.fingerprint, s.num_tokens, s.class_names) for s in layout.segments}
