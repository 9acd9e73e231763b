"""Attention of one token on a GPU, at the bytes per second that it reads:
`python -m benchmarks.decode_attention [--rows 128 512] [--heads 12] [--width 64] [--length 256]`.

Lanes: the Triton kernel, with the positions that it reads at once; torch's attention over exactly what is there; and
over a window of 64 · n positions with a mask, which is what a recorded step has without the kernel. Each is captured
as a CUDA graph of many calls on different memory, so that neither launches nor the cache make up the time.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.measuring import environment, table, write
from stage2_prior import decode_attention_kernel
from stage2_prior.decode_attention_kernel import attend

# Layers whose keys and values are read in turn: they do not fit the cache of a GPU.
LAYERS = 8


def seconds(call: Callable[[], Any], rounds: int) -> float:
    """The least time of a call, replayed as a CUDA graph."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        started = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


@torch.inference_mode()
def measure(rows: int, heads: int, width: int, length: int, seen: int, rounds: int) -> list[dict[str, Any]]:
    """Lines of the table for one number of positions that are there.

    Raises:
        AssertionError: the kernel's result is not torch's.
    """

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    query = random(rows, heads, 1, width)
    layers = [(random(rows, heads, length, width), random(rows, heads, length, width)) for _ in range(LAYERS)]
    last = torch.full((1,), seen - 1, device="cuda")
    window = min(-(-seen // 64) * 64, length)
    mask = (torch.arange(window, device="cuda") < seen)[None, None, None]

    def kernel() -> list[Tensor]:
        return [attend(query, key, value, last, width**-0.5) for key, value in layers]

    def exact() -> list[Tensor]:
        return [scaled_dot_product_attention(query, key[:, :, :seen], value[:, :, :seen]) for key, value in layers]

    def masked() -> list[Tensor]:
        return [scaled_dot_product_attention(query, k[:, :, :window], v[:, :, :window], mask) for k, v in layers]

    torch.testing.assert_close(kernel()[0].transpose(1, 2), exact()[0], rtol=2e-2, atol=2e-2)
    times = {}
    shipped = decode_attention_kernel.LARGEST_BLOCK
    for decode_attention_kernel.LARGEST_BLOCK in (16, 32, 64):
        times[f"kernel, {decode_attention_kernel.LARGEST_BLOCK} at once"] = seconds(kernel, rounds)
    decode_attention_kernel.LARGEST_BLOCK = shipped
    times |= {"torch, exact": seconds(exact, rounds), "torch, window": seconds(masked, rounds)}
    read = LAYERS * 2 * rows * heads * seen * width * 2
    return [
        {"rows": rows, "positions": seen, "lane": lane, "us / layer": round(1e6 * value / LAYERS, 2),
         "GB / s": round(read / value / 1e9)}
        for lane, value in times.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode_attention", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 128, 512])
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", default="runs/benchmarks/decode_attention.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.decode_attention needs a CUDA device; there is none here")
    found = []
    for rows in args.rows:
        for seen in (1, args.length // 4, args.length // 2 + 1, args.length):
            found += measure(rows, args.heads, args.width, args.length, seen, args.rounds)
    print(table(found))
    write(args.output, {"environment": environment(), "rows": found})


if __name__ == "__main__":
    main()
