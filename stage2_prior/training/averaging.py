"""The moving average of a prior's weights, which is evaluated and, at the end, saved as the prior."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback

from configs.states import fill, read_tensors, require_like, write_tensors
from stage2_prior.training.sharding import local_part

FILE_NAME = "average.safetensors"


class WeightAverage(TrainerCallback):
    """Averages the trained weights over the optimizer steps. With FSDP 2, each process averages its shards.

    Args:
        decay_at: maps a number of steps to the decay of the next update; see `TrainingConfig.average_decay`.
        is_on: False computes no average; the run then evaluates and saves the weights themselves.

    Attributes:
        checkpoint: the checkpoint to load the average from; None starts a new one.
    """

    def __init__(self, decay_at: Callable[[int], float], is_on: bool = True):
        self.decay_at, self.is_on = decay_at, is_on
        self.checkpoint: Path | None = None
        self._model: Any = None
        self._weights: dict[str, Tensor] = {}
        self._averages: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Loads the average of the checkpoint, or copies the weights, which Trainer has loaded and sharded before.

        Raises:
            Damaged: the file of the average is missing or damaged.
        """
        if not self.is_on:
            return
        self._model = model
        self._weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._averages = {name: weight.detach().clone() for name, weight in self._weights.items()}
        if self.checkpoint is not None:
            self._load(self.checkpoint / FILE_NAME)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """average ← decay · average + (1 - decay) · weights."""
        if self.is_on:
            update = get_ema_multi_avg_fn(self.decay_at(state.global_step - 1))
            update(_local_parts(self._averages), _local_parts(self._weights), state.global_step)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside this context, the model has the averaged weights. All processes must enter it.

        The values are copied, because optimizer, wrappers and compiled graphs refer to the parameters themselves. The
        second copy fits into the memory of the gradients, which do not exist between two steps.
        """
        if not self._averages:
            yield
            return
        self._reshard()
        weights = [weight.clone() for weight in _local_parts(self._weights)]
        try:
            self._set_weights(_local_parts(self._averages))
            yield
        finally:
            self._reshard()
            self._set_weights(weights)

    def save(self, checkpoint: Path, is_main_process: bool) -> None:
        """Adds the average to a checkpoint. All processes must call this."""
        if self._averages:
            write_tensors(checkpoint / FILE_NAME, self._averages, is_main_process)

    def _load(self, path: Path) -> None:
        saved = read_tensors(path)
        require_like(saved, self._averages, path)
        for name, average in self._averages.items():
            fill(average, saved[name])

    def _set_weights(self, values: Iterable[Tensor]) -> None:
        for weight, value in zip(_local_parts(self._weights), values, strict=True):
            weight.copy_(value)

    def _reshard(self) -> None:
        """Frees the weights that FSDP gathered for the last forward; the next forward would reuse these old values."""
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _local_parts(tensors: dict[str, Tensor]) -> list[Tensor]:
    return [local_part(tensor) for tensor in tensors.values()]
