"""The training of stage 2: `transformers.Trainer`, configured for sequences of codes."""

import json
import math
import os
import textwrap
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from configs import ConfigError, Problem, TrainingConfig, check
from configs.checkpoints import complete_checkpoints, unfinished_path
from configs.interruption import Diverged, StopRequest, leave_signals_to_main
from configs.run_folder import RunFolder, holds_work, push_run
from stage1_vqgan import IndexSampler
from stage2_prior.adapters import attach_adapter
from stage2_prior.code_store import CodeStore
from stage2_prior.data import IGNORED, CodeDataset, collate
from stage2_prior.prior import adapt_prior, build_prior, layout_of, load_prior
from stage2_prior.training_config import Stage2Config
from stage2_prior.vocabulary import FILE_NAME as LAYOUT_NAME
from stage2_prior.vocabulary import TokenLayout

# Keys of ours that Trainer must not act on: the run resumes, removes old checkpoints and uploads in its own way.
OWN_KEYS = {
    "global_batch_size",
    "resume_from_checkpoint",
    "allow_config_changes",
    "save_total_limit",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
}


class PriorTrainer(Trainer):
    """Trainer with keyed batches, and losses in the units of the field."""

    def __init__(self, *args: Any, layout: TokenLayout, run: RunFolder, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.layout, self.run = layout, run
        self._losses: list[tuple[int, Tensor]] = []
        self._evaluated = torch.zeros(2, dtype=torch.float64)  # nats and codes

    def get_train_dataloader(self) -> DataLoader:
        """All batches of the run in one pass; a pure function of the seed, cut for this process already."""
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
        """The validation rows of this process; all processes get as many batches, filled up with rows below 0."""
        dataset = cast(CodeDataset, eval_dataset or self.eval_dataset)
        rows = list(range(self.args.process_index, len(dataset), self.args.world_size))
        rows += [-1] * (-(-len(dataset) // self.args.world_size) - len(rows))
        return self._loader(dataset, sampler=rows, batch_size=self.args.eval_batch_size)

    def prediction_step(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Trainer's, adding up the nats of all codes that count."""
        output: Any = super().prediction_step(model, inputs, *args, **kwargs)
        loss = output[0]
        codes = (inputs["labels"] != IGNORED).sum().to(loss.device)
        self._evaluated += torch.stack([loss.double().nan_to_num() * codes, codes.double()]).cpu()
        return output

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, with the mean over the codes of all processes, each once, as the loss."""
        self._evaluated = torch.zeros(2, dtype=torch.float64)
        output: Any = super().evaluation_loop(*args, **kwargs)
        nats, codes = self.accelerator.reduce(self._evaluated.float().to(self.args.device)).tolist()
        output.metrics["eval_loss"] = nats / codes
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

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One forward and backward; its loss is kept to be looked at before the next log or checkpoint."""
        loss = super().training_step(*args, **kwargs)
        self._losses.append((self.state.global_step, loss.detach()))
        return loss

    def require_finite(self) -> None:
        """Ends the run if a loss since the last call, or a weight, is not finite; all processes must call this.

        Raises:
            Diverged: naming the step.
        """
        model = self.accelerator.unwrap_model(self.model)
        parameters = (getattr(tensor, "_local_tensor", tensor) for tensor in model.parameters())  # of sharded ones
        finite = [tensor.isfinite().all() for tensor in parameters]
        losses = torch.stack([loss.float() for _, loss in self._losses]).isfinite() if self._losses else torch.ones(1)
        bad = torch.stack([~losses.all().to(finite[0].device), ~torch.stack(finite).all()])
        found = self.accelerator.gather(bad[None]).any(0).tolist()
        if any(found):
            steps = [step + 1 for step, loss in self._losses if not loss.isfinite()]
            what = f"the loss was not finite at step {steps[0]}" if steps else "a weight is not finite"
            existing = complete_checkpoints(self.run.path)
            saved = f"the last good checkpoint is {existing[-1].path}" if existing else "no checkpoint was saved yet"
            advice = "Try a lower learning_rate, more warmup_steps, max_grad_norm 1, or bf16 false"
            raise Diverged(f"{what} (now at step {self.state.global_step}); {saved}. {advice}")
        self._losses.clear()

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's checkpoint, written beside and then published, see configs/checkpoints.py."""
        self.require_finite()
        super()._save_checkpoint(*args, **kwargs)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            self.run.publish(self.state.global_step, self.accelerator.num_processes)
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, *args: Any, **kwargs: Any) -> str:
        """Where Trainer puts its checkpoints."""
        return str(unfinished_path(self.run.path, self.state.global_step).parent)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds bits per pixel and perplexity to a loss in nats per code."""
        if "loss" in logs:
            self.require_finite()
        rows = self.args.world_size * self.args.train_batch_size * self.args.gradient_accumulation_steps
        self.state.epoch = self.state.global_step * rows / len(cast(CodeDataset, self.train_dataset))  # not of one pass
        for name in ("loss", "eval_loss"):
            if name in logs:
                prefix = name.removesuffix("loss")
                logs[f"{prefix}bits_per_pixel"] = bits_per_pixel(logs[name], self.layout)
                logs[f"{prefix}perplexity"] = math.exp(min(logs[name], 80.0))
        super().log(logs, *args, **kwargs)


class RunCallback(TrainerCallback):
    """Ties Trainer to the run's folder: metrics.jsonl, and the end on request."""

    def __init__(self, run: RunFolder, request: StopRequest):
        self.run, self.request = run, request
        self.signal_number: int | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs and "train_runtime" not in logs:  # which is of one session
            self.run.log(state.global_step, logs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.signal_number = self.request.agreed()
        if self.signal_number:
            control.should_save = control.should_training_stop = True


def bits_per_pixel(nats_per_code: float, layout: TokenLayout) -> float:
    """Total nats of an image's codes / (ln 2 · H · W)."""
    return nats_per_code * layout.length / (math.log(2) * layout.pixels)


def training_arguments(config: Stage2Config) -> TrainingArguments:
    """TrainingArguments from the keys both share, and those of the `training_arguments` section.

    Raises:
        ConfigError: transformers refuses a setting.
    """
    shared = {field.name: getattr(config, field.name) for field in fields(TrainingConfig) if field.name not in OWN_KEYS}
    defaults = {
        "ddp_find_unused_parameters": False,  # every parameter takes part in every step
        "eval_strategy": "steps",
        "prediction_loss_only": True,
        "save_strategy": "steps",
        "logging_nan_inf_filter": False,  # a loss that is not finite ends the run instead of being hidden
        "use_cpu": not torch.accelerator.is_available(),
    }
    defaults["per_device_train_batch_size"] = config.device_batch_size(int(os.environ.get("WORLD_SIZE", "1")))
    try:
        return TrainingArguments(**{**shared, **defaults, **config.training_arguments})
    except (ImportError, KeyError, TypeError, ValueError) as error:
        reason = textwrap.shorten(str(error), 200, placeholder=" …")
        raise ConfigError([Problem("training_arguments", f"transformers refuses these settings: {reason}")]) from error


def train(config: Stage2Config) -> PreTrainedModel:
    """Trains a prior, or goes on with a run that was interrupted, and saves it in `config.output_dir`.

    Returns:
        The trained prior.

    Raises:
        ConfigError: the configuration cannot work, there are no codes, or the folder holds a run with other settings,
            or is in use.
        Diverged: a loss or a weight is not finite any more.
        Stopped: SIGTERM or Ctrl-C; a checkpoint was saved.
    """
    config = check(config)
    store = CodeStore(config.code_store)
    check_codes(config, store)
    layout = replace(store.layout, has_null=not store.layout.num_classes or config.condition_dropout > 0)
    arguments = training_arguments(config)
    is_main_process = arguments.process_index == 0
    with RunFolder(config, is_main_process) as run, StopRequest() as request:
        check_run(config, layout)
        if run.finished is not None:
            if is_main_process:
                print(
                    f"{config.output_dir} holds the finished run ({run.finished['global_step']} steps); nothing to do"
                )
            if config.push_to_hub and is_main_process:
                print(push_run(config))
            return load_prior(config.output_dir)
        set_seed(config.seed)
        callback = RunCallback(run, request)
        trainer = PriorTrainer(
            model=initial_prior(config, layout),
            args=arguments,
            train_dataset=CodeDataset(store.split("train"), layout, config.condition_dropout, config.seed),
            eval_dataset=CodeDataset(store.split("validation"), layout),
            callbacks=[callback],
            layout=layout,
            run=run,
        )
        checkpoint = run.begin(trainer.accelerator.num_processes)
        if is_main_process:
            layout.save_pretrained(config.output_dir)
        trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint is not None else None)
        if callback.signal_number and trainer.state.global_step < config.max_steps:
            raise run.stopped(trainer.state.global_step, callback.signal_number)
        evaluated = [logs for logs in trainer.state.log_history if "eval_loss" in logs]
        if not evaluated or evaluated[-1]["step"] != config.max_steps:
            evaluated = [trainer.evaluate()]
        metrics = evaluated[-1]
        trainer.save_model(config.output_dir)  # on all processes: a sharded model is gathered
        if is_main_process:
            results = {
                "global_step": trainer.state.global_step,
                "train_runtime": round(run.seconds, 1),
                "eval_loss": metrics["eval_loss"],
                "bits_per_pixel": bits_per_pixel(metrics["eval_loss"], layout),
            }
            run.finish(results)
            print(f"prior saved in {Path(config.output_dir).resolve()}")
            if config.push_to_hub:
                print(push_run(config))
        trainer.accelerator.wait_for_everyone()
    return load_prior(config.output_dir)


def initial_prior(config: Stage2Config, layout: TokenLayout) -> PreTrainedModel:
    """The prior before its first step: a new one, or the one to fine-tune, if so with an adapter."""
    base = config.model_name_or_path
    if base is None:
        return build_prior(config.model, layout)
    prior = adapt_prior(base, config.model, layout)
    if not config.lora.r:
        return prior
    # with other conditions the base has other rows for them, or none: then the adapter brings them all
    conditions = range(layout.num_codes, layout.vocab_size) if layout_of(base) != layout else []
    return attach_adapter(prior, base, config.lora, list(conditions))


def check_codes(config: Stage2Config, store: CodeStore) -> None:
    """Refuses a store whose codes are not those the configuration describes.

    Raises:
        ConfigError: naming what differs.
    """
    origin, fingerprint = store.manifest["origin"], store.layout.tokenizer_fingerprint
    wanted = {"num_views": config.num_views, "data": config.data.identity()}
    problems = [
        Problem(key, f"{config.code_store} was made with {origin[key]!r}, the configuration says {value!r}")
        for key, value in wanted.items()
        if origin[key] != value
    ]
    tokenizer = Path(config.tokenizer) / "config.json"
    if tokenizer.is_file() and json.loads(tokenizer.read_text()).get("fingerprint") != fingerprint:
        message = (
            f"received {config.tokenizer!r}, but {config.code_store} holds codes of another tokenizer ({fingerprint}); "
            "choose another code_store and run stage2_prior.tokenize"
        )
        problems.append(Problem("tokenizer", message))
    if problems:
        raise ConfigError(problems, "codes")


def check_run(config: Stage2Config, layout: TokenLayout) -> None:
    """Refuses to go on with a run that was started on the codes of another tokenizer.

    Raises:
        ConfigError: the run's folder holds work on other codes.
    """
    folder = Path(config.output_dir)
    if not (holds_work(folder) and (folder / LAYOUT_NAME).is_file()):
        return
    if TokenLayout.from_pretrained(folder).tokenizer_fingerprint != layout.tokenizer_fingerprint:
        message = f"{folder} holds a run on the codes of another tokenizer; choose another folder, or remove it"
        raise ConfigError([Problem("output_dir", message)], "codes")
