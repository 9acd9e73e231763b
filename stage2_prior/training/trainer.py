"""`transformers.Trainer` for sequences of codes.

Batches are a pure function of the seed. Checkpoints are checked and complete. Losses are also logged in bits per pixel.
"""

import logging
import math
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import Trainer

from configs.checkpoints import unfinished_path
from configs.index_sampler import IndexSampler
from configs.interruption import Diverged, leave_signals_to_main
from configs.run_folder import RunFolder
from stage2_prior.data import IGNORED, CodeDataset, collate
from stage2_prior.training import checkpointing
from stage2_prior.training.averaging import WeightAverage
from stage2_prior.training.contrastive import ContrastiveLoss
from stage2_prior.training.selection import BestWeights
from stage2_prior.training.sharding import local_part
from stage2_prior.training.throughput import Throughput, matmul_flops_per_second, training_flops
from stage2_prior.vocabulary import TokenLayout

logger = logging.getLogger(__name__)


class PriorTrainer(Trainer):
    """Trainer for a prior.

    Args:
        layout: the token layout.
        run: the folder of the run.
        average: the moving average of the weights, which is evaluated.
        best: the folder of the best weights; every checkpoint gets a copy.
        contrast: the loss of a training with `PairDataset`; None trains by likelihood.
        args, kwargs: passed to `transformers.Trainer`.
    """

    def __init__(
        self,
        *args: Any,
        layout: TokenLayout,
        run: RunFolder,
        average: WeightAverage,
        best: BestWeights,
        contrast: ContrastiveLoss | None = None,
        **kwargs: Any,
    ):
        if layout.family == "masked":
            kwargs["compute_loss_func"] = self.loss_of_hidden_codes
        super().__init__(*args, **kwargs)
        self.layout, self.run, self.average, self.best, self.contrast = layout, run, average, best, contrast
        self.add_callback(average)
        self._losses: list[tuple[int, Tensor]] = []
        self._nats_and_codes = torch.zeros(2, dtype=torch.float64)  # sums over the evaluation so far
        self.throughput = Throughput(self.args.device)

    def get_train_dataloader(self) -> DataLoader:
        """The batches of this process for the whole run, as one epoch of Trainer. Only the seed determines them."""
        args = self.args
        batches = args.max_steps * args.gradient_accumulation_steps
        sampler = IndexSampler(
            len(cast(CodeDataset, self.train_dataset)),
            args.train_batch_size,
            0,
            batches,
            args.seed,
            args.process_index,
            args.world_size,
        )
        return self._loader(self.train_dataset, batch_sampler=sampler)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The validation rows of this process. Rows below 0 are padding: all processes have equally many."""
        dataset = cast(CodeDataset, eval_dataset or self.eval_dataset)
        rows = list(range(self.args.process_index, len(dataset), self.args.world_size))
        rows += [-1] * (-(-len(dataset) // self.args.world_size) - len(rows))
        return self._loader(dataset, sampler=rows, batch_size=self.args.eval_batch_size)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluates the averaged weights, and calls the callbacks with them."""
        self.require_finite()
        with self.average.applied():
            return super().evaluate(*args, **kwargs)

    def prediction_step(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Adds up the nats of all codes, except those of padding rows."""
        output: Any = super().prediction_step(model, inputs, *args, **kwargs)
        loss = output[0]
        codes = (inputs["labels"] != IGNORED).sum().to(loss.device)
        nats = torch.where(codes > 0, loss.double() * codes, 0.0)  # the mean of no codes is NaN
        self._nats_and_codes += torch.stack([nats, codes.double()]).cpu()
        return output

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The loss is the mean over the codes of all processes, each counted once."""
        self._nats_and_codes = torch.zeros(2, dtype=torch.float64)
        output: Any = super().evaluation_loop(*args, **kwargs)
        nats, codes = self.accelerator.reduce(self._nats_and_codes.float().to(self.args.device)).tolist()
        output.metrics["eval_loss"] = nats / codes
        if not math.isfinite(nats):
            raise self._diverged("the validation loss is not finite")
        return output

    def _loader(self, dataset: Any, **kwargs: Any) -> DataLoader:
        pin_memory = self.args.dataloader_pin_memory and self.args.device.type == "cuda"
        workers = self.args.dataloader_num_workers
        return DataLoader(
            dataset,
            collate_fn=collate,
            num_workers=workers,
            pin_memory=pin_memory,
            worker_init_fn=leave_signals_to_main,
            **kwargs,
        )

    def training_step(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Runs forward and backward. `require_finite` checks the stored loss before the next log or checkpoint."""
        self.throughput.count(inputs["input_ids"].numel())
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._losses.append((self.state.global_step, loss.detach()))
        return loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """In an evaluation, the mean over the codes of this process, which `prediction_step` adds up.

        Trainer divides it by the codes of all processes, which may have different numbers of them.
        """
        if self.contrast is not None and model.training:
            loss = self.contrast(model, self._model, inputs)
            # If Trainer has counted items, it does not divide by the number of micro-batches, which are equally large.
            return loss if num_items_in_batch is None else loss / self.current_gradient_accumulation_steps
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch if model.training else None)

    def loss_of_hidden_codes(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """The mean cross-entropy of the hidden codes, over all micro-batches and processes of a step.

        Not the model's own: that of some models is the mean over a micro-batch, which Trainer does not expect.
        """
        hidden = labels != IGNORED
        smoothing = self.args.label_smoothing_factor
        nats = cross_entropy(outputs.logits[hidden].float(), labels[hidden], reduction="sum", label_smoothing=smoothing)
        return nats / (hidden.sum() if num_items_in_batch is None else num_items_in_batch)

    def require_finite(self) -> None:
        """Ends the run if a loss since the last call, or a weight, is not finite. All processes must call this.

        Raises:
            Diverged: the message names the step.
        """
        model = self.accelerator.unwrap_model(self.model)
        finite = [local_part(parameter).isfinite().all() for parameter in model.parameters()]
        losses = torch.stack([loss.float() for _, loss in self._losses]).isfinite() if self._losses else torch.ones(1)
        bad = torch.stack([~losses.all().to(finite[0].device), ~torch.stack(finite).all()])
        found = self.accelerator.gather(bad[None]).any(0).tolist()
        if any(found):
            steps = [step + 1 for step, loss in self._losses if not loss.isfinite()]
            raise self._diverged(f"the loss was not finite at step {steps[0]}" if steps else "a weight is not finite")
        self._losses.clear()

    def _require_finite_moments(self) -> None:
        """Ends the run if a tensor of the optimizer's state is not finite. All processes must call this."""
        states = cast(Any, self.optimizer).state.values()
        moments = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        finite = all(bool(local_part(value).isfinite().all()) for value in moments)
        if not self.accelerator.gather(torch.tensor([finite], device=self.args.device)).all():
            raise self._diverged("the state of the optimizer is not finite")

    def _diverged(self, reason: str) -> Diverged:
        return self.run.diverged(f"{reason} (now at step {self.state.global_step})")

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Completes Trainer's checkpoint with the average and the best weights, see configs/checkpoints.py."""
        self.require_finite()
        self._require_finite_moments()
        step = self.state.global_step
        with self.run.saving_checkpoint(step, self._checkpoint_size()):
            super()._save_checkpoint(*args, **kwargs)
            unfinished = unfinished_path(self.run.path, step)
            self.average.save(unfinished, self.is_world_process_zero())
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                self.best.copy_to(unfinished)
                self.run.publish(step, self.accelerator.num_processes)
            self.accelerator.wait_for_everyone()

    def _checkpoint_size(self) -> int:
        """Bytes of a checkpoint at least: the weights; and of the trained ones two moments, and the average."""
        parameters = list(cast(Any, self.model).parameters())
        trained = sum(weight.numel() * weight.element_size() for weight in parameters if weight.requires_grad)
        whole = 0 if hasattr(self.model, "peft_config") else sum(w.numel() * w.element_size() for w in parameters)
        return whole + (3 if self.average.is_on else 2) * trained

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Saves the weights only; Trainer's method also pickles its arguments."""
        if self.args.should_save:
            checkpointing.save_weights(self._model, Path(cast(str, output_dir)), state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpointing.load_weights(self._model, Path(resume_from_checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Trainer's method would write pickles."""
        checkpointing.save_states(self, Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpointing.load_states(self, Path(checkpoint))

    def _save_scaler(self, output_dir: str) -> None:
        """`_save_optimizer_and_scheduler` saves it."""

    def _load_scaler(self, checkpoint: str | None) -> None:
        """`_load_optimizer_and_scheduler` loads it."""

    def _save_rng_state(self, output_dir: str) -> None:
        """Every step has its own seed, see `RunCallback`."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Every step has its own seed, see `RunCallback`."""

    @property
    def _model(self) -> Any:
        """The prior, without wrappers."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _get_output_dir(self, *args: Any, **kwargs: Any) -> str:
        """The folder in which Trainer writes its checkpoints."""
        return str(unfinished_path(self.run.path, self.state.global_step).parent)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Stops the clock of the throughput during logs, evaluations and saves."""
        control = self.control
        if control.should_log or control.should_evaluate or control.should_save:
            with self.throughput.paused():
                super()._maybe_log_save_evaluate(*args, **kwargs)

    @cached_property
    def _ideal_tokens_per_second(self) -> float | None:
        """Tokens per second if all processes computed only the matrix products of the model, at full speed."""
        args = self.args
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        flops_per_second = torch.tensor(matmul_flops_per_second(args.device, dtype), device=args.device)
        total = self.accelerator.reduce(flops_per_second, "sum").item()
        try:
            config, layout = self.accelerator.unwrap_model(self.model).config, self.layout
            return total / training_flops(config, layout.num_positions, layout.family)
        except (NotImplementedError, RuntimeError) as error:
            logger.warning("mfu is not logged: the operations of this prior cannot be counted (%s)", error)
            return None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds bits per pixel and perplexity to a loss in nats per code, and the training speed.

        The loss of a masked prior is no likelihood of an image, so it has neither.
        """
        if "loss" in logs:
            self.require_finite()
            logs["tokens_per_second"] = self.throughput.tokens_per_second() * self.args.world_size
            if self._ideal_tokens_per_second is not None:
                logs["mfu"] = logs["tokens_per_second"] / self._ideal_tokens_per_second
        rows = self.args.world_size * self.args.train_batch_size * self.args.gradient_accumulation_steps
        # Trainer takes the whole run for one epoch: count the epochs of the code store instead.
        self.state.epoch = self.state.global_step * rows / len(cast(CodeDataset, self.train_dataset))
        if "loss" in logs and self.contrast is not None:
            own, other = self.accelerator.reduce(self.contrast.right(), "mean").tolist()
            logs |= {"own_condition_accuracy": own, "other_condition_accuracy": other}
        for name in ("loss", "eval_loss") if self.contrast is None else ("eval_loss",):
            if name in logs and self.layout.family == "causal":
                prefix = name.removesuffix("loss")
                logs[f"{prefix}bits_per_pixel"] = bits_per_pixel(logs[name], self.layout)
                logs[f"{prefix}perplexity"] = math.exp(min(logs[name], 80.0))
        super().log(logs, *args, **kwargs)


def bits_per_pixel(nats_per_code: float, layout: TokenLayout) -> float:
    """Total nats of an image's codes / (ln 2 · H · W)."""
    return nats_per_code * layout.length / (math.log(2) * layout.pixels)
