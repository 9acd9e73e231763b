"""A run of stage 1: set-up, loop, finish."""

import copy
import logging
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from configs import check
from configs.hub import push_run
from configs.interruption import StopRequest
from configs.randomness import seed_from
from configs.run_folder import RunFolder
from stage1_vqgan.data.dataset import ImageDataset
from stage1_vqgan.data.loading import evaluation_loader, training_loader
from stage1_vqgan.data.samplers import some_images, training_sampler
from stage1_vqgan.data.skipped import SkippedImages
from stage1_vqgan.data.sources import load_images
from stage1_vqgan.image_processing_vqgan import VQGANImageProcessor, image_grid
from stage1_vqgan.modeling_vqgan import VQGANModel
from stage1_vqgan.reconstruction import evaluate_reconstruction
from stage1_vqgan.training import checkpointing
from stage1_vqgan.training.config import Stage1Config
from stage1_vqgan.training.health import Health
from stage1_vqgan.training.reporting import Reporter, Window
from stage1_vqgan.training.step import VQGANTrainer

logger = logging.getLogger(__name__)

# Terms beside the progress bar.
SHOWN_TERMS = ("l1", "l2", "perceptual", "codebook", "adversarial", "discriminator")


def train(config: Stage1Config) -> VQGANModel:
    """Trains a tokenizer, or goes on with a run that was interrupted, and saves it in `config.output_dir`.

    Returns:
        The trained tokenizer (the moving average of the weights), on the CPU.

    Raises:
        ConfigError: the configuration cannot work, or the folder holds a run with other settings, or is in use; or too
            many images cannot be used.
        Diverged: a loss or a weight is not finite any more.
        Stopped: SIGTERM or Ctrl-C; a checkpoint was saved.
    """
    config = check(config)
    loss = config.loss
    if loss.adversarial_weight and loss.adversarial_start_step >= config.max_steps:
        logger.warning("loss.adversarial_start_step is beyond max_steps: this run trains without the adversarial loss")
    # a session may train with one precision after another, and the compiler makes no more than some variants of a part
    AcceleratorState._reset_state()
    GradientState._reset_state()
    if config.torch_compile:
        torch.compiler.reset()
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,  # the saved config says what was used, not the launcher
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.report_to or None,
        project_dir=config.output_dir,
    )
    with RunFolder(config, accelerator.is_main_process) as run, StopRequest() as request:
        if run.finished is not None:
            accelerator.print(f"{run.path} holds the finished run ({run.finished['global_step']} steps); nothing to do")
            if config.push_to_hub and accelerator.is_main_process:
                print(push_run(config))
            return VQGANModel.from_pretrained(config.output_dir)
        accelerator.wait_for_everyone()

        training = Training(run, request, accelerator)
        start = training.resume()
        with Reporter(accelerator, run, start) as reporter:
            metrics = training.steps(start, reporter)
        model = finish(config, accelerator, training.trainer)
        if accelerator.is_main_process:
            run.finish({"global_step": config.max_steps, "train_runtime": round(run.seconds, 1), **metrics})
            if config.push_to_hub:
                print(push_run(config))
        accelerator.wait_for_everyone()
    return model


class Training:
    """The loop over the steps: data, logs, evaluations and checkpoints around `VQGANTrainer.step`.

    Args:
        run: the run's folder.
        request: asked after every step whether to stop.
        accelerator: decides devices, processes, precision and accumulation.
    """

    def __init__(self, run: RunFolder, request: StopRequest, accelerator: Accelerator):
        self.run, self.request, self.accelerator = run, request, accelerator
        config: Stage1Config = run.config
        self.config = config
        train_source, validation_source = load_images(config.data)
        self.trainer = VQGANTrainer(config, accelerator)
        size, channels = self.trainer.average.config.image_size, self.trainer.average.config.in_channels
        self.train_set = ImageDataset(
            train_source,
            size,
            channels,
            config.data.augmentation,
            config.seed,
            aspect_ratio=config.data.aspect_ratio,
            keep_batch_size=True,
        )
        self.validation_set = ImageDataset(validation_source, size, channels, aspect_ratio=config.data.aspect_ratio)
        self.skipped = SkippedImages(
            config.data.max_skipped_fraction,
            {"train": train_source.num_images, "validation": validation_source.num_images},
            run.path,
            accelerator.is_main_process,
        )
        self.health = Health(accelerator, config.loss.adversarial_type)

    def resume(self) -> int:
        """Loads the checkpoint to go on from, if there is one; returns the optimizer steps done."""
        checkpoint = self.run.begin(self.accelerator.num_processes)
        if checkpoint is None:
            return 0
        checkpointing.load(checkpoint.path, self.accelerator, self.trainer)
        self.health.last_checkpoint = str(checkpoint.path)
        self.accelerator.print(f"going on from {checkpoint.path}")
        return checkpoint.step

    def steps(self, start: int, reporter: Reporter) -> dict[str, float]:
        """Takes the steps from `start` to the last; returns the last evaluation.

        Raises:
            ConfigError, Diverged, Stopped: see `train`.
        """
        config, accelerator, trainer = self.config, self.accelerator, self.trainer
        accumulation = config.gradient_accumulation_steps
        sampler = training_sampler(
            self.train_set.source,
            config.device_batch_size(accelerator.num_processes),
            start * accumulation,
            config.max_steps * accumulation,
            config.seed,
            accelerator.process_index,
            accelerator.num_processes,
        )
        pin_memory = accelerator.device.type == "cuda"
        loader = training_loader(self.train_set, sampler, config.dataloader_num_workers, pin_memory)
        is_new = start == 0 and config.model_name_or_path is None
        if is_new and config.codebook.kmeans_init_batches and trainer.moves_codes:
            first = self.skipped.watch("train", islice(loader, config.codebook.kmeans_init_batches))
            trainer.initialise_codebook(batch.images(accelerator.device) for batch in first)
        if start == config.max_steps:
            return self.evaluate(start, reporter)

        metrics: dict[str, float] = {}
        window = Window(accelerator)
        memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        for number, batch in enumerate(self.skipped.watch("train", loader), start * accumulation):
            step = number // accumulation
            # dropout: keyed, so that resuming is exact
            torch.manual_seed(seed_from(config.seed, number, accelerator.process_index))
            learning_rate = trainer.set_learning_rate(step)
            images = batch.images(accelerator.device).contiguous(memory_format=memory_format)
            window.add(step, len(images), trainer.step(images, number))
            if (number + 1) % accumulation:
                continue

            step += 1
            signal_number = self.request.agreed()
            is_last = step == config.max_steps
            reporter.bar.update()
            if step % config.logging_steps == 0 or is_last:
                self.log(step, window, learning_rate, reporter)
                window = Window(accelerator)
            if step % config.eval_steps == 0 or is_last:
                with window.paused():
                    metrics = self.evaluate(step, reporter)
            if step % config.save_steps == 0 or is_last or signal_number:
                with window.paused():
                    self.save(step, window)
            if signal_number and not is_last:
                raise self.run.stopped(step, signal_number)
        return metrics

    def log(self, step: int, window: Window, learning_rate: float, reporter: Reporter) -> None:
        """Checks and reports the numbers since the last log."""
        self.skipped.exchange()
        self.health.require_finite_losses(window.collected)
        scalars = window.means() | self.trainer.statistics()
        scalars |= {"learning_rate": learning_rate, "images_per_second": window.images_per_second}
        codes_seen = window.images * self.trainer.codes_per_image
        self.health.look(scalars, window.collected, codes_seen, self.trainer.num_codes)
        reporter.show({name: scalars[f"loss/{name}"] for name in SHOWN_TERMS if f"loss/{name}" in scalars})
        reporter.scalars(scalars, step)

    def evaluate(self, step: int, reporter: Reporter) -> dict[str, float]:
        """Reconstruction metrics over the validation split, each image once, and a grid of some."""
        config, accelerator, dataset, model = self.config, self.accelerator, self.validation_set, self.trainer.average
        loader = evaluation_loader(
            dataset,
            config.per_device_eval_batch_size,
            config.dataloader_num_workers,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        batches = self.skipped.watch("validation", loader)
        metrics = evaluate_reconstruction(model, batches, lambda total: accelerator.reduce(total, "sum"))
        self.skipped.exchange()
        reporter.scalars({f"eval/{name}": value for name, value in metrics.items()}, step)
        if not accelerator.is_main_process:
            return metrics
        shown = dataset.__getitems__(some_images(dataset.source, config.num_sample_images))
        if len(shown.indices):
            originals = shown.images(model.device)
            with torch.no_grad():
                pair = torch.cat([originals, model(originals).reconstruction])
            processor = VQGANImageProcessor(dataset.image_size, dataset.num_channels)
            reporter.image(
                "reconstructions", image_grid(processor.postprocess(pair), len(originals), min_tile=64), step
            )
        return metrics

    def save(self, step: int, window: Window) -> None:
        """Saves a checkpoint, unless a number in it is not finite."""
        self.health.require_finite_losses(window.collected)
        self.health.require_finite_state(self.trainer.state(), step)
        checkpointing.save(self.run, self.accelerator, self.trainer, step)
        self.health.last_checkpoint = f"{self.run.path}/checkpoint-{step}"


def finish(config: Stage1Config, accelerator: Accelerator, trainer: VQGANTrainer) -> VQGANModel:
    """Saves the averaged weights with their fingerprint in the run's folder."""
    model = copy.deepcopy(trainer.average).cpu().eval()
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-arg]
    if accelerator.is_main_process:
        size, channels = model.config.image_size, model.config.in_channels
        processor = VQGANImageProcessor(size, channels, aspect_ratio=config.data.aspect_ratio)
        model.save_pretrained(config.output_dir)
        processor.save_pretrained(config.output_dir)
        print(f"tokenizer saved in {Path(config.output_dir).resolve()} (fingerprint {model.config.fingerprint})")
    return model
