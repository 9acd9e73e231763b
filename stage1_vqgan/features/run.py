"""The training of a feature network: a small ResNet of transformers that tells the classes of the user's images."""

import contextlib
import math
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import parse_flag_from_env
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    ViTImageProcessor,
    set_seed,
)

from configs import ConfigError, Problem, check, save_config
from configs.compat import reset_accelerate_state
from configs.folder_lock import LOCK_NAME, OWNER_NAME, locked_folder
from configs.interruption import Diverged
from configs.opening import num_trained, print_facts
from configs.run_folder import CONFIG_NAME
from configs.staging import SAVING, replaced_files
from stage1_vqgan.data.config import data_problem
from stage1_vqgan.data.dataset import ImageDataset
from stage1_vqgan.data.loading import evaluation_loader, training_loader
from stage1_vqgan.data.overview import LOOKED_AT_FIRST, become, data_facts, look
from stage1_vqgan.data.samplers import training_sampler
from stage1_vqgan.data.skipped import SkippedImages
from stage1_vqgan.data.sources import load_images
from stage1_vqgan.data.value_range import training_range
from stage1_vqgan.features.batches import LabelledBatches
from stage1_vqgan.features.config import FeaturesConfig

# ResNet-18 of half the width: 2.8 million parameters.
LAYOUT: dict[str, Any] = {
    "embedding_size": 32,
    "hidden_sizes": [32, 64, 128, 256],
    "depths": [2, 2, 2, 2],
    "layer_type": "basic",
}
ADVICE = "try a lower learning_rate"


class FeatureTrainer(Trainer):
    """Trainer whose batches are those of this project: augmented, and the same on any number of workers.

    Args:
        config: the settings.
        train_set, validation_set: images with labels.
        args, kwargs: passed to `transformers.Trainer`.
    """

    def __init__(
        self, *args: Any, config: FeaturesConfig, train_set: ImageDataset, validation_set: ImageDataset, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self.config, self.train_set, self.validation_set = config, train_set, validation_set
        counts = {"train": train_set.source.num_images, "validation": validation_set.source.num_images}
        self.skipped = SkippedImages(config.data.max_skipped_fraction, counts)

    def get_train_dataloader(self) -> Any:
        """The batches of this process for all steps, as one epoch of Trainer."""
        config, args = self.config, self.args
        sampler = training_sampler(
            self.train_set.source,
            config.per_device_train_batch_size,
            0,
            config.max_steps,
            config.seed,
            args.process_index,
            args.world_size,
        )
        pin_memory = args.device.type == "cuda"
        loader = training_loader(self.train_set, sampler, config.dataloader_num_workers, pin_memory)
        return self._labelled(loader, self.train_set, "train")

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Ends the training if too many images cannot be decoded."""
        self.skipped.exchange()
        super().log(*args, **kwargs)

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The share of validation images whose class is recognised, over all processes: `accuracy`; and `images`.

        Raises:
            ConfigError: too many images cannot be decoded, or all validation images.
        """
        arguments, model = self.args, cast(PreTrainedModel, self.model).eval()
        loader = evaluation_loader(
            self.validation_set,
            self.config.per_device_train_batch_size,
            self.config.dataloader_num_workers,
            arguments.process_index,
            arguments.world_size,
        )
        right = torch.zeros(2, device=arguments.device)
        for batch in self._labelled(loader, self.validation_set, "validation"):
            is_right = model(batch["pixel_values"]).logits.argmax(1) == batch["labels"]
            right += torch.tensor([is_right.sum(), len(is_right)], device=arguments.device)
        self.skipped.exchange()
        found, images = self.accelerator.reduce(right).tolist()
        if not images:
            raise data_problem("dataset", "none of the validation images can be decoded")
        return {"accuracy": found / images, "images": int(images)}

    def _labelled(self, loader: Any, dataset: ImageDataset, split: str) -> LabelledBatches:
        return LabelledBatches(loader, dataset, split, self.config.input_size, self.args.device, self.skipped)


def train(config: FeaturesConfig) -> PreTrainedModel:
    """Trains a feature network and saves it in `config.output_dir`, a stock classifier of transformers.

    An interrupted training leaves no network, and starts anew.

    Returns:
        The network, on the CPU. Its configuration has `validation_accuracy`, in [0, 1], and `trained_on`.

    Raises:
        ConfigError: the images have no labels, or cannot be read; or the folder holds files.
        Diverged: a weight is not finite.
    """
    config = check(config)
    reset_accelerate_state()
    arguments = training_arguments(config)
    with contextlib.ExitStack() as opened:
        if arguments.process_index == 0:
            opened.enter_context(locked_folder(config.output_dir, "output_dir"))
            require_empty(config.output_dir)
        trainer = build_trainer(config, arguments)
        if trainer.is_world_process_zero():
            tell(config, trainer)
        trainer.train()
        model = trainer.accelerator.unwrap_model(trainer.model)
        if not all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values()):
            raise Diverged(f"a weight is not finite after {config.max_steps} steps; {ADVICE}")
        measured = trainer.evaluate()
        if trainer.is_world_process_zero():
            save(config, model, measured)
        trainer.accelerator.wait_for_everyone()
    return model.cpu().eval()


def training_arguments(config: FeaturesConfig) -> TrainingArguments:
    """The arguments of Trainer. It saves nothing; `save` does."""
    return TrainingArguments(
        output_dir=config.output_dir,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.per_device_train_batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(0.05 * config.max_steps),
        weight_decay=0.05,
        seed=config.seed,
        logging_steps=max(1, config.max_steps // 10),
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        ddp_find_unused_parameters=False,  # every parameter takes part in every step
        use_cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available(),
    )


def require_empty(folder: str) -> None:
    """Refuses a folder with files: they may be another model, whose files this one would replace."""
    names = sorted({path.name for path in Path(folder).iterdir()} - {LOCK_NAME, OWNER_NAME, SAVING})
    if names:
        message = f"received {folder!r}, which holds {names[0]!r}; choose a new folder, or empty this one"
        raise ConfigError([Problem("output_dir", message)])


def build_trainer(config: FeaturesConfig, arguments: TrainingArguments) -> FeatureTrainer:
    """The network before its first step, and its images.

    Raises:
        ConfigError: the images cannot be read, or have fewer than two classes.
    """
    data, shape, channels = config.data, config.image_shape, config.in_channels
    sources = load_images(data)
    names = sources[0].class_names or []
    if len(names) < 2:
        found = f"one class, {names[0]!r}" if names else "no labels"
        raise data_problem("label_column", f"{data.dataset!r} has {found}; name a column with two classes or more")
    value_range = training_range(data, sources[0], channels, quiet=arguments.process_index > 0)
    train_set, validation_set = (
        ImageDataset(
            source,
            shape,
            channels,
            data.augmentation if source is sources[0] else None,
            config.seed,
            aspect_ratio=data.aspect_ratio,
            keep_batch_size=source is sources[0],
            value_range=value_range,
        )
        for source in sources
    )
    set_seed(config.seed)
    model = ResNetForImageClassification(
        ResNetConfig(
            num_channels=channels,
            id2label=dict(enumerate(names)),
            label2id={n: i for i, n in enumerate(names)},
            **LAYOUT,
        )
    )
    return FeatureTrainer(
        model=model, args=arguments, config=config, train_set=train_set, validation_set=validation_set
    )


def tell(config: FeaturesConfig, trainer: FeatureTrainer) -> None:
    """Prints the first lines: what the data hold, and facts about the training."""
    train_set, data = trainer.train_set, config.data
    looked = look(train_set.source, LOOKED_AT_FIRST, config.in_channels, train_set.value_range)
    facts = data_facts(
        train_set.source, trainer.validation_set.source, looked, config.image_shape, data.max_skipped_fraction
    )
    images = config.max_steps * config.per_device_train_batch_size * trainer.args.world_size
    facts |= {
        "become": become(config.image_shape, config.in_channels, data.aspect_ratio),
        "device": f"{trainer.args.world_size} × {trainer.args.device}",
        "parameters": f"{num_trained(trainer.model):,}",
        "length": f"{config.max_steps:,} steps, {images / len(train_set.source):.3g} epochs",  # type: ignore[arg-type]
    }
    print_facts(facts)


def save(config: FeaturesConfig, model: PreTrainedModel, measured: dict[str, float]) -> None:
    """Saves the network, the size and values of the images that it expects, and the settings of its training."""
    settings: Any = model.config
    settings.validation_accuracy, settings.validation_images = measured["accuracy"], measured["images"]
    settings.image_shape = list(config.image_shape)
    half, size = [0.5] * config.in_channels, config.input_size
    with replaced_files(config.output_dir, sum(weight.nbytes for weight in model.parameters())) as folder:
        model.save_pretrained(folder)
        processor = ViTImageProcessor(size={"height": size, "width": size}, image_mean=half, image_std=half)
        processor.save_pretrained(folder)
        save_config(config, folder / CONFIG_NAME)
    share = f"{100 * measured['accuracy']:.1f} % of {measured['images']:,} validation images are recognised"
    print(f"{share}; the network is saved in {config.output_dir}, its name is transformers/{config.output_dir}")
