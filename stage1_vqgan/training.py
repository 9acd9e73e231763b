"""A run of stage 1: set-up, loop, finish."""

import copy
import time
from collections import defaultdict
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from configs import check
from configs.run_folder import finish_run, open_run, push_run
from stage1_vqgan import checkpointing
from stage1_vqgan.data import ImageDataset, training_loader
from stage1_vqgan.evaluate import evaluate_reconstruction
from stage1_vqgan.image_processing_vqgan import VQGANImageProcessor, image_grid, normalize
from stage1_vqgan.modeling_vqgan import VQGANModel
from stage1_vqgan.reporting import Reporter
from stage1_vqgan.sources import load_images
from stage1_vqgan.streaming import evaluation_loader, some_images, training_sampler
from stage1_vqgan.training_config import Stage1Config
from stage1_vqgan.training_step import VQGANTrainer, key

# Terms beside the progress bar.
SHOWN_TERMS = ("pixel", "perceptual", "codebook", "generator", "discriminator")


def train(config: Stage1Config) -> VQGANModel:
    """Trains a tokenizer, or goes on with a run that was interrupted, and saves it in `config.output_dir`.

    Returns:
        The trained tokenizer (the moving average of the weights), on the CPU.

    Raises:
        ConfigError: the configuration cannot work, or the folder holds a run with other settings.
    """
    config = check(config)
    started = time.perf_counter()
    accelerator = Accelerator(
        mixed_precision="bf16" if config.bf16 else "no",  # the saved config says what was used, not the launcher
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.report_to or None,
        project_dir=config.output_dir,
    )
    finished = open_run(config, accelerator.is_main_process)
    if finished is not None:
        accelerator.print(
            f"{config.output_dir} holds the finished run ({finished['global_step']} steps); nothing to do"
        )
        if config.push_to_hub and accelerator.is_main_process:
            print(push_run(config))
        return VQGANModel.from_pretrained(config.output_dir)
    accelerator.wait_for_everyone()

    trainer = VQGANTrainer(config, accelerator)
    train_source, validation_source = load_images(config.data)
    size, channels = trainer.model.config.image_size, trainer.model.config.in_channels
    train_set = ImageDataset(train_source, size, channels, config.data.augmentation, config.seed)
    validation_set = ImageDataset(validation_source, size, channels)

    start = resume(config, accelerator, trainer)
    reporter = Reporter(accelerator, config.output_dir, start, config.max_steps)
    metrics = run_steps(config, accelerator, trainer, train_set, validation_set, reporter, start)
    reporter.close()

    model = finish(config, accelerator, trainer)
    if accelerator.is_main_process:
        results = {"global_step": config.max_steps, "train_runtime": round(time.perf_counter() - started, 1), **metrics}
        finish_run(config, results)
        if config.push_to_hub:
            print(push_run(config))
    accelerator.wait_for_everyone()
    return model


def resume(config: Stage1Config, accelerator: Accelerator, trainer: VQGANTrainer) -> int:
    """Loads the checkpoint to go on from, if there is one; returns the optimizer steps done."""
    checkpoint = checkpointing.find(config.output_dir, config.resume_from_checkpoint, config.max_steps)
    if checkpoint is None:
        return 0
    accelerator.load_state(str(checkpoint))
    trainer.keep_statistics_on_main_process()
    accelerator.print(f"going on from {checkpoint}")
    return checkpointing.step_of(checkpoint)


def run_steps(
    config: Stage1Config,
    accelerator: Accelerator,
    trainer: VQGANTrainer,
    train_set: ImageDataset,
    validation_set: ImageDataset,
    reporter: Reporter,
    start: int,
) -> dict[str, float]:
    """Takes the steps from `start` to the last, with logs, evaluations and checkpoints; returns the last evaluation."""
    accumulation = config.gradient_accumulation_steps
    sampler = training_sampler(
        train_set.source,
        config.per_device_train_batch_size,
        start * accumulation,
        config.max_steps * accumulation,
        config.seed,
        accelerator.process_index,
        accelerator.num_processes,
    )
    pin_memory = accelerator.device.type == "cuda"
    loader = training_loader(train_set, sampler, config.dataloader_num_workers, pin_memory)
    if start == 0 and config.codebook.kmeans_init_batches:
        trainer.initialise_codebook(batch.pixels for batch in islice(loader, config.codebook.kmeans_init_batches))
    if start == config.max_steps:
        return evaluate(config, accelerator, trainer, validation_set, reporter, start)

    metrics: dict[str, float] = {}
    collected: dict[str, list[Tensor]] = defaultdict(list)
    clock = time.perf_counter()
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    for number, batch in enumerate(loader, start * accumulation):
        step = number // accumulation
        torch.manual_seed(key(config.seed, number, accelerator.process_index))  # dropout: keyed, so resuming is exact
        learning_rate = trainer.set_learning_rate(step)
        images = normalize(batch.pixels.to(accelerator.device, non_blocking=True)).contiguous(
            memory_format=memory_format
        )
        for name, value in trainer.step(images, step).items():
            collected[name].append(value)
        if (number + 1) % accumulation:
            continue

        step += 1
        is_last = step == config.max_steps
        reporter.bar.update()
        if step % config.logging_steps == 0 or is_last:
            images_seen = len(collected["loss/codebook"]) * len(images) * accelerator.num_processes
            scalars = average(collected, trainer, accelerator)
            scalars["learning_rate"] = learning_rate
            scalars["images_per_second"] = images_seen / (time.perf_counter() - clock)
            reporter.show({name: scalars[f"loss/{name}"] for name in SHOWN_TERMS if f"loss/{name}" in scalars})
            reporter.scalars(scalars, step)
            collected.clear()
            clock = time.perf_counter()
        if step % config.eval_steps == 0 or is_last:
            metrics = evaluate(config, accelerator, trainer, validation_set, reporter, step)
            clock = time.perf_counter()
        if step % config.save_steps == 0 or is_last:
            trainer.pool_statistics()
            checkpointing.save(accelerator, config.output_dir, step, config.save_total_limit)
            clock = time.perf_counter()
    return metrics


def average(collected: dict[str, list[Tensor]], trainer: VQGANTrainer, accelerator: Accelerator) -> dict[str, float]:
    """Means over processes and the steps since the last log, and the use of the codebook."""
    means = {name: torch.stack(values).float().mean() for name, values in sorted(collected.items())}
    scalars = {name: accelerator.reduce(value, "mean").item() for name, value in means.items()}
    return scalars | {name: value.item() for name, value in trainer.statistics().items()}


def evaluate(
    config: Stage1Config,
    accelerator: Accelerator,
    trainer: VQGANTrainer,
    dataset: ImageDataset,
    reporter: Reporter,
    step: int,
) -> dict[str, float]:
    """Reconstruction metrics over the validation split, each image once, and a grid of some."""
    loader = evaluation_loader(
        dataset,
        config.per_device_eval_batch_size,
        config.dataloader_num_workers,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    model = trainer.average
    metrics = evaluate_reconstruction(model, loader, lambda total: accelerator.reduce(total, "sum"))
    reporter.scalars({f"eval/{name}": value for name, value in metrics.items()}, step)
    if accelerator.is_main_process:
        shown = dataset.__getitems__(some_images(dataset.source, config.num_sample_images))
        originals = normalize(shown.pixels)
        with torch.no_grad():
            pair = torch.cat([originals, model(originals.to(model.device)).reconstruction.cpu()])
        processor = VQGANImageProcessor(dataset.image_size, dataset.num_channels)
        reporter.image("reconstructions", image_grid(processor.postprocess(pair), len(originals), min_tile=64), step)
    return metrics


def finish(config: Stage1Config, accelerator: Accelerator, trainer: VQGANTrainer) -> VQGANModel:
    """Saves the averaged weights with their fingerprint in the run's folder."""
    model = copy.deepcopy(trainer.average).cpu().eval()
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-arg]
    if accelerator.is_main_process:
        processor = VQGANImageProcessor(model.config.image_size, model.config.in_channels)
        model.save_pretrained(config.output_dir)
        processor.save_pretrained(config.output_dir)
        print(f"tokenizer saved in {Path(config.output_dir).resolve()} (fingerprint {model.config.fingerprint})")
    return model
