"""The search for the nearest code, compared with the formulas of other libraries.

Only the search of each peer is measured, without the autograd graph, one-hot codes and losses of its module. "original"
is ‖z‖² + ‖e‖² - 2 z·e as in taming-transformers, "diffusers" is torch.cdist as in its VQModel, and
"vector-quantize-pytorch" is its Euclidean search.

Before the measurement, the codes of every lane are compared with the nearest entries in float64. If two entries are
equally near up to rounding in float32, a lane may choose either. Such flips are counted, and the largest relative
difference of the two squared distances is reported. Any other difference is an error.
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
    "tiny": [(64, 128, 8), (64, 128, 256)],
}
VQP = "vector-quantize-pytorch"


def original(latents: Tensor, codebook: Tensor) -> Tensor:
    """The search of taming-transformers: all squared distances by the binomial formula."""
    product = torch.einsum("nd,kd->nk", latents, codebook)
    distances = latents.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * product
    return distances.argmin(1)


def diffusers(latents: Tensor, codebook: Tensor) -> Tensor:
    """The search of diffusers: all distances by torch.cdist."""
    return torch.cdist(latents, codebook).argmin(1)


def vqp(latents: Tensor, codebook: Tensor) -> Tensor:
    """The search of vector-quantize-pytorch, with its distance function."""
    from vector_quantize_pytorch.vector_quantize_pytorch import cdist

    return (-cdist(latents[None], codebook[None])).argmax(-1)[0]


LANES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    OURS: nearest_code,
    "original": original,
    "diffusers": diffusers,
    VQP: vqp,
}


def inputs(size: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Normally distributed latents `(N, D)` and codebook `(K, D)`."""
    num_latents, num_codes, dim = size
    generator = torch.Generator().manual_seed(num_codes + dim)
    latents, codebook = (torch.randn(count, dim, generator=generator) for count in (num_latents, num_codes))
    return latents.to(device), codebook.to(device)


def near_tie_flips(codes: Tensor, latents: Tensor, codebook: Tensor) -> dict[str, float]:
    """Counts the codes that are not the nearest in float64, and measures how much farther they are.

    Raises:
        AssertionError: a difference is larger than rounding in float32 explains.
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
    """The search of a lane on its inputs, after a small call that initialises the libraries."""
    latents, codebook = inputs(size, device)
    LANES[name](latents[:16], codebook[:16])
    return torch.no_grad()(partial(LANES[name], latents, codebook))


def agree(names: list[str], size: tuple[int, int, int], device: torch.device) -> Mapping[str, Any]:
    """Counts the flips of each lane."""
    latents, codebook = inputs(size, device)
    with full_precision(), torch.no_grad():
        return {name: near_tie_flips(LANES[name](latents, codebook), latents, codebook) for name in names}


def cases(suite: str, device: torch.device, data: str | None) -> Iterator[Case]:
    """One case for each size, in float32, the precision of every search."""
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
