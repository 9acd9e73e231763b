"""The copying check of an evaluation, and its picture."""

from pathlib import Path

import torch

from configs.files import write_png
from configs.problems import one_line
from pipelines.evaluation.config import EvaluationConfig
from pipelines.evaluation.copying import CopyingCheck, copying_check, suspect_rows
from pipelines.evaluation.image_set import ImageSet
from pipelines.evaluation.reconstructions import Reconstructions
from pipelines.evaluation.report import ToImages
from pipelines.pipeline_vqgan import VQGANPipeline
from stage1_vqgan import labelled_grid
from stage1_vqgan.networks import load_network

NETWORK = "pixels"  # it finds more changed copies than a classifier does, and needs no weights
COPIES_NAME = "copies.png"
COLUMNS = 8
FIGURES = ("suspected_copies", "suspected_copies_chance", "nearer_than_held_out")


def check_copies(
    config: EvaluationConfig,
    pipeline: VQGANPipeline | None,
    device: torch.device,
    train: ImageSet,
    validation: ImageSet,
    generated: ImageSet,
) -> tuple[CopyingCheck | None, str]:
    """Compares generated images with training images, as a tokenizer gives them back.

    Images of a file have no tokenizer here, so they are compared with the training images themselves.

    Returns:
        The check; or None and why it is left out.
    """
    if pipeline is not None:
        train, validation = (Reconstructions(images, pipeline.vqgan) for images in (train, validation))
    network = load_network(NETWORK).to(device)
    try:
        return copying_check(generated, train, validation, network, counts_mirrored(config)), ""
    except ValueError as error:
        return None, one_line(error)


def counts_mirrored(config: EvaluationConfig) -> bool:
    """Whether mirrored training images count as training images."""
    return config.data.augmentation.horizontal_flip or config.data.augmentation.ten_crop


def save_copies(
    config: EvaluationConfig, check: CopyingCheck, train: ImageSet, generated: ImageSet, to_images: ToImages
) -> None:
    """Writes copies.png: the most suspicious images above their nearest training images."""
    rows = suspect_rows(check.suspects, generated, train, to_images, columns=COLUMNS)
    write_png(Path(config.output_dir) / COPIES_NAME, labelled_grid(rows, COLUMNS, min_tile=48))
