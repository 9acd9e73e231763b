"""Simulates CUDA graphs on a CPU.

A capture records the operations and does not leave their results. A replay runs them again, from the same tensors into
the same tensors, with the Python numbers of the capture.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stage2_prior.sampling import graphs


class Graph(TorchDispatchMode):
    """Records the operations inside the context. Reading a value on the host is an error, as in a CUDA capture."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.before: list[tuple[Tensor, Tensor]] = []
        self.replays = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert function is not torch.ops.aten._local_scalar_dense.default, "the host reads a value from the device"
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before.append((value, value.clone()))
        out = function(*args, **kwargs)
        self.operations.append((function, args, kwargs, out))
        return out

    def undo(self) -> None:
        while self.before:
            tensor, value = self.before.pop()
            tensor.copy_(value)

    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, out in self.operations:
            inputs = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.untyped_storage().data_ptr() not in inputs:
                    old.copy_(new)


@contextmanager
def _graph(graph: Graph, **settings: Any) -> Iterator[None]:
    with graph:
        yield
    graph.undo()


class _Stream:
    def wait_stream(self, stream: "_Stream") -> None:
        pass


@contextmanager
def _stream(stream: _Stream) -> Iterator[None]:
    yield


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `GraphDecoder` use the simulated graphs."""
    fakes = {
        "CUDAGraph": Graph,
        "graph": _graph,
        "Stream": _Stream,
        "stream": _stream,
        "current_stream": _Stream,
        "graph_pool_handle": lambda: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(graphs.torch.cuda, name, fake)
