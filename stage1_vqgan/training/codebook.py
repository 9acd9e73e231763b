"""Upkeep of the codebook during training: k-means initialisation, restart of dead codes, usage statistics.

All processes compute the same codebook: counts and latents are gathered from all processes in a fixed order, and
random numbers are keyed by the step.

Shape letters: N latents, D code width, K codebook size.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from stage1_vqgan.modeling_vqgan import VQGANModel
from stage1_vqgan.quantizers import CodebookQuantizer, QuantizerBase, nearest_code
from stage1_vqgan.reconstruction import codebook_perplexity, codebook_usage


@torch.no_grad()
def kmeans(latents: Tensor, num_clusters: int, spherical: bool, seed: int, iterations: int = 10) -> Tensor:
    """Lloyd's algorithm. The first centres are random latents; a centre without latents restarts at a random latent.

    Args:
        latents: `(N, D)`.
        num_clusters: K.
        spherical: keep the centres on the unit sphere.
        seed: seed of the random choices.
        iterations: number of iterations.

    Returns:
        float32 centres `(K, D)`.
    """
    generator = torch.Generator().manual_seed(seed)
    latents = F.normalize(latents.float(), dim=-1) if spherical else latents.float()

    def draw(count: int) -> Tensor:
        order = torch.randperm(len(latents), generator=generator)
        return latents[order.repeat(-(-count // len(latents)))[:count].to(latents.device)]

    centres = draw(num_clusters)
    for _ in range(iterations):
        codes = nearest_code(latents, centres)
        counts = torch.bincount(codes, minlength=num_clusters)
        sums = torch.zeros_like(centres).index_add_(0, codes, latents)
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), draw(num_clusters))
        if spherical:
            centres = F.normalize(centres, dim=-1)
    return centres


@torch.no_grad()
def initialise_codebook(
    model: VQGANModel, average: VQGANModel, batches: Iterable[Tensor], accelerator: Accelerator, seed: int
) -> None:
    """Places the codebook entries by k-means over the latents of some batches of all processes.

    Several codebooks are placed one after another, because what one of them quantizes depends on those before it.

    Args:
        model, average: the tokenizer in training and its moving average; both get the entries.
        batches: float32 `(B, C, H, W)` in [-1, 1], of this process.
        accelerator: gathers the latents.
        seed: seed of k-means.
    """
    # Gather batch by batch, so that the order of the latents does not depend on the number of processes.
    latents = torch.cat([accelerator.gather(cast(Tensor, average.encode(images).latents)) for images in batches])
    pairs = zip(model.quantize.codebooks, average.quantize.codebooks, strict=True)
    for index, quantizers in enumerate(pairs):
        rows = average.quantize.inputs(latents)[index]
        centres = kmeans(rows, model.config.num_embeddings, quantizers[0].l2_normalize, seed)
        centres = broadcast(centres)  # sums on two GPUs can differ by rounding
        for quantizer in quantizers:
            quantizer.place_entries(centres)


class Candidates:
    """A random sample of the latents of the batches since the last optimizer step; a restart moves entries onto them.

    Call `add` for every batch of a step that ends with a restart. The sample is empty after `rows`, so a checkpoint
    between two steps holds none of it.

    Args:
        most: number of latents that are kept at most; K is enough for every restart.
    """

    def __init__(self, most: int):
        self.most = most
        self._draws: Tensor | None = None
        self._rows: Tensor | None = None

    @torch.no_grad()
    def add(self, latents: Tensor, seed: int) -> None:
        """Adds the latents of a batch. Each draws a number, and the `most` latents with the lowest numbers stay.

        Args:
            latents: `(N, D)` of all processes, in the order of their ranks: `accelerator.gather(rows)`, with one of
                the rows of `quantizer.inputs`. So the sample does not depend on the number of processes, and is the
                same on each.
            seed: seed of the draws, another one for each batch: `seed_from(config.seed, micro_step)`.
        """
        draws = torch.rand(len(latents), generator=torch.Generator().manual_seed(seed)).to(latents.device)
        rows = latents.float()
        if self._draws is not None and self._rows is not None:
            draws, rows = torch.cat([self._draws, draws]), torch.cat([self._rows, rows])
        order = draws.argsort(stable=True)[: self.most]
        self._draws, self._rows = draws[order], rows[order]

    def rows(self) -> Tensor:
        """The sample in random order, float32 `(≤ most, D)`; the next batch begins a new one."""
        assert self._rows is not None, "no batch was added"
        rows, self._draws, self._rows = self._rows, None, None
        return rows


class CodebookMonitor(nn.Module):
    """Counts how often each code is used, and restarts the codes that are not used.

    Args:
        num_embeddings: K.
        device: device of the counters.
        num_codebooks: number of codebooks of K entries each.

    Attributes:
        logged: int64, uses of each entry of all codebooks since the last log. A buffer, so that a checkpoint holds it.
        recent: the same since the last restart.
    """

    logged: Tensor
    recent: Tensor

    def __init__(self, num_embeddings: int, device: torch.device, num_codebooks: int = 1):
        super().__init__()
        self.num_embeddings, shape = num_embeddings, (num_codebooks * num_embeddings,)
        self.register_buffer("logged", torch.zeros(shape, dtype=torch.int64, device=device))
        self.register_buffer("recent", torch.zeros(shape, dtype=torch.int64, device=device))

    def update(self, entries: Tensor) -> None:
        """Adds the entry numbers of a batch of this process, int64 of any shape; see `QuantizerBase.entry_numbers`."""
        entries = entries.flatten()
        for counts in (self.logged, self.recent):  # not bincount, because the host would wait for the device
            counts.scatter_add_(0, entries, torch.ones_like(entries))

    def statistics(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Usage and perplexity since the last call, scalars; `reduce` sums over processes.

        Usage is the share of the entries of all codebooks, perplexity the mean over codebooks.
        """
        counts = reduce(self.logged)
        self.logged = torch.zeros_like(self.logged)  # not in place: `reduce` may return the tensor itself
        counts = counts.view(-1, self.num_embeddings)
        return {"codebook/usage": codebook_usage(counts), "codebook/perplexity": codebook_perplexity(counts)}

    def reduce(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Replaces the counters by their sums over processes, which `reduce` computes."""
        self.logged, self.recent = reduce(self.logged), reduce(self.recent)

    def clear(self) -> None:
        """Sets all counters to 0."""
        self.logged.zero_()
        self.recent.zero_()

    @torch.no_grad()
    def restart(
        self,
        quantizer: QuantizerBase,
        average: QuantizerBase,
        optimizer: torch.optim.Optimizer,
        candidates: Sequence[Tensor],
        reduce: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Moves every entry that was not used since the last restart onto what its codebook quantizes.

        Call it after the optimizer step.

        Args:
            quantizer, average: the quantizer in training and its moving average; both get the new entries.
            optimizer: the moments of the moved entries are set to 0.
            candidates: for each codebook what it quantizes, `(N, D)` in random order, the same on all processes, see
                [`Candidates`]. The first unused entry takes the first of them; if there are fewer than unused entries,
                the last entries stay.
            reduce: sums over processes.

        Returns:
            Number of moved entries, a scalar.
        """
        counts = reduce(self.recent).view(-1, self.num_embeddings)
        self.recent = torch.zeros_like(self.recent)
        moved = 0
        pairs = zip(quantizer.codebooks, average.codebooks, strict=True)
        for uses, pair, rows in zip(counts, pairs, candidates, strict=True):
            dead = (uses == 0).nonzero().flatten()[: len(rows)]
            if len(dead):
                _move(pair, dead, rows[: len(dead)], optimizer)
            moved += len(dead)
        return torch.tensor(float(moved), device=counts.device)


def _move(
    pair: tuple[CodebookQuantizer, CodebookQuantizer], codes: Tensor, rows: Tensor, optimizer: torch.optim.Optimizer
) -> None:
    """Moves entries of a codebook and of its average to `rows`, and sets what the optimizer recalls of them to 0."""
    if pair[0].l2_normalize:
        rows = F.normalize(rows, dim=-1)
    for codebook in pair:
        codebook.move_entries(codes, rows)
    for weight in pair[0].entry_weights():
        for value in optimizer.state.get(weight, {}).values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                value[codes] = 0
