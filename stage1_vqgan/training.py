"""A run of stage 1: set-up, loop, finish."""

import copy
import logging
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from configs import check
from configs.interruption import StopRequest
from configs.run_folder import RunFolder, push_run
from stage1_vqgan import checkpointing
from stage1_vqgan.data import ImageDataset, ImageKey, TrainingSampler, keyed_loader, training_loader
from stage1_vqgan.evaluate import evaluate_reconstruction
from stage1_vqgan.health import Health
from stage1_vqgan.image_processing_vqgan import VQGANImageProcessor, image_grid, normalize
from stage1_vqgan.modeling_vqgan import VQGANModel
from stage1_vqgan.reporting import Reporter, Window
from stage1_vqgan.sources import load_images
from stage1_vqgan.training_config import Stage1Config
from stage1_vqgan.training_step import VQGANTrainer, key

logger = logging.getLogger(__name__)

# Terms beside the progress bar.
SHOWN_TERMS = ("pixel", "perceptual", "codebook", "generator", "discriminator")


def train(config: Stage1Config) -> VQGANModel:
    """Trains a tokenizer, or goes on with a run that was interrupted, and saves it in `config.output_dir`.

    Returns:
        The trained tokenizer (the moving average of the weights), on the CPU.

    Raises:
        ConfigError: the configuration cannot work, or the folder holds a run with other settings, or is in use.
        Diverged: a loss or a weight is not finite any more.
        Stopped: SIGTERM or Ctrl-C; a checkpoint was saved.
    """
    config = check(config)
    loss = config.loss
    if loss.adversarial_weight and loss.adversarial_start_step >= config.max_steps:
        logger.warning("loss.adversarial_start_step is beyond max_steps: this run trains without the adversarial loss")
    # a session may train with one precision after another
    AcceleratorState._reset_state()
    GradientState._reset_state()
    accelerator = Accelerator(
        mixed_precision="bf16" if config.bf16 else "no",  # the saved config says what was used, not the launcher
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.report_to or None,
        project_dir=config.output_dir,
    )
    with RunFolder(config, accelerator.is_main_process) as run, StopRequest() as request:
        if run.finished is not None:
            accelerator.print(
                f"{config.output_dir} holds the finished run ({run.finished['global_step']} steps); nothing to do"
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

        health = Health(accelerator)
        start = resume(run, accelerator, trainer, health)
        with Reporter(accelerator, run, start) as reporter:
            metrics = run_steps(run, request, accelerator, trainer, train_set, validation_set, reporter, health, start)
        model = finish(config, accelerator, trainer)
        if accelerator.is_main_process:
            run.finish({"global_step": config.max_steps, "train_runtime": round(run.seconds, 1), **metrics})
            if config.push_to_hub:
                print(push_run(config))
        accelerator.wait_for_everyone()
    return model


def resume(run: RunFolder, accelerator: Accelerator, trainer: VQGANTrainer, health: Health) -> int:
    """Loads the checkpoint to go on from, if there is one; returns the optimizer steps done."""
    checkpoint = run.checkpoint_to_resume(accelerator.num_processes)
    if checkpoint is None:
        return 0
    checkpointing.load(checkpoint.path, accelerator, trainer)
    health.last_checkpoint = str(checkpoint.path)
    accelerator.print(f"going on from {checkpoint.path}")
    return checkpoint.step


def run_steps(
    run: RunFolder,
    request: StopRequest,
    accelerator: Accelerator,
    trainer: VQGANTrainer,
    train_set: ImageDataset,
    validation_set: ImageDataset,
    reporter: Reporter,
    health: Health,
    start: int,
) -> dict[str, float]:
    """Takes the steps from `start` to the last, with logs, evaluations and checkpoints; returns the last evaluation."""
    config: Stage1Config = run.config
    accumulation = config.gradient_accumulation_steps
    sampler = TrainingSampler(
        len(train_set),
        config.device_batch_size(accelerator.num_processes),
        start * accumulation,
        config.max_steps * accumulation,
        config.seed,
        accelerator.process_index,
        accelerator.num_processes,
    )
    pin_memory = accelerator.device.type == "cuda"
    loader = training_loader(train_set, sampler, config.dataloader_num_workers, pin_memory)
    if start == 0 and config.codebook.kmeans_init_batches and config.model_name_or_path is None:
        trainer.initialise_codebook(batch.pixels for batch in islice(loader, config.codebook.kmeans_init_batches))
    if start == config.max_steps:
        return evaluate(config, accelerator, trainer, validation_set, reporter, start)

    metrics: dict[str, float] = {}
    window = Window(accelerator)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    for number, batch in enumerate(loader, start * accumulation):
        step = number // accumulation
        torch.manual_seed(key(config.seed, number, accelerator.process_index))  # dropout: keyed, so resuming is exact
        learning_rate = trainer.set_learning_rate(step)
        pixels = batch.pixels.to(accelerator.device, non_blocking=True)
        images = normalize(pixels).contiguous(memory_format=memory_format)
        window.add(step, len(images), trainer.step(images, step))
        if (number + 1) % accumulation:
            continue

        step += 1
        signal_number = request.agreed()
        is_last = step == config.max_steps
        reporter.bar.update()
        if step % config.logging_steps == 0 or is_last:
            health.require_finite_losses(window.collected)
            scalars = window.means() | trainer.statistics()
            scalars |= {"learning_rate": learning_rate, "images_per_second": window.images_per_second}
            health.look(scalars, window.collected, window.images * trainer.codes_per_image, trainer.num_codes)
            reporter.show({name: scalars[f"loss/{name}"] for name in SHOWN_TERMS if f"loss/{name}" in scalars})
            reporter.scalars(scalars, step)
            window = Window(accelerator)
        if step % config.eval_steps == 0 or is_last:
            with window.paused():
                metrics = evaluate(config, accelerator, trainer, validation_set, reporter, step)
        if step % config.save_steps == 0 or is_last or signal_number:
            with window.paused():
                health.require_finite_losses(window.collected)
                health.require_finite_state(trainer.state(), step)
                checkpointing.save(run, accelerator, trainer, step)
                health.last_checkpoint = f"{run.path}/checkpoint-{step}"
        if signal_number and not is_last:
            raise run.stopped(step, signal_number)
    return metrics


def evaluate(
    config: Stage1Config,
    accelerator: Accelerator,
    trainer: VQGANTrainer,
    dataset: ImageDataset,
    reporter: Reporter,
    step: int,
) -> dict[str, float]:
    """Reconstruction metrics over the validation split, each image once, and a grid of some."""
    keys = [ImageKey(0, index) for index in range(accelerator.process_index, len(dataset), accelerator.num_processes)]
    loader = keyed_loader(dataset, keys, config.per_device_eval_batch_size, config.dataloader_num_workers)
    model = trainer.average
    metrics = evaluate_reconstruction(
        model, (batch.pixels for batch in loader), lambda total: accelerator.reduce(total, "sum")
    )
    reporter.scalars({f"eval/{name}": value for name, value in metrics.items()}, step)
    if accelerator.is_main_process:
        shown = range(0, len(dataset), max(1, len(dataset) // config.num_sample_images))[: config.num_sample_images]
        originals = normalize(dataset.__getitems__([ImageKey(0, index) for index in shown]).pixels)
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
