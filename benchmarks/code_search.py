"""The search for the nearest code, against the formulas of others.

Only the search of each peer is measured, without the graph, the one-hot codes and the losses that its module adds: the
peer at its best. "original" is ‖z‖² + ‖e‖² - 2 z·e as in taming-transformers, "diffusers" torch.cdist as in its
VQModel, "vector-quantize-pytorch" its Euclidean search.

Before anything is timed every lane's codes are compared with the nearest in float64. Where float32 cannot tell two
entries apart a lane may take the other one; such flips are counted, with the largest relative difference of the two
squared distances. Any other difference is an error.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import OURS, Case, Prepared
from benchmarks.machine import full_precision
from benchmarks.peers import absent
from stage1_vqgan.quantizers import nearest_code

# Latents N, codes K, and width D.
SIZES = {
    "cpu": [(4096, 8192, 8), (4096, 8192, 64)],
    "gpu": [(64 * 256, 16384, 8), (64 * 256, 16384, 256)],
}
VQP = "vector-quantize-pytorch"


def original(latents: Tensor, codebook: Tensor) -> Tensor:
    """All squared distances from the binomial formula."""
    product = torch.einsum("nd,kd->nk", latents, codebook)
    distances = latents.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * product
    return distances.argmin(1)


def diffusers(latents: Tensor, codebook: Tensor) -> Tensor:
    """All distances from torch.cdist."""
    return torch.cdist(latents, codebook).argmin(1)


def vqp(latents: Tensor, codebook: Tensor) -> Tensor:
    """vector-quantize-pytorch's own distances."""
    from vector_quantize_pytorch.vector_quantize_pytorch import cdist

    return (-cdist(latents[None], codebook[None])).argmax(-1)[0]


LANES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    OURS: nearest_code,
    "original": original,
    "diffusers": diffusers,
    VQP: vqp,
}


def inputs(size: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Normal latents `(N, D)` and codebook `(K, D)`."""
    num_latents, num_codes, dim = size
    generator = torch.Generator().manual_seed(num_codes + dim)
    latents, codebook = (torch.randn(count, dim, generator=generator) for count in (num_latents, num_codes))
    return latents.to(device), codebook.to(device)


def near_tie_flips(codes: Tensor, latents: Tensor, codebook: Tensor) -> dict[str, float]:
    """How many codes are not the nearest in float64, and by how much.

    Raises:
        AssertionError: by more than rounding in float32 explains.
    """
    z, e = latents.double(), codebook.double()
    best = torch.cat(
        [torch.cdist(rows, e, compute_mode="donot_use_mm_for_euclid_dist").argmin(1) for rows in z.split(512)]
    )
    chosen, nearest = ((z - e[index]).square().sum(1) for index in (codes, best))
    excess = chosen - nearest
    rounding = 8 * torch.finfo(torch.float32).eps * (z.square().sum(1) + e[codes].square().sum(1))
    assert (excess <= rounding).all(), "a code is not the nearest"
    gap = (excess / nearest).max().item()
    return {"flips": int((codes != best).sum()), "largest_gap": float(f"{gap:.1e}")}


def prepared(name: str, size: tuple[int, int, int], device: torch.device) -> Prepared:
    """A lane on its inputs, after a small call that sets up the libraries it needs."""
    latents, codebook = inputs(size, device)
    LANES[name](latents[:16], codebook[:16])
    return torch.no_grad()(partial(LANES[name], latents, codebook))


def agree(names: list[str], size: tuple[int, int, int], device: torch.device) -> Mapping[str, Any]:
    """Flips of each lane."""
    latents, codebook = inputs(size, device)
    with full_precision(), torch.no_grad():
        return {name: near_tie_flips(LANES[name](latents, codebook), latents, codebook) for name in names}


def cases(suite: str, device: torch.device, data: str | None) -> Iterator[Case]:
    """One for each size, in float32, which the search always has."""
    missing = absent({VQP: "vector_quantize_pytorch"})
    names = [name for name in LANES if name not in missing]
    for size in SIZES[suite]:
        num_latents, num_codes, dim = size
        yield Case(
            row="code search",
            setting=f"{num_latents} latents, K = {num_codes}, D = {dim}",
            lanes={name: partial(prepared, name, size, device) for name in names},
            agree=partial(agree, names, size, device),
            unit="latents/s",
            count=num_latents,
            operations=2 * num_latents * num_codes * dim,
            absent=missing,
        )
