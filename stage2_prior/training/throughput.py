"""Training speed of a prior: tokens per second, and the share of the machine's FLOP/s that the model uses (MFU)."""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from stage2_prior.compat import without_data
from stage2_prior.pretrained import AUTO_CLASSES
from stage2_prior.vocabulary import Family

# Sides of the square matrices whose product is timed. The side doubles from the first to the last value, but stops when
# a product takes this many seconds.
SIDES = (512, 8192)
LONG_ENOUGH = 0.005


class Throughput:
    """Counts the tokens and the time of training, without the time for logs, evaluations and checkpoints.

    Args:
        device: device of the training. Before the clock stops, the device must have finished its work.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.tokens, self.seconds = 0, 0.0
        self._since: float | None = None

    def count(self, tokens: int) -> None:
        """Adds the tokens of a forward that begins now; the first call starts the clock."""
        self.tokens += tokens
        if self._since is None:
            self._since = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock inside this context."""
        if self._since is not None:
            synchronize(self.device)
            self.seconds += time.perf_counter() - self._since
        yield
        self._since = time.perf_counter()

    def tokens_per_second(self) -> float:
        """Tokens per second since the last call. Call it inside `paused`."""
        speed = self.tokens / self.seconds
        self.tokens, self.seconds = 0, 0.0
        return speed


def training_flops(config: PreTrainedConfig, length: int, family: Family = "causal") -> float:
    """Floating-point operations of the matrix products in training, per token.

    The operations of one forward are counted, without computing it. The backward has twice as many. Attention counts
    as if it were not causal. Recomputation for gradient checkpointing is not counted. For a Llama the result is
    6 N + 12 · layers · width of all heads · length, where N is the number of weights in matrices, without embeddings.

    Args:
        config: configuration of a language model.
        length: tokens of a sequence.
        family: "causal" or "masked".

    Raises:
        NotImplementedError, RuntimeError: the operations of the model depend on its data.

    Source: Chowdhery et al. 2022, "PaLM: scaling language modeling with pathways", appendix B.
    """
    with (
        torch.random.fork_rng(devices=[]),
        without_data(),
        torch.no_grad(),
        FlopCounterMode(display=False) as counter,
    ):
        model = (
            AUTO_CLASSES[family]
            .from_config(copy.deepcopy(config), attn_implementation="eager", experts_implementation="eager")
            .eval()
        )
        cache = {"use_cache": False} if family == "causal" else {}
        model(input_ids=torch.zeros(1, length, dtype=torch.int64), **cache)
    return 3 * counter.get_total_flops() / length


@cache
def matmul_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of square matrix products: the best of a few, measured within 0.3 s.

    A measurement includes the number of threads and the precision, which a table of devices would not.
    """
    side, last = SIDES
    own = torch.Generator(device).manual_seed(0)  # does not change the global generator, which training uses
    while True:
        # random numbers, because a GPU multiplies equal numbers faster
        a, b = (torch.empty(side, side, device=device, dtype=dtype).normal_(generator=own) for _ in range(2))
        seconds = min(_seconds(a, b) for _ in range(4))
        if seconds >= LONG_ENOUGH or side == last:
            return 2 * side**3 / seconds
        side *= 2


def _seconds(a: Any, b: Any) -> float:
    synchronize(a.device)
    since = time.perf_counter()
    a @ b
    synchronize(a.device)
    return time.perf_counter() - since


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished its work; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
