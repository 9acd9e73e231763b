"""A faster decoder for CUDA: the forward of one token as a CUDA graph, optionally compiled.

A forward has about four hundred kernels, and launching them takes longer than running them. A graph launches them all
at once. A captured step depends on no Python number that changes, because it reads the token and its place from the
device's memory. So the graph can be replayed at every place.

With the Triton attention of attention.py, one graph serves all places. Otherwise, each graph serves `BUCKET` places:
its attention reads the cache up to the last of them and masks the places that have not been written.

`recording.why_not_recordable` states which models are supported.
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

# Number of places that one graph serves without the Triton attention.
BUCKET = 64

# Limit of the versions of a step that torch.compile compiles: one for each decoder and each range of places.
MAX_RECOMPILES = 256

Step = Callable[[int, int], None]


class GraphDecoder(EagerDecoder):
    """Reads single tokens through CUDA graphs, and several at once as `EagerDecoder` does.

    Args:
        prior, num_rows, length: see `EagerDecoder`.
        compiled: whether torch.compile compiles the step before the capture. On a CPU the compiled step runs without a
            graph.
    """

    def __init__(self, prior: PreTrainedModel, num_rows: int, length: int, compiled: bool = False):
        super().__init__(prior, num_rows, length)
        device = prior.device
        self.compiled, self.captures = compiled, device.type == "cuda"
        # A copy that shares the weights: its attention is replaced, while other threads may use the prior itself.
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
        """Reads one token of the first `count` rows and stores the logits. Running it again gives the same result."""
        rows = slice(0, count)
        cache = self.cache.open_at(rows, self.place, window)
        # the Triton attention takes the place in the argument of the mask
        mask = self.place[None, None, None] if self.reads_exactly else cache.mask
        logits = forward(self.model, self.tokens[rows], cache, position_ids=self.place[None], attention_mask=mask)
        self.logits[rows] = logits

    def capture(self, count: int, window: int) -> torch.cuda.CUDAGraph:
        """Captures the step as a CUDA graph, without running it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm-up: libraries initialise and torch.compile compiles before the capture
            for _ in range(2):
                self.run(count, window)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may pin memory during the capture
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            self.run(count, window)
        return graph

    def resized(self, num_rows: int) -> "GraphDecoder":
        if num_rows == self.num_rows:
            return self
        return GraphDecoder(self.prior, num_rows, self.length, self.compiled)
