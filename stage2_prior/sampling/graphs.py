"""A faster decoder for CUDA: one forward of one token as a CUDA graph, compiled if asked to.

Launching the some four hundred kernels of a forward takes longer than the kernels themselves. A graph launches them
all at once. Nothing in a captured step depends on a Python number that changes, so the graph can be replayed: the
token and its place are read from the device's memory.

With the Triton attention of attention.py one graph serves all places. Other models get a graph for every `BUCKET`
places, whose attention reads a window of the cache and masks the places that have not been written.

It serves the models of `recording.why_not_recordable`.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stage2_prior.compat import allow_recompiles
from stage2_prior.sampling.attention import use_decode_attention
from stage2_prior.sampling.decoder import EagerDecoder, forward

# Places of one graph, where attention reads a window.
BUCKET = 64

# Versions of a step that torch.compile may make: each decoder and window has its own.
MAX_RECOMPILES = 256

Step = Callable[[int, int], None]


class GraphDecoder(EagerDecoder):
    """Reads single tokens through CUDA graphs, and several at once as `EagerDecoder` does.

    Args:
        prior, num_rows, length: see `EagerDecoder`.
        compiled: torch.compile makes the step first. On a CPU there is no graph, only the compiled step.
    """

    def __init__(self, prior: PreTrainedModel, num_rows: int, length: int, compiled: bool = False):
        super().__init__(prior, num_rows, length)
        device = prior.device
        self.compiled, self.captures = compiled, device.type == "cuda"
        # a copy on the same weights, because its attention is another one; other threads may use the prior itself
        tensors = {id(tensor): tensor for tensor in (*prior.parameters(), *prior.buffers())}
        self.model = copy.deepcopy(prior, tensors)
        self.reads_exactly = self.captures and use_decode_attention(self.model)
        self.tokens = torch.zeros(num_rows, 1, dtype=torch.int64, device=device)
        self.place = torch.zeros(1, dtype=torch.int64, device=device)
        self.logits = torch.empty(num_rows, prior.config.vocab_size, device=device)
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.captures else None
        self.run: Step = torch.compile(self.step, dynamic=False, fullgraph=True) if compiled else self.step

    def read(self, rows: slice, tokens: Tensor, start: int) -> Tensor:
        if tokens.shape[1] > 1 or not self.cache.is_allocated or rows.start > 0:
            return super().read(rows, tokens, start)
        self.tokens[rows] = tokens
        self.place.fill_(start)
        window = self.length if self.reads_exactly else min(-(-(start + 1) // BUCKET) * BUCKET, self.length)
        with allow_recompiles(MAX_RECOMPILES) if self.compiled else nullcontext():
            if not self.captures:
                self.run(rows.stop, window)
            else:
                if (rows.stop, window) not in self.graphs:
                    self.graphs[rows.stop, window] = self.capture(rows.stop, window)
                self.graphs[rows.stop, window].replay()
        return self.logits[rows]

    def step(self, count: int, window: int) -> None:
        """Reads one token of the first `count` rows and leaves the logits; it may run twice with the same result."""
        rows = slice(0, count)
        cache = self.cache.open_at(rows, self.place, window)
        # the kernel reads its last place from where others have a mask
        mask = self.place[None, None, None] if self.reads_exactly else cache.mask
        logits = forward(self.model, self.tokens[rows], cache, position_ids=self.place[None], attention_mask=mask)
        self.logits[rows] = logits

    def capture(self, count: int, window: int) -> torch.cuda.CUDAGraph:
        """The step as a CUDA graph, which has not run yet."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries set themselves up, and torch.compile compiles, before the capture
            for _ in range(2):
                self.run(count, window)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads, which pin the memory of batches, may go on during the capture
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            self.run(count, window)
        return graph

    def resized(self, num_rows: int) -> "GraphDecoder":
        if num_rows == self.num_rows:
            return self
        return GraphDecoder(self.prior, num_rows, self.length, self.compiled)
