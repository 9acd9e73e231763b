"""Packages and weight files of frozen networks."""

import contextlib
import importlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from configs.problems import listed


def package(name: str, project: str, extra: str = "metrics") -> ModuleType:
    """Imports an optional package.

    Raises:
        ImportError: it is missing; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        install = f"pip install 'tessella[{extra}]', or pip install {project}"
        raise ImportError(f"needs the package {project}, which cannot be imported ({error}); {install}") from error


@contextlib.contextmanager
def download_errors(url: str) -> Iterator[None]:
    """Turns a failed download of torch.hub into a message.

    Raises:
        FileNotFoundError: it failed; the message names the file to provide.
    """
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    try:
        yield
    except OSError as error:  # URLError is an OSError
        with contextlib.suppress(OSError):
            os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, url.rpartition("/")[2])
        message = f"the weights could not be downloaded ({error}). Put {url} at {path}, or name the file as the weights"
        raise FileNotFoundError(message) from error


def read_weights(file: str | Path) -> dict[str, Any]:
    """The state dict in a file: safetensors, or one of torch.save.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read.
    """
    if not os.path.isfile(file):
        raise FileNotFoundError(
            f"no file {str(file)!r}; allowed are 'pretrained', a file with the weights, or 'random'"
        )
    try:
        if str(file).endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and safetensors each raise their own
        raise ValueError(f"{str(file)!r} holds no state dict ({type(error).__name__}: {error})") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{str(file)!r} holds no state dict but {type(content).__name__}")
    return dict(content)


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copies a state dict into a module; additional tensors are left out, as heads that the module does not have.

    Raises:
        ValueError: a tensor of the module is missing, or has another shape.
    """
    expected = module.state_dict()
    wrong = [
        name
        for name, tensor in expected.items()
        if getattr(weights.get(name), "shape", None) != tensor.shape and not name.endswith("num_batches_tracked")
    ]
    if wrong:
        raise ValueError(f"{source!r} does not hold the weights of this network; missing or misshapen: {listed(wrong)}")
    module.load_state_dict({name: tensor for name, tensor in weights.items() if name in expected}, strict=False)
