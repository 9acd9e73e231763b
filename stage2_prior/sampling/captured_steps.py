"""Sampling steps of fixed shapes: captured as CUDA graphs, compiled if asked to."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

# Steps that torch.compile may make of one function: each sampler and window has its own. It stops at 8 by itself.
MANY = 256

Step = Callable[[int, int], None]


class CapturedSteps:
    """Runs a step that has no number of the host in it, so that it can be repeated as it was captured.

    The step of each (copies, window) is captured once as a CUDA graph, or called if it is not captured.

    Args:
        position: int64 `(1,)`, counts the steps; one of the tensors that they read and write at every call.
        compiled: whether torch.compile makes the step.
        captures: whether there are CUDA graphs.
    """

    def __init__(self, position: Tensor, compiled: bool, captures: bool = False):
        self.position, self.compiled, self.captures = position, compiled, captures
        self.compiled_step: Step | None = None
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        # one step runs at a time and leaves nothing behind but what it writes elsewhere: all use the same memory
        self.pool = torch.cuda.graph_pool_handle() if captures else None

    def run(self, step: Step, copies: int, window: int) -> None:
        """One `step(copies, window)`; it is the same step every time."""
        if self.compiled:
            self.compiled_step = step = self.compiled_step or torch.compile(step, dynamic=False, fullgraph=True)
        with torch._dynamo.config.patch(recompile_limit=MANY) if self.compiled else nullcontext():
            if not self.captures:
                return step(copies, window)
            if (copies, window) not in self.graphs:
                self.graphs[copies, window] = self.capture(step, copies, window)
        self.graphs[copies, window].replay()

    def capture(self, step: Step, copies: int, window: int) -> torch.cuda.CUDAGraph:
        """The step as a CUDA graph, which has not run yet."""
        position = self.position.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries set themselves up, and torch.compile compiles, before the capture
            for _ in range(2):
                step(copies, window)
                self.position.copy_(position)  # what the step wrote is written again when it runs
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # other threads, which pin the memory of batches, may go on
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            step(copies, window)
        return graph
