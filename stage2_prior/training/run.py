"""The run around stage 2's training: settings of the trainer, checks, set-up, finish."""

import json
import os
import textwrap
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from configs import ConfigError, Problem, TrainingConfig, check
from configs.hub import push_run
from configs.interruption import StopRequest
from configs.run_folder import RunFolder, holds_work
from stage2_prior.adapters import attach_adapter
from stage2_prior.code_store import CodeStore
from stage2_prior.data import CodeDataset
from stage2_prior.prior import adapt_prior, build_prior, layout_of, load_prior
from stage2_prior.training.averaging import WeightAverage
from stage2_prior.training.config import Stage2Config
from stage2_prior.training.sample_grids import SampleGrids
from stage2_prior.training.selection import BestWeights, Selection, evaluations, has_stopped, is_exhausted
from stage2_prior.training.sharding import check_sharding
from stage2_prior.training.trainer import PriorTrainer, bits_per_pixel
from stage2_prior.vocabulary import FILE_NAME as LAYOUT_NAME, TokenLayout

# Keys of ours that Trainer must not act on: the run resumes, removes old checkpoints and uploads in its own way.
OWN_KEYS = {
    "global_batch_size",
    "resume_from_checkpoint",
    "allow_config_changes",
    "ema_decay",
    "save_total_limit",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
}


class RunCallback(TrainerCallback):
    """Ties Trainer to the run's folder: metrics.jsonl, and the end on request."""

    def __init__(self, run: RunFolder, request: StopRequest):
        self.run, self.request = run, request
        self.signal_number: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)  # those of a checkpoint may have been changed since

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs and "train_runtime" not in logs:  # which is of one session
            self.run.log(state.global_step, logs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.signal_number = self.request.agreed()
        if self.signal_number:
            control.should_save = control.should_training_stop = True


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
        # Trainer looks for a GPU by itself, also where accelerate was told to stay on the CPU
        "use_cpu": parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available(),
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
        average, best = WeightAverage(config.average_decay, config.ema_decay > 0), BestWeights(run.path)
        trainer = PriorTrainer(
            model=initial_prior(config, layout),
            args=arguments,
            train_dataset=CodeDataset(store.split("train"), layout, config.condition_dropout, config.seed),
            eval_dataset=CodeDataset(store.split("validation"), layout),
            callbacks=[callback],
            layout=layout,
            run=run,
            average=average,
            best=best,
        )
        check_sharding(trainer, config.ema_decay)
        patience = config.early_stopping_patience
        trainer.add_callback(Selection(trainer, best if config.keep_best else None, patience))
        if config.num_sample_images:
            number, seed = config.num_sample_images, config.seed
            trainer.add_callback(SampleGrids(trainer, run, layout, config.tokenizer, number, seed))
        checkpoint = run.begin(trainer.accelerator.num_processes)
        if checkpoint is not None:
            average.checkpoint = checkpoint.path
            if has_stopped(checkpoint.path, patience):
                arguments.max_steps = checkpoint.step
        if is_main_process:
            best.restore(checkpoint.path if checkpoint is not None and config.keep_best else None)
            layout.save_pretrained(config.output_dir)
        trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint is not None else None)
        if callback.signal_number and trainer.state.global_step < config.max_steps:
            raise run.stopped(trainer.state.global_step, callback.signal_number)
        state = trainer.state
        if not any(logs["step"] == state.global_step for logs in evaluations(state.log_history)):
            trainer.evaluate()
        if not config.keep_best:
            with average.applied():
                trainer.save_model(config.output_dir)  # on all processes: a sharded model is gathered
        if is_main_process:
            shipped = best.ship() if config.keep_best else evaluations(state.log_history)[-1]
            results = {
                "global_step": state.global_step,
                "train_runtime": round(run.seconds, 1),
                "model_step": shipped["step"],
                "eval_loss": shipped["eval_loss"],
                "bits_per_pixel": bits_per_pixel(shipped["eval_loss"], layout),
            }
            if is_exhausted(state.log_history, patience):
                results["early_stopping_patience"] = patience
                print(f"stopped at step {state.global_step}: no better in the last {patience} evaluations")
            run.finish(results)
            print(f"prior of step {shipped['step']} saved in {Path(config.output_dir).resolve()}")
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
