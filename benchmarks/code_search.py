"""Time and memory of the search for the nearest code, against the formulas of others:
`python -m benchmarks.code_search [--threads 1 2] [--rounds 15]`.

Only the search of each peer is measured, without the graph, the one-hot codes and the losses that its module adds: the
peer at its best. "original" is ‖z‖² + ‖e‖² - 2 z·e as in taming-transformers, "diffusers" torch.cdist as in its
VQModel, "vqp" the Euclidean search of vector-quantize-pytorch, which has to be installed.

Before anything is timed every lane's codes are compared with the nearest in float64. Where float32 cannot tell two
entries apart a lane may take the other one; such flips are counted, with the largest relative difference of the two
squared distances. Any other difference is an error.

`matmul_share` is the time of the bare matrix product, at the rate measured for a large one, over the time of a lane.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import (
    environment,
    interleaved,
    lane_rows,
    machine_speed,
    peak_memory,
    ratio,
    summary,
    table,
    write,
)
from stage1_vqgan.quantizers import nearest_code

NUM_LATENTS = 4096
SIZES = [(1024, 8), (1024, 64), (8192, 8), (8192, 64)]  # K, D


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
    "tessella": nearest_code,
    "original": original,
    "diffusers": diffusers,
    "vqp": vqp,
}


def inputs(num_codes: int, dim: int) -> tuple[Tensor, Tensor]:
    """Normal latents `(N, D)` and codebook `(K, D)`."""
    generator = torch.Generator().manual_seed(num_codes + dim)
    return torch.randn(NUM_LATENTS, dim, generator=generator), torch.randn(num_codes, dim, generator=generator)


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
    return {"flips": int((codes != best).sum()), "largest_gap": (excess / nearest).max().item()}


def prepared(name: str, num_codes: int, dim: int) -> Callable[[], Tensor]:
    """A lane on its inputs, after a small call that sets up the libraries it needs."""
    latents, codebook = inputs(num_codes, dim)
    LANES[name](latents[:16], codebook[:16])
    return torch.no_grad()(partial(LANES[name], latents, codebook))


def measure(num_codes: int, dim: int, threads: list[int], rounds: int) -> dict[str, Any]:
    """Every lane at one size."""
    latents, codebook = inputs(num_codes, dim)
    lanes = {name: prepared(name, num_codes, dim) for name in LANES}
    result: dict[str, Any] = {"codes": num_codes, "dim": dim, "threads": {}}
    result["agreement"] = {name: near_tie_flips(lane(), latents, codebook) for name, lane in lanes.items()}
    memory = {name: peak_memory(prepared, name, num_codes, dim) for name in LANES}
    result["peak_memory_mb"] = {name: round(value / 2**20, 1) for name, value in memory.items()}
    for count in threads:
        torch.set_num_threads(count)
        speed = machine_speed()
        floor = 2 * NUM_LATENTS * num_codes * dim / speed["matmul_gflops"] / 1e6
        times = interleaved(lanes, rounds)
        result["threads"][count] = {
            "machine": speed,
            **{
                name: summary(values)
                | {
                    "matmul_share": round(floor / summary(values)["median_ms"], 3),
                    "time_ratio": ratio(values, times["tessella"]),
                    "memory_ratio": round(memory["tessella"] / memory[name], 3),
                }
                for name, values in times.items()
            },
        }
    return result


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Lines of the table."""
    flips = result["agreement"]
    return lane_rows(
        result,
        {"K": result["codes"], "D": result["dim"]},
        lambda name, lane: {"flips": flips[name]["flips"], "matmul share": lane["matmul_share"]},
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.code_search", description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", default="runs/benchmarks/code_search.json")
    args = parser.parse_args()
    where = environment()
    results = [measure(*size, args.threads, args.rounds) for size in SIZES]
    print(table([row for result in results for row in rows(result)]))
    write(args.output, {"environment": where, "latents": NUM_LATENTS, "results": results})


if __name__ == "__main__":
    main()
