"""How fast a prior trains: tokens per second, and what share of the machine's matrix products that is."""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedConfig

# The measured product grows from the first side until it takes long enough to be timed, or reaches the last.
SIDES = (512, 8192)
LONG_ENOUGH = 0.005


class Throughput:
    """Counts tokens, and the time of training alone.

    Args:
        device: waited for when the clock is stopped.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.tokens, self.seconds = 0, 0.0
        self._since: float | None = None

    def count(self, tokens: int) -> None:
        """Adds the tokens of a forward that begins now; the first one starts the clock."""
        self.tokens += tokens
        if self._since is None:
            self._since = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock, for what is not training."""
        if self._since is not None:
            synchronize(self.device)
            self.seconds += time.perf_counter() - self._since
        yield
        self._since = time.perf_counter()

    def rate(self) -> float:
        """Tokens per second since the last call; to be called while the clock is stopped."""
        rate = self.tokens / self.seconds
        self.tokens, self.seconds = 0, 0.0
        return rate


def training_operations(config: PreTrainedConfig, length: int) -> float:
    """Floating-point operations of matrix products that training on one token needs.

    Those of a forward are counted as the model runs without data; the backward has twice as many. Attention is counted
    in full, as if it were not causal, and what gradient checkpointing computes again is not counted. For a Llama these
    are 6 N + 12 · layers · width of all heads · length, N the weights in matrices, embeddings left out.

    Args:
        config: of a causal language model.
        length: tokens of a sequence.

    Raises:
        NotImplementedError, RuntimeError: a model whose operations depend on its data.

    Source: Chowdhery et al. 2022, "PaLM: scaling language modeling with pathways", appendix B.
    """
    with (
        torch.random.fork_rng(devices=[]),
        FakeTensorMode(),
        torch.no_grad(),
        FlopCounterMode(display=False) as counter,
    ):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), attn_implementation="eager", experts_implementation="eager"
        ).eval()
        model(input_ids=torch.zeros(1, length, dtype=torch.int64), use_cache=False)
    return 3 * counter.get_total_flops() / length


@cache
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of square matrix products: the best of a few, within 0.3 s.

    Measured rather than looked up: it holds for any machine, threads and precision as they are set.
    """
    side, last = SIDES
    own = torch.Generator(device).manual_seed(0)  # training has its own numbers
    while True:
        # random: a GPU multiplies equal numbers faster
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
    """Waits until the device has done what it was given; a CPU has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
