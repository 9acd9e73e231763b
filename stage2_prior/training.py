"""The training of stage 2: `transformers.Trainer`, configured for sequences of codes."""

import json
import math
import os
import re
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from configs import ConfigError, Problem, TrainingConfig, check
from configs.run_folder import finish_run, holds_work, open_run, push_run
from stage1_vqgan import TrainingSampler
from stage2_prior.code_store import CodeStore
from stage2_prior.data import CodeDataset, collate
from stage2_prior.sampling import forward, make_cache
from stage2_prior.training_config import Stage2Config
from stage2_prior.vocabulary import FILE_NAME as LAYOUT_NAME
from stage2_prior.vocabulary import TokenLayout

# Keys of ours that Trainer must not act on: the run resumes, reports and uploads in its own way.
OWN_KEYS = {"resume_from_checkpoint", "push_to_hub", "hub_model_id", "hub_private_repo"}


class PriorTrainer(Trainer):
    """Trainer with keyed batches, and losses in the units of the field."""

    def __init__(self, *args: Any, layout: TokenLayout, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.layout = layout

    def get_train_dataloader(self) -> DataLoader:
        """All batches of the run in one pass; a pure function of the seed, cut for this process already."""
        args = self.args
        batches = args.max_steps * args.gradient_accumulation_steps
        sampler = TrainingSampler(
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
        """The validation rows in order, shared out among processes."""
        loader = self._loader(eval_dataset or self.eval_dataset, batch_size=self.args.eval_batch_size)
        return self.accelerator.prepare(loader)

    def _loader(self, dataset: Any, **kwargs: Any) -> DataLoader:
        pin_memory = self.args.dataloader_pin_memory and self.args.device.type == "cuda"
        workers = self.args.dataloader_num_workers
        return DataLoader(dataset, collate_fn=collate, num_workers=workers, pin_memory=pin_memory, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds bits per pixel and perplexity to a loss in nats per code."""
        for name in ("loss", "eval_loss"):
            if name in logs:
                prefix = name.removesuffix("loss")
                logs[f"{prefix}bits_per_pixel"] = bits_per_pixel(logs[name], self.layout)
                logs[f"{prefix}perplexity"] = math.exp(min(logs[name], 80.0))
        super().log(logs, *args, **kwargs)


class JsonLines(TrainerCallback):
    """Writes every log as a line of metrics.jsonl in the run's folder."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            with open(os.path.join(args.output_dir, "metrics.jsonl"), "a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def bits_per_pixel(nats_per_code: float, layout: TokenLayout) -> float:
    """Total nats of an image's codes / (ln 2 · H · W)."""
    return nats_per_code * layout.length / (math.log(2) * layout.pixels)


def build_prior(model: dict[str, Any], layout: TokenLayout) -> PreTrainedModel:
    """A freshly initialised stock causal language model for a token layout.

    Args:
        model: `model_type`, and fields of that model's configuration.
        layout: decides vocabulary and positions.
    """
    settings = {name: value for name, value in model.items() if name != "model_type"}
    config = AutoConfig.for_model(
        model["model_type"],
        **settings,
        vocab_size=layout.vocab_size,
        max_position_embeddings=layout.length,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    prior = AutoModelForCausalLM.from_config(config)
    if not reads_like_a_sequence(prior, layout):
        reason = "as a prior it must not look ahead, and must keep keys and values in a standard cache"
        raise ConfigError([Problem("model.model_type", f"received {model['model_type']!r}; {reason}")])
    prior.generation_config = generation_config(layout)
    return prior


@torch.no_grad()
def reads_like_a_sequence(prior: PreTrainedModel, layout: TokenLayout) -> bool:
    """Whether reading tokens one by one through the sampler's cache gives the logits of reading them all at once.

    It does not where a model sees later tokens, or keeps a state of another kind.
    """
    prior.eval()
    tokens = torch.arange(min(6, layout.length), device=prior.device)[None]
    if tokens.device.type == "meta":
        return True
    try:
        whole = prior(input_ids=tokens).logits.float()
        cache = make_cache(prior, tokens.shape[1])
        steps = torch.stack([forward(prior, token, cache) for token in tokens.split(1, dim=1)], 1)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    finally:
        prior.train()
    return torch.allclose(whole, steps, rtol=1e-3, atol=1e-3 * float(whole.std()))


def generation_config(layout: TokenLayout) -> GenerationConfig:
    """Makes a bare `prior.generate(condition)` yield an image's codes and nothing else."""
    return GenerationConfig(
        suppress_tokens=list(range(layout.num_codes, layout.vocab_size)),
        max_new_tokens=layout.length,
        do_sample=True,
        top_k=0,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def training_arguments(config: Stage2Config) -> TrainingArguments:
    """TrainingArguments from the keys both share, and those of the `training_arguments` section."""
    shared = {field.name: getattr(config, field.name) for field in fields(TrainingConfig) if field.name not in OWN_KEYS}
    defaults = {
        "eval_strategy": "steps",
        "prediction_loss_only": True,
        "save_strategy": "steps",
        "use_cpu": not torch.accelerator.is_available(),
    }
    try:
        return TrainingArguments(**{**shared, **defaults, **config.training_arguments})
    except (TypeError, ValueError) as error:
        raise ConfigError([Problem("training_arguments", str(error))]) from error


def train(config: Stage2Config) -> PreTrainedModel:
    """Trains a prior, or goes on with a run that was interrupted, and saves it in `config.output_dir`.

    Returns:
        The trained prior.

    Raises:
        ConfigError: the configuration cannot work, there are no codes, or the folder holds a run with other settings.
    """
    config = check(config)
    store = CodeStore(config.code_store)
    check_codes(config, store)
    layout = replace(store.layout, has_null=not store.layout.num_classes or config.condition_dropout > 0)
    # problems of the folder are found before anything is built; only the main process may make it
    is_main_process = int(os.environ.get("RANK", "0")) == 0
    finished = open_run(config, is_main_process)
    if finished is not None:
        if is_main_process:
            print(f"{config.output_dir} holds the finished run ({finished['global_step']} steps); nothing to do")
        if config.push_to_hub and is_main_process:
            print(push_run(config))
        return AutoModelForCausalLM.from_pretrained(config.output_dir)
    started = time.perf_counter()
    if is_main_process:
        layout.save_pretrained(config.output_dir)

    set_seed(config.seed)
    trainer = PriorTrainer(
        model=build_prior(config.model, layout),
        args=training_arguments(config),
        train_dataset=CodeDataset(store.split("train"), layout, config.condition_dropout, config.seed),
        eval_dataset=CodeDataset(store.split("validation"), layout),
        callbacks=[JsonLines()],
        layout=layout,
    )
    trainer.train(resume_from_checkpoint=find_checkpoint(config))
    metrics = trainer.evaluate()
    trainer.save_model(config.output_dir)  # on all processes: a sharded model is gathered
    if trainer.is_world_process_zero():
        results = {
            "global_step": trainer.state.global_step,
            "train_runtime": round(time.perf_counter() - started, 1),
            "eval_loss": metrics["eval_loss"],
            "bits_per_pixel": bits_per_pixel(metrics["eval_loss"], layout),
        }
        finish_run(config, results)
        print(f"prior saved in {Path(config.output_dir).resolve()}")
        if config.push_to_hub:
            print(push_run(config))
    trainer.accelerator.wait_for_everyone()
    return AutoModelForCausalLM.from_pretrained(config.output_dir)


def check_codes(config: Stage2Config, store: CodeStore) -> None:
    """Refuses a store whose codes are not those the configuration describes, or the run's folder was started with.

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
    tokenizer, run = Path(config.tokenizer) / "config.json", Path(config.output_dir) / LAYOUT_NAME
    if tokenizer.is_file() and json.loads(tokenizer.read_text()).get("fingerprint") != fingerprint:
        message = (
            f"received {config.tokenizer!r}, but {config.code_store} holds codes of another tokenizer ({fingerprint})"
        )
        problems.append(Problem("tokenizer", message))
    started = holds_work(run.parent) and run.is_file()
    if started and TokenLayout.from_pretrained(run.parent).tokenizer_fingerprint != fingerprint:
        message = f"{run.parent} holds a run on the codes of another tokenizer; choose another folder, or remove it"
        problems.append(Problem("output_dir", message))
    if problems:
        raise ConfigError(problems, "codes")


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except ValueError:
        return False
    return True


def find_checkpoint(config: Stage2Config) -> str | None:
    """The checkpoint to go on from: Trainer writes its state file last, so a folder that has it is complete.

    Raises:
        ConfigError: the path is not a checkpoint; or a fresh start would mix with the checkpoints of an earlier run.
    """
    wanted, folder = config.resume_from_checkpoint, config.output_dir
    complete = [
        path.parent
        for path in Path(folder).glob("checkpoint-*/trainer_state.json")
        if re.fullmatch(r"checkpoint-\d+", path.parent.name) and _is_json(path)
    ]
    if wanted == "latest":
        newest = max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
        return str(newest) if newest is not None else None
    if wanted == "none":
        if complete:
            message = f"received 'none', but {folder} holds checkpoints; choose another output_dir or remove them"
            raise ConfigError([Problem("resume_from_checkpoint", message)])
        return None
    if not (Path(wanted) / "trainer_state.json").is_file():
        message = f"received {wanted!r}; needs 'latest', 'none' or the path of a complete checkpoint"
        raise ConfigError([Problem("resume_from_checkpoint", message)])
    return wanted
