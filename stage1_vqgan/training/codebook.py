"""Keeping a codebook in use during training: k-means initialisation, restart of dead codes, usage statistics.

Statistics and candidates are gathered over all processes in global order and every draw is keyed by the step, so
all processes make the same codebook.

Shape letters: N latents, D code width, K codebook size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_vqgan.quantizers import VectorQuantizer, nearest_code
from stage1_vqgan.reconstruction import codebook_perplexity, codebook_usage


@torch.no_grad()
def kmeans(latents: Tensor, num_clusters: int, spherical: bool, seed: int, iterations: int = 10) -> Tensor:
    """Lloyd's algorithm from randomly chosen latents; a cluster that empties restarts at a random latent.

    Args:
        latents: `(N, D)`.
        num_clusters: K.
        spherical: keep the centres on the unit sphere.
        seed: of the choices.

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


class CodebookMonitor(nn.Module):
    """Counts how often each code is used, and restarts those that are not.

    Two windows: since the last log, and since the last restart. They are buffers, so that a checkpoint holds them.
    """

    logged: Tensor
    recent: Tensor

    def __init__(self, num_embeddings: int, device: torch.device):
        super().__init__()
        self.register_buffer("logged", torch.zeros(num_embeddings, dtype=torch.int64, device=device))
        self.register_buffer("recent", torch.zeros(num_embeddings, dtype=torch.int64, device=device))

    def update(self, codes: Tensor) -> None:
        """Adds the codes of one process's batch."""
        codes = codes.flatten()
        for counts in (self.logged, self.recent):  # unlike bincount this needs nothing from the host
            counts.scatter_add_(0, codes, torch.ones_like(codes))

    def statistics(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Usage and perplexity since the last call; `reduce` sums over processes."""
        counts = reduce(self.logged)
        self.logged = torch.zeros_like(self.logged)  # not in place: `reduce` may have returned the tensor itself
        return {"codebook/usage": codebook_usage(counts), "codebook/perplexity": codebook_perplexity(counts)}

    @torch.no_grad()
    def restart(
        self,
        quantizer: VectorQuantizer,
        ema_quantizer: VectorQuantizer,
        optimizer: torch.optim.Optimizer,
        latents: Tensor,
        reduce: Callable[[Tensor], Tensor],
        gather: Callable[[Tensor], Tensor],
        seed: int,
    ) -> Tensor:
        """Moves every code not used since the last restart onto a random latent; to be called after the optimizer step.

        Args:
            quantizer, ema_quantizer: the trained codebook, and its moving average, which gets the new entries too.
            optimizer: its moments for the entry are cleared.
            latents: `(N, D)` of this process's batch.
            reduce, gather: sum, and concatenate in rank order, over processes.
            seed: of the choice of latents.

        Returns:
            Number of restarted codes, a scalar.
        """
        dead = (reduce(self.recent) == 0).nonzero().flatten()
        self.recent = torch.zeros_like(self.recent)
        if len(dead):
            candidates = gather(latents.float())
            if quantizer.l2_normalize:
                candidates = F.normalize(candidates, dim=-1)
            order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
            dead = dead[: len(candidates)]
            rows = candidates[order[: len(dead)].to(candidates.device)]
            weight = quantizer.embedding.weight
            for moved in (quantizer, ema_quantizer):
                moved.move_entries(dead, rows)
            for value in optimizer.state.get(weight, {}).values():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    value[dead] = 0
        return torch.tensor(float(len(dead)), device=latents.device)
