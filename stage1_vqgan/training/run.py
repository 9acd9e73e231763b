"""A training run of stage 1, from its configuration to the saved tokenizer."""

import copy
import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from configs import check
from configs.automatic import decided
from configs.compat import reset_accelerate_state
from configs.interruption import StopRequest
from configs.opening import print_facts, run_facts
from configs.randomness import seed_from
from configs.run_folder import RunFolder
from configs.stalls import library_timeout, watched_for_stalls
from stage1_vqgan.data.config import data_problem
from stage1_vqgan.data.dataset import ImageBatch, ImageDataset
from stage1_vqgan.data.loading import evaluation_loader, training_loader
from stage1_vqgan.data.overview import LOOKED_AT_FIRST, become, data_facts, look
from stage1_vqgan.data.samplers import some_images, training_sampler
from stage1_vqgan.data.skipped import SkippedImages
from stage1_vqgan.data.sources import Images, load_images
from stage1_vqgan.data.value_range import measured_once, save_measured, training_range
from stage1_vqgan.evaluation.networks import NetworkMetrics, mean_of, network_metrics, perceptual_name
from stage1_vqgan.image_processing_values import ValueRange
from stage1_vqgan.image_processing_vqgan import VQGANImageProcessor
from stage1_vqgan.model_card import export_tokenizer
from stage1_vqgan.modeling_vqgan import VQGANModel
from stage1_vqgan.pictures import reconstruction_grid
from stage1_vqgan.pretrained import load_vqgan, recorded_range, save_discriminator, trained_range
from stage1_vqgan.reconstruction import evaluate_reconstruction
from stage1_vqgan.training import checkpointing
from stage1_vqgan.training.codebook import initialise_codebook
from stage1_vqgan.training.components import memory_format
from stage1_vqgan.training.config import Stage1Config
from stage1_vqgan.training.health import Health
from stage1_vqgan.training.reporting import LogInterval, Reporter
from stage1_vqgan.training.step import VQGANTrainer

logger = logging.getLogger(__name__)

# Loss terms that the progress bar shows.
SHOWN_TERMS = ("l1", "l2", "perceptual", "codebook", "adversarial", "discriminator")


def train(config: Stage1Config) -> VQGANModel:
    """Trains a tokenizer, or resumes an interrupted run, and saves the tokenizer in `config.output_dir`.

    Returns:
        The trained tokenizer (the moving average of the weights), on the CPU.

    Raises:
        ConfigError: the configuration cannot work; the folder is in use, or holds a run with other settings; or too
            many images cannot be decoded.
        Diverged: a loss or a weight is not finite.
        Stopped: SIGTERM or Ctrl-C; a checkpoint was saved.
    """
    config = decided(check(config))
    accelerator = build_accelerator(config)
    with (
        watched_for_stalls(config.ddp_timeout),
        RunFolder(config, accelerator.is_main_process, export_tokenizer) as run,
        StopRequest() as request,
    ):
        if run.report_if_finished():
            with run.loading_result():
                return load_vqgan(config.output_dir)
        training = Training(run, request, accelerator)
        training.resume()
        training.steps()
        return training.finish()


def build_accelerator(config: Stage1Config) -> Accelerator:
    """The accelerator of a run; a process may train several times, each time with other settings."""
    reset_accelerate_state()
    if config.torch_compile:
        torch.compiler.reset()  # torch.compile recompiles a limited number of times per process
    return Accelerator(
        mixed_precision=config.mixed_precision,  # not from the launcher, so that the saved config is correct
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.report_to or None,
        project_dir=config.output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=library_timeout(config.ddp_timeout))],
    )


class Training:
    """A run of stage 1: data, logs, evaluations and checkpoints around `VQGANTrainer.step`.

    Args:
        run: the folder of the run.
        request: states after every step whether a signal asks to stop.
        accelerator: determines devices, processes, precision and gradient accumulation.

    Attributes:
        step: optimizer steps done.
        metrics: metrics of the last evaluation.
    """

    def __init__(self, run: RunFolder, request: StopRequest, accelerator: Accelerator):
        self.run, self.request, self.accelerator = run, request, accelerator
        config: Stage1Config = run.config
        self.config = config
        loss, data = config.loss, config.data
        if loss.adversarial_weight and not config.has_discriminator and accelerator.is_main_process:
            logger.warning(
                "loss.adversarial_start_step (%d) is not below max_steps (%d): this run has no discriminator and no "
                "adversarial loss; --loss.adversarial_start_step 0.25 starts them after a quarter of the run",
                *(loss.adversarial_start_step, config.max_steps),
            )
        train_source, validation_source = load_images(data)
        self.trainer = VQGANTrainer(config, accelerator)
        model = self.trainer.average.config
        self.value_range = self._value_range(train_source, model.in_channels)
        self.train_set = ImageDataset(
            train_source,
            model.image_shape,
            model.in_channels,
            data.augmentation,
            config.seed,
            aspect_ratio=data.aspect_ratio,
            keep_batch_size=True,
            value_range=self.value_range,
        )
        self.validation_set = ImageDataset(
            validation_source,
            model.image_shape,
            model.in_channels,
            aspect_ratio=data.aspect_ratio,
            value_range=self.value_range,
        )
        self.skipped = SkippedImages(
            data.max_skipped_fraction,
            {"train": train_source.num_images, "validation": validation_source.num_images},
            run.path,
            accelerator.is_main_process,
        )
        self.networks = self._networks()
        self.health = Health(run, accelerator, loss.adversarial_type)
        self.step = 0
        self.metrics: dict[str, float] = {}

    def _value_range(self, train_source: Images, channels: int) -> ValueRange | None:
        """The range of the run: that of the tokenizer to fine-tune, that of an interrupted run, or a new one."""
        data, base = self.config.data, self.config.model_name_or_path
        if base is not None and self.config.codes_are_frozen:
            return trained_range(data, base)
        recorded = None if base is None else recorded_range(base)
        is_quiet = not self.accelerator.is_main_process
        return measured_once(self.run.path, data) or training_range(data, train_source, channels, recorded, is_quiet)

    def _networks(self) -> NetworkMetrics:
        """The metrics of the validation images that need a network, also that of the perceptual loss."""
        loss, device, model = self.config.loss, self.accelerator.device, self.trainer.average.config
        with self.accelerator.local_main_process_first():
            networks = network_metrics(self.config.metrics, model.image_shape, model.in_channels, device)
        for figure, reason in networks.left_out.items():
            self.accelerator.print(f"{figure} is left out: {reason}")
        perceptual: Any = self.trainer.generator_terms.losses.get("perceptual")
        if perceptual is not None:
            name = perceptual_name(loss.lpips_backbone, loss.lpips_weights)
            networks.new.append(mean_of(name, perceptual, device))
        return networks

    def resume(self) -> None:
        """Loads the checkpoint to resume from, if the run has one."""
        self.accelerator.wait_for_everyone()  # all must have read the folder before the main process changes it
        checkpoint = self.run.begin(self.accelerator.num_processes)
        if self.accelerator.is_main_process:
            save_measured(self.run.path, self.config.data, self.value_range)
        if checkpoint is not None:
            checkpointing.load(checkpoint.path, self.accelerator, self.trainer)
            self.step = checkpoint.step

    def steps(self) -> None:
        """Runs the remaining steps.

        Raises:
            ConfigError, Diverged, Stopped: see `train`.
        """
        if self.accelerator.is_main_process:
            self.tell()
        with Reporter(self.accelerator, self.run, self.step) as reporter:
            batches = self._training_batches()
            if self.step == self.config.max_steps:  # the last session was stopped after its last save
                self.evaluate(reporter)
            else:
                self._loop(batches, reporter)

    def tell(self) -> None:
        """Prints the first lines: what the data hold, and facts about the run."""
        config, source, train_set = self.config, self.train_set.source, self.train_set
        looked = look(source, LOOKED_AT_FIRST, train_set.num_channels, self.value_range)
        if looked.images == len(looked.skipped) > 0:
            image = looked.skipped[0]
            message = f"none of {looked.images} images can be used; {image.name}: {image.reason}"
            raise data_problem("dataset", message)
        limit = config.data.max_skipped_fraction
        facts = data_facts(source, self.validation_set.source, looked, train_set.image_shape, limit)
        facts["become"] = become(train_set.image_shape, train_set.num_channels, config.data.aspect_ratio)
        models = {"tokenizer": self.trainer.model, "discriminator": self.trainer.discriminator}
        device, processes = self.accelerator.device, self.accelerator.num_processes
        print_facts(facts | run_facts(config, device, processes, models, source.num_images, "reconstructions"))

    def _training_batches(self) -> Iterator[ImageBatch]:
        """The batches of the remaining steps. A new run first initialises its codebook from the first batches."""
        config, accelerator, trainer = self.config, self.accelerator, self.trainer
        accumulation = config.gradient_accumulation_steps
        sampler = training_sampler(
            self.train_set.source,
            config.device_batch_size(accelerator.num_processes),
            self.step * accumulation,
            config.max_steps * accumulation,
            config.seed,
            accelerator.process_index,
            accelerator.num_processes,
        )
        pin_memory = accelerator.device.type == "cuda"
        loader = training_loader(self.train_set, sampler, config.dataloader_num_workers, pin_memory)
        count = config.codebook.kmeans_init_batches * accumulation
        is_new = self.step == 0 and config.model_name_or_path is None
        if is_new and count and trainer.codebook_is_trained:
            first = self.skipped.watch("train", islice(loader, count))
            images = (batch.images(accelerator.device) for batch in first)
            initialise_codebook(trainer.model, trainer.average, images, accelerator, config.seed)
        return iter(self.skipped.watch("train", loader))

    def _loop(self, batches: Iterator[ImageBatch], reporter: Reporter) -> None:
        config, trainer, accumulation = self.config, self.trainer, self.config.gradient_accumulation_steps
        device, interval = self.accelerator.device, LogInterval(self.accelerator)
        for micro_step, batch in enumerate(batches, self.step * accumulation):
            # Seed dropout by the micro step, so that a resumed run draws the same numbers.
            torch.manual_seed(seed_from(config.seed, micro_step, self.accelerator.process_index))
            learning_rate = trainer.set_learning_rate(self.step)
            # `to` rather than `contiguous`, which would leave gray images as they are: their strides suit both formats.
            images = batch.images(device).to(memory_format=memory_format(config, device))
            interval.add(self.step, len(images), trainer.step(images, micro_step))
            if (micro_step + 1) % accumulation:
                continue

            self.step += 1
            signal_number = self.request.agreed_signal()
            is_last = self.step == config.max_steps
            reporter.bar.update()
            if self.step % config.logging_steps == 0 or is_last:
                self.log(interval, learning_rate, reporter)
                interval = LogInterval(self.accelerator)
            with interval.paused():
                if self.step % config.eval_steps == 0 or is_last:
                    self.evaluate(reporter)
                if self.step % config.save_steps == 0 or is_last or signal_number:
                    self.save(interval)
            if signal_number and not is_last:
                raise self.run.stopped(self.step, signal_number)

    def log(self, interval: LogInterval, learning_rate: float, reporter: Reporter) -> None:
        """Checks and reports the scalars since the last log."""
        self.skipped.exchange()
        self.health.require_finite_losses(interval.collected)
        scalars = interval.means() | self.trainer.codebook_statistics()
        scalars |= {"learning_rate": learning_rate, "images_per_second": interval.images_per_second}
        model = self.trainer.average
        num_codes_used = interval.images * model.config.num_codes_per_image
        self.health.warn_of_problems(scalars, interval.collected, num_codes_used, model.quantize.num_entries)
        reporter.show({name: scalars[f"loss/{name}"] for name in SHOWN_TERMS if f"loss/{name}" in scalars})
        reporter.scalars(scalars, self.step)

    def evaluate(self, reporter: Reporter) -> None:
        """Computes the reconstruction metrics of the whole validation split, and draws a grid of some images."""
        config, accelerator, dataset, model = self.config, self.accelerator, self.validation_set, self.trainer.average
        loader = evaluation_loader(
            dataset,
            config.per_device_eval_batch_size,
            config.dataloader_num_workers,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        batches = self.skipped.watch("validation", loader)
        metrics = [new() for new in self.networks.new]
        self.metrics = evaluate_reconstruction(model, batches, lambda total: accelerator.reduce(total, "sum"), metrics)
        self.skipped.exchange()
        reporter.evaluation(self.metrics, self.step)
        if not accelerator.is_main_process:
            return
        shown = dataset.__getitems__(some_images(dataset.source, config.num_sample_images))
        if len(shown.indices):
            originals = shown.images(model.device)
            with torch.no_grad():
                reconstructions = model(originals).reconstruction
            processor = VQGANImageProcessor(dataset.image_shape, dataset.num_channels)
            grid = reconstruction_grid(processor.postprocess(originals), processor.postprocess(reconstructions))
            reporter.image("reconstructions", grid, self.step)

    def save(self, interval: LogInterval) -> None:
        """Saves a checkpoint, if all losses and weights are finite."""
        self.health.require_finite_losses(interval.collected)
        self.health.require_finite_state(checkpointing.state_to_check(self.trainer), self.step)
        state = checkpointing.state_to_check(self.trainer)
        needed = sum(tensor.nbytes for _, tensors in state for tensor in tensors)
        with self.run.saving_checkpoint(self.step, needed):
            checkpointing.save(self.run, self.accelerator, self.trainer, self.step)

    def finish(self) -> VQGANModel:
        """Saves the tokenizer (the averaged weights, with a fingerprint), the discriminator if there is one, and the
        results. Returns the tokenizer.
        """
        model = copy.deepcopy(self.trainer.average).cpu().eval()
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-arg]
        if self.accelerator.is_main_process:
            size, channels = model.config.image_size, model.config.in_channels
            found = self.value_range
            processor = VQGANImageProcessor(
                size,
                channels,
                self.config.data.aspect_ratio,
                None if found is None else [found.low, found.high],
                found is not None and found.of_bytes,
            )
            with self.run.replaced_model(model.get_memory_footprint()) as folder:
                model.save_pretrained(folder)
                processor.save_pretrained(folder)
                if self.trainer.discriminator is not None:
                    discriminator = self.accelerator.unwrap_model(self.trainer.discriminator)
                    save_discriminator(discriminator, self.config.discriminator.architecture, folder)
            print(f"tokenizer saved in {Path(self.run.path).resolve()} (fingerprint {model.config.fingerprint})")
            self.run.finish(self.step, self.metrics)
        self.accelerator.wait_for_everyone()
        return model
