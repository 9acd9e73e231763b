"""Softmaxes over all entries of a codebook and their gradients, without an N × K matrix in memory.

They are computed for chunks of latents, in the same memory for all chunks, and again in the backward pass.

Shape letters: N latents, n latents of a chunk, D code width, K codebook size.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .quantizer_base import entropy, mean_over_processes

# Number of scores (latents × entries) in memory at once, in each of two tensors.
SOFTMAX_SCORES = 2**22


class _OneHotEntries(Function):
    """o·E, where the one-hot o is hard in its value, and has the gradient of the softmax of the inner products."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, codebook: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(z, codebook, codes)
        return F.embedding(codes, codebook)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (above,), (z, codebook, codes) = gradients, ctx.saved_tensors
        of_z, of_codebook = torch.empty_like(z), torch.zeros_like(codebook).index_add_(0, codes, above)
        for rows, logits, p in _chunks(z, codebook):
            mean = (above[rows] * (p @ codebook)).sum(1, keepdim=True)
            of_logits = torch.mm(above[rows], codebook.T, out=logits).sub_(mean).mul_(p)
            of_z[rows] = of_logits @ codebook
            of_codebook.addmm_(of_logits.T, z[rows])
        return of_z, of_codebook, None


class _Entropies(Function):
    """Of the softmax p of all inner products `(N, K)`: mean entropy of the rows, a scalar, and mean of the rows."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(queries, keys)
        total, sums = queries.new_zeros(()), queries.new_zeros(len(keys))
        for _, logits, p in _chunks(queries, keys):
            sums += p.sum(0)
            # the entropy of p is ln Σ exp(l) - Σ p·l; as the largest logit is 0, the first term is -ln of the largest p
            total -= p.amax(1).log().sum() + logits.mul_(p).sum()
        return total / len(queries), sums / len(queries)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (of_entropy, of_mean), (queries, keys) = gradients, ctx.saved_tensors
        of_queries, of_keys = torch.empty_like(queries), torch.zeros_like(keys)
        for rows, logits, p in _chunks(queries, keys):
            of_logits = logits.mul_(-of_entropy).add_(of_mean).div_(len(queries)).mul_(p)
            of_logits.addcmul_(p, of_logits.sum(1, keepdim=True), value=-1)
            of_queries[rows] = of_logits @ keys
            of_keys.addmm_(of_logits.T, queries[rows])
        return of_queries, of_keys


def one_hot_entries(z: Tensor, codebook: Tensor, codes: Tensor) -> Tensor:
    """The entries `(N, D)` of codes `(N,)`, as a product of their one-hot vectors and the codebook.

    The gradient of a one-hot vector is passed on, straight through, to softmax(z·Eᵀ): to latents `(N, D)` and to all
    entries `(K, D)`.
    """
    return _OneHotEntries.apply(z, codebook, codes)


def entropy_loss(queries: Tensor, keys: Tensor) -> Tensor:
    """Mean over latents of the entropy of their softmax over codes, minus the entropy of the mean softmax of the
    batch of all processes; a scalar in [-ln K, ln K].

    Args:
        queries, keys: `(N, D)` and `(K, D)`, whose inner products are the logits of the softmaxes.

    Source: Jansen et al. 2019, "Coincidence, categorization, and consolidation"; Yu et al. 2024, "Language model
    beats diffusion", equation 5.
    """
    mean_entropy, mean_softmax = _Entropies.apply(queries, keys)
    return mean_entropy - entropy(mean_over_processes(mean_softmax))


def _chunks(queries: Tensor, keys: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For each chunk: its rows, its logits minus the largest of each row, and their softmax, both `(n, K)`.

    The caller may overwrite both tensors; the next chunk does.
    """
    size = max(1, min(len(queries), SOFTMAX_SCORES // len(keys)))
    memory = queries.new_empty(2, size, len(keys))
    for start in range(0, len(queries), size):
        rows = queries[start : start + size]
        logits, p = memory[:, : len(rows)]
        torch.mm(rows, keys.T, out=logits)
        logits -= logits.amax(1, keepdim=True)
        yield slice(start, start + size), logits, torch.softmax(logits, 1, out=p)
