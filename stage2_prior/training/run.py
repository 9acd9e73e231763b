"""A training run of stage 2, from its configuration to the saved prior."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments, set_seed

from configs import ConfigError, Problem, check
from configs.automatic import decided
from configs.files import read_json
from configs.interruption import StopRequest
from configs.opening import print_facts, run_facts
from configs.problems import shown
from configs.randomness import seed_from
from configs.resumed_settings import differences
from configs.run_folder import RunFolder, holds_work
from configs.stalls import watched_for_stalls
from stage2_prior.adapters import attach_adapter
from stage2_prior.code_store import CodeStore
from stage2_prior.condition_tokenizers import (
    check_given_tokenizers,
    copy_tokenizers,
    require_tokenizers,
    without_tokenizers,
)
from stage2_prior.data import CodeDataset
from stage2_prior.export import export_prior
from stage2_prior.language_model import is_language_model, prior_from_language_model
from stage2_prior.masking import for_family
from stage2_prior.prior import adapt_prior, build_prior, layout_of, load_prior
from stage2_prior.training.arguments import training_arguments
from stage2_prior.training.averaging import FILE_NAME as AVERAGE_NAME, WeightAverage
from stage2_prior.training.checkpointing import check_checkpoint, refusing_damage
from stage2_prior.training.config import Stage2Config
from stage2_prior.training.contrastive import ContrastiveLoss, PairDataset, check_contrast
from stage2_prior.training.cpu_attention import choose_attention
from stage2_prior.training.memory import check_training_memory
from stage2_prior.training.sample_grids import SampleGrids
from stage2_prior.training.selection import BestWeights, Selection, evaluations, is_exhausted
from stage2_prior.training.sharding import check_sharding
from stage2_prior.training.token_dropout import add_token_dropout
from stage2_prior.training.trackers import SettingsOnTrackers
from stage2_prior.training.trainer import PriorTrainer, bits_per_pixel
from stage2_prior.vocabulary import FILE_NAME as LAYOUT_NAME, TokenLayout


class RunCallback(TrainerCallback):
    """Seeds every step, writes Trainer's logs to metrics.jsonl, and stops Trainer when a signal asks for it."""

    def __init__(self, run: RunFolder, request: StopRequest):
        self.run, self.request = run, request
        self.signal_number: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The state of a checkpoint has the intervals of its session: take the present ones.
        state.compute_steps(args, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        is_summary = logs is not None and "train_runtime" in logs  # Trainer's last log summarises one session
        if state.is_world_process_zero and logs and not is_summary:
            self.run.log(state.global_step, logs)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Seed dropout by the step, so that a resumed run draws the same numbers.
        torch.manual_seed(seed_from(args.seed, state.global_step, args.process_index))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.signal_number = self.request.agreed_signal()
        if self.signal_number:
            control.should_save = control.should_training_stop = True


def train(config: Stage2Config) -> PreTrainedModel:
    """Trains a prior, or resumes an interrupted run, and saves the prior in `config.output_dir`.

    Returns:
        The trained prior.

    Raises:
        ConfigError: the configuration cannot work; the code store is missing or has other codes; or the folder is in
            use, or holds a run with other settings.
        Diverged: a loss or a weight is not finite.
        Stopped: SIGTERM or Ctrl-C; a checkpoint was saved.
    """
    config = decided(check(config))
    store, layout = open_codes(config)
    arguments = training_arguments(config)
    with (
        watched_for_stalls(config.ddp_timeout),
        RunFolder(config, arguments.process_index == 0, export_prior) as run,
        StopRequest() as request,
    ):
        check_run(config, layout)
        if run.report_if_finished():
            with run.loading_result():
                return load_prior(config.output_dir)
        training = Training(run, request, arguments, store, layout)
        training.resume()
        training.steps()
        return training.finish()


class Training:
    """A run of stage 2: the prior, its Trainer, and the callbacks that select, average and sample.

    Args:
        run: the folder of the run.
        request: states after every step whether a signal asks to stop.
        arguments: arguments of Trainer.
        store: the code store.
        layout: the token layout.
    """

    def __init__(
        self, run: RunFolder, request: StopRequest, arguments: TrainingArguments, store: CodeStore, layout: TokenLayout
    ):
        config: Stage2Config = run.config
        self.config, self.run, self.layout, self.store = config, run, layout, store
        set_seed(config.seed)
        self.callback = RunCallback(run, request)
        self.average, self.best = WeightAverage(config.average_decay, config.ema_decay > 0), BestWeights(run.path)
        prior = initial_prior(config, layout)
        choose_attention(prior, arguments.device, arguments.bf16)
        contrast = ContrastiveLoss(prior, config.cca) if config.cca.beta else None
        add_token_dropout(prior, config.token_dropout)
        sequences = CodeDataset(
            store.split("train"), layout, config.condition_dropout, config.seed, config.segment_dropout
        )
        self.trainer = PriorTrainer(
            model=prior,
            args=arguments,
            train_dataset=for_family(sequences) if contrast is None else PairDataset(sequences),
            eval_dataset=for_family(CodeDataset(store.split("validation"), layout)),
            callbacks=[self.callback],
            layout=layout,
            run=run,
            average=self.average,
            best=self.best,
            contrast=contrast,
        )
        check_sharding(self.trainer, config.ema_decay)
        check_training_memory(self.trainer, config, layout)
        best = self.best if config.keep_best else None
        self.trainer.add_callback(SettingsOnTrackers(self.trainer, config))
        self.trainer.add_callback(Selection(self.trainer, best, config.early_stopping_patience))
        if config.num_sample_images:
            number, seed = config.num_sample_images, config.seed
            self.trainer.add_callback(SampleGrids(self.trainer, run, store, layout, config.tokenizer, number, seed))
        self.checkpoint: Path | None = None

    def resume(self) -> None:
        """Finds the checkpoint to resume from, if the run has one; Trainer loads it at the start of `steps`.

        Raises:
            ConfigError: see `RunFolder.begin`; or a file of the checkpoint is missing, damaged or a pickle.
        """
        config, trainer = self.config, self.trainer
        checkpoint = self.run.begin(trainer.accelerator.num_processes)
        if checkpoint is not None:
            with refusing_damage():
                history = check_checkpoint(checkpoint, config, trainer.is_world_process_zero())
            self.checkpoint = checkpoint.path
            if (checkpoint.path / AVERAGE_NAME).is_file():
                self.average.checkpoint = checkpoint.path
            if is_exhausted(history, config.early_stopping_patience):
                trainer.args.max_steps = checkpoint.step  # no step remains
        if trainer.is_world_process_zero():
            self.best.restore(self.checkpoint if config.keep_best else None)
            if not (self.run.path / LAYOUT_NAME).is_file():  # a finished prior keeps its own until it is replaced
                self.layout.save_pretrained(self.run.path)

    def steps(self) -> None:
        """Runs the remaining steps, and evaluates after the last one.

        Raises:
            ConfigError, Diverged, Stopped: see `train`.
        """
        trainer = self.trainer
        if trainer.is_world_process_zero():
            self.tell()
        with refusing_damage():
            trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint is not None else None)
        step, signal_number = trainer.state.global_step, self.callback.signal_number
        if signal_number and step < self.config.max_steps:
            raise self.run.stopped(step, signal_number)
        if not any(logs["step"] == step for logs in evaluations(trainer.state.log_history)):
            trainer.evaluate()

    def tell(self) -> None:
        """Prints the first lines: what the code store holds, and facts about the run."""
        config, layout, trainer = self.config, self.layout, self.trainer
        train, validation = (self.store.split(name) for name in ("train", "validation"))
        facts = {
            "sequences": f"{len(train):,} for training, {len(validation):,} for validation, in {config.code_store}",
            "codes": f"{layout.length:,} in each, out of {layout.num_codes:,}",
        }
        if layout.num_classes or not layout.segments:
            facts["classes"] = f"{layout.num_classes:,}" if layout.num_classes else "none: the prior is unconditional"
        if layout.segments:
            facts["conditions"] = "; ".join(segment.summary for segment in layout.segments)
        device, processes = trainer.args.device, trainer.accelerator.num_processes
        pictures = "samples" if config.num_sample_images else ""
        print_facts(facts | run_facts(config, device, processes, {"prior": trainer.model}, len(train), pictures))

    def finish(self) -> PreTrainedModel:
        """Saves the best or the last weights and the results; returns the prior."""
        config, trainer = self.config, self.trainer
        history, patience = trainer.state.log_history, config.early_stopping_patience
        evaluation = evaluations(history)[-1]
        model: Any = trainer.model
        with self.run.replaced_model(sum(weight.nbytes for weight in model.parameters())) as folder:
            if not config.keep_best:
                with self.average.applied():
                    trainer.save_model(str(folder))  # on all processes, because a sharded model is gathered
            elif trainer.is_world_process_zero():
                evaluation = self.best.move_to(folder)
            if trainer.is_world_process_zero():
                self.layout.save_pretrained(folder)
                copy_tokenizers(self.store.folder, folder, self.layout)
        if trainer.is_world_process_zero():
            step, loss = evaluation["step"], evaluation["eval_loss"]
            results = {"model_step": step, "eval_loss": loss}
            if self.layout.family == "causal":
                results["bits_per_pixel"] = bits_per_pixel(loss, self.layout)
            if is_exhausted(history, patience):
                results["early_stopping_patience"] = patience
                print(f"stopped at step {trainer.state.global_step}: no lower loss in the last {patience} evaluations")
            print(f"prior of step {step} saved in {Path(config.output_dir).resolve()}")
            self.run.finish(trainer.state.global_step, results)
        trainer.accelerator.wait_for_everyone()
        return load_prior(config.output_dir)


def open_codes(config: Stage2Config) -> tuple[CodeStore, TokenLayout]:
    """The code store, and the token layout of a prior over its codes.

    The prior learns the null token if it has no conditions, or if training uses condition dropout. It learns to do
    without one condition, and with the others, if this condition has a dropout of its own.

    Raises:
        ConfigError: the store is missing, or it was written with other settings.
    """
    store = CodeStore(config.code_store)
    check_codes(config, store)
    together, alone = config.condition_dropout > 0, config.segment_dropout
    segments = tuple(replace(segment, has_null=segment.name in alone) for segment in store.layout.segments)
    is_unconditional = not store.layout.num_classes and not segments
    has_null = is_unconditional or together
    return store, replace(store.layout, has_null=has_null, segments=segments, family=config.prior)


def initial_prior(config: Stage2Config, layout: TokenLayout) -> PreTrainedModel:
    """The prior before its first step: new, or loaded from `model_name_or_path`, with an adapter if lora.r > 0.

    Raises:
        ConfigError: the prior or language model in `model_name_or_path` cannot be loaded, or does not fit.
    """
    base = config.model_name_or_path
    if base is None:
        return build_prior(config.model, layout)
    if is_language_model(base):
        for key, value in {"lora.r": config.lora.r, "cca.beta": config.cca.beta}.items():
            if value:
                message = f"received {value}, but {base} is a language model, which knows no codes; set it to 0"
                raise ConfigError([Problem(key, f"{message}, or adapt a prior of stage 2")])
        return prior_from_language_model(base, config.model, layout)
    prior = adapt_prior(base, config.model, layout)
    if config.cca.beta:
        check_contrast(base, layout_of(base), layout)
    if not config.lora.r:
        return prior
    # If the base has other conditions, the adapter also trains the embeddings of all conditions.
    conditions = range(layout.num_codes, layout.vocab_size) if layout_of(base) != layout else []
    return attach_adapter(prior, base, config.lora, list(conditions))


def check_codes(config: Stage2Config, store: CodeStore) -> None:
    """Refuses a code store that was written with other settings than those of the configuration.

    Raises:
        ConfigError: names the settings that differ.
    """
    tokenizer = Path(config.tokenizer) / "config.json"
    origin = without_tokenizers(store.manifest["origin"])
    conditions = {name: condition.identity() for name, condition in config.conditions.items()}
    wanted = {"num_views": config.num_views, "data": config.data.identity(), "conditions": conditions or None}
    size = config.image_shape or own_image_shape(tokenizer)
    if size is not None:  # that of a tokenizer on the Hub is unknown here
        origin["image_size"], wanted["image_size"] = list(store.layout.image_shape), size
    problems = [
        Problem(key, f"{config.code_store} was written with {shown(old)}, but the configuration has {shown(new)}")
        for key, old, new in differences(origin, wanted)
        if key.partition(".")[0] in wanted
    ]
    advice = f"choose another code_store than {config.code_store} and run stage2_prior.tokenize"
    try:
        if tokenizer.is_file():
            store.layout.require_fingerprint(read_json(tokenizer).get("fingerprint"), advice=advice)
        if not problems:
            require_tokenizers(config.code_store, store.layout)
            check_given_tokenizers(config, store.layout)
    except ConfigError:
        raise
    except ValueError as error:
        problems.append(Problem.of_error(error))
    if problems:
        raise ConfigError(problems, "codes")


def own_image_shape(config: Path) -> list[int] | None:
    """[H, W] of a tokenizer's images, from its config.json; None if there is no such file."""
    size = read_json(config).get("image_size") if config.is_file() else None
    return [size, size] if isinstance(size, int) else size


def check_run(config: Stage2Config, layout: TokenLayout) -> None:
    """Refuses to resume a run that was started on the codes of another tokenizer.

    Raises:
        ConfigError: the run in the folder uses the codes of another tokenizer.
    """
    folder = Path(config.output_dir)
    if not (holds_work(folder) and (folder / LAYOUT_NAME).is_file()):
        return
    advice = f"{folder} holds a run on those codes; choose another folder, or remove this one"
    try:
        TokenLayout.from_pretrained(folder).require_fingerprint(layout.tokenizer_fingerprint, "output_dir", advice)
    except ValueError as error:
        raise ConfigError([Problem.of_error(error)], "codes") from error
