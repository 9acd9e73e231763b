"""Attention of one token of each sequence: the Triton kernel of the sampler compared with torch.

"torch, exact" is torch's attention over the written places of the cache. "torch, window" reads 64 · n places with a
mask, as a recorded step does without the kernel. A call computes eight layers in one CUDA graph, as in a sampling step;
their keys and values exceed the cache of a GPU. The floor is the time to read keys and values once.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.case import OURS, Case, Prepared
from benchmarks.machine import Ceilings

LAYERS, HEADS, WIDTH, LENGTH = 8, 12, 64, 256
# Number of sequences, and of written places.
SETTINGS = {
    "cpu": [],
    "gpu": [(rows, seen) for rows in (128, 512) for seen in (LENGTH // 2 + 1, LENGTH)],
    "tiny": [(2, LENGTH // 2 + 1)],
}


class Inputs(NamedTuple):
    """Random queries `(rows, heads, 1, width)`, keys and values of each layer, and the last written place."""

    query: Tensor
    layers: list[tuple[Tensor, Tensor]]
    last: Tensor
    seen: int

    @classmethod
    def random(cls, rows: int, seen: int, device: torch.device) -> "Inputs":
        """bfloat16."""
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, generator=generator).bfloat16()

        layers = [(draw(rows, HEADS, LENGTH, WIDTH), draw(rows, HEADS, LENGTH, WIDTH)) for _ in range(LAYERS)]
        return cls(draw(rows, HEADS, 1, WIDTH), layers, torch.full((1,), seen - 1, device=device), seen)


def kernel(inputs: Inputs) -> list[Tensor]:
    """The Triton kernel, called as in the sampler."""
    from stage2_prior.sampling.attention_kernel import attend

    found = [attend(inputs.query, key, value, inputs.last, WIDTH**-0.5) for key, value in inputs.layers]
    return [each.transpose(1, 2) for each in found]


def exact(inputs: Inputs) -> list[Tensor]:
    """torch's attention over the written places. A recorded step cannot do this, because their number changes."""
    seen = inputs.seen
    return [scaled_dot_product_attention(inputs.query, k[:, :, :seen], v[:, :, :seen]) for k, v in inputs.layers]


def window(inputs: Inputs) -> list[Tensor]:
    """torch's attention over 64 · n places with a mask."""
    size = min(-(-inputs.seen // 64) * 64, LENGTH)
    mask = (torch.arange(size, device=inputs.last.device) <= inputs.last)[None, None, None]
    return [scaled_dot_product_attention(inputs.query, k[:, :, :size], v[:, :, :size], mask) for k, v in inputs.layers]


LANES: dict[str, Callable[[Inputs], list[Tensor]]] = {OURS: kernel, "torch, exact": exact, "torch, window": window}


@torch.inference_mode()
def prepared(lane: str, rows: int, seen: int, device: torch.device) -> Prepared:
    """Captures all layers of a lane in a CUDA graph."""
    inputs = Inputs.random(rows, seen, device)
    LANES[lane](inputs)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = LANES[lane](inputs)

    def replay() -> list[Tensor]:
        graph.replay()
        return kept

    return replay


@torch.inference_mode()
def agree(rows: int, seen: int, device: torch.device) -> Mapping[str, Any]:
    """The largest difference from torch's attention in float32, divided by the standard deviation.

    Raises:
        AssertionError: the difference is above 5e-2.
    """
    inputs = Inputs.random(rows, seen, device)
    key, value = (states[:, :, :seen].float() for states in inputs.layers[0])
    expected = scaled_dot_product_attention(inputs.query.float(), key, value)
    found = {lane: ((call(inputs)[0] - expected).abs().max() / expected.std()).item() for lane, call in LANES.items()}
    assert max(found.values()) <= 5e-2, found
    return {"largest difference": {lane: float(f"{value:.1e}") for lane, value in found.items()}}


def read_once(traffic: int, ceilings: Ceilings) -> float:
    """Least seconds."""
    return ceilings.seconds(0, traffic)


def cases(suite: str, device: torch.device, data: str | None) -> Iterator[Case]:
    """One case for each size, on a GPU only."""
    for rows, seen in SETTINGS[suite] if device.type == "cuda" else []:
        traffic = LAYERS * 2 * rows * HEADS * seen * WIDTH * torch.bfloat16.itemsize
        yield Case(
            row="decode attention",
            setting=f"{rows} sequences, {seen} positions",
            lanes={lane: partial(prepared, lane, rows, seen, device) for lane in LANES},
            agree=partial(agree, rows, seen, device),
            unit="layers/s",
            count=LAYERS,
            floor=partial(read_once, traffic),
            dtype=torch.bfloat16,
        )
