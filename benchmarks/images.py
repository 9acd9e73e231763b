"""Images of a split for the benchmarks, prepared for a pipeline."""

import argparse
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from configs import ConfigError
from pipelines import VQGANPipeline
from pipelines.evaluation.real_images import read_real_images
from stage1_vqgan import DataConfig, load_images


class Split(NamedTuple):
    """N images: as Pillow's, their codes as `VQGANPipeline.encode` returns them, and class names of the data set."""

    images: list[Image.Image]
    codes: Tensor
    labels: list[str] | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that choose the images."""
    parser.add_argument("pipeline", help="folder or Hub id of a pipeline")
    parser.add_argument("--data", required=True, help="the images, as data.dataset of a training")
    parser.add_argument("--validation_split", default=None, help="data.validation_split of the training, if it had one")
    parser.add_argument("--images", type=int, default=1000, help="largest number of images, spread over the split")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def load_pipeline(args: argparse.Namespace) -> VQGANPipeline:
    """The pipeline, on the device and without progress bars."""
    pipe = VQGANPipeline.from_pretrained(args.pipeline, device=args.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def read_split(
    pipe: VQGANPipeline, dataset: str, args: argparse.Namespace, train: bool = False, use_labels: bool = True
) -> Split:
    """At most `args.images` images of the validation split, or of the training split."""
    try:
        sources = load_images(
            DataConfig(dataset=dataset, validation_split=args.validation_split, use_labels=use_labels)
        )
    except ConfigError as error:
        raise SystemExit(str(error)) from error
    source = sources[0 if train else 1]
    found = read_real_images(source, pipe.image_processor, args.images, max_skipped_fraction=0.1)
    images = pipe.image_processor.postprocess(found.pixels())
    known = source.class_names
    names = [known[number] for number in found.labels.tolist()] if found.labels is not None and known else None
    return Split(images, pipe.encode(images).cpu(), names)
