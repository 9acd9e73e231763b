"""The moving average of a prior's weights: saved with checkpoints, and taken in their place to evaluate and ship."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback

FILE_NAME = "average.safetensors"


class WeightAverage(TrainerCallback):
    """Averages the trained weights over the steps; of weights that FSDP 2 has sharded, every process averages its part.

    Args:
        decay_at: of the average, at the update after so many steps; see `TrainingConfig.average_decay`.
        is_on: False keeps no average: the weights are evaluated and saved as they are.
    """

    def __init__(self, decay_at: Callable[[int], float], is_on: bool = True):
        self.decay_at, self.is_on = decay_at, is_on
        self.checkpoint: Path | None = None
        self._model: Any = None
        self._weights: dict[str, Tensor] = {}
        self._averages: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """The average begins as the weights, which by now are sharded and loaded; or it is that of the checkpoint."""
        if not self.is_on:
            return
        self._model = model
        self._weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._averages = {name: weight.detach().clone() for name, weight in self._weights.items()}
        if self.checkpoint is not None and (self.checkpoint / FILE_NAME).is_file():
            self._load(self.checkpoint / FILE_NAME)

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.is_on:
            decay = self.decay_at(state.global_step - 1)
            torch._foreach_lerp_(_local(self._averages), _local(self._weights), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside, and its own again afterwards; all processes must enter.

        Values are copied: optimizer, wrappers and compiled graphs hold on to the tensors themselves. There is room for
        a second copy, for between two steps there are no gradients.
        """
        if not self._averages:
            yield
            return
        self._reshard()
        weights = [weight.detach().clone() for weight in _local(self._weights)]
        try:
            self._fill(_local(self._averages))
            yield
        finally:
            self._reshard()
            self._fill(weights)

    def save(self, checkpoint: Path, is_main_process: bool) -> None:
        """Adds the average to a checkpoint; all processes must call this."""
        whole = {}
        for name, average in self._averages.items():
            tensor = average.full_tensor() if isinstance(average, DTensor) else average
            if is_main_process:
                whole[name] = tensor.cpu()
        if whole:
            save_file(whole, checkpoint / FILE_NAME)

    @torch.no_grad()
    def _load(self, path: Path) -> None:
        saved = load_file(path)
        for name, average in self._averages.items():
            if isinstance(average, DTensor):  # each process takes its part of what it has read
                part = distribute_tensor(saved[name], average.device_mesh, average.placements, src_data_rank=None)
                average.to_local().copy_(part.to_local())
            else:
                average.copy_(saved[name])

    @torch.no_grad()
    def _fill(self, values: list[Tensor]) -> None:
        torch._foreach_copy_(_local(self._weights), values)

    def _reshard(self) -> None:
        """Drops whole weights that FSDP still holds from the last forward: it would compute with those again."""
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _local(tensors: dict[str, Tensor]) -> list[Tensor]:
    """What this process holds of tensors that may be sharded."""
    return [getattr(tensor, "_local_tensor", tensor) for tensor in tensors.values()]
