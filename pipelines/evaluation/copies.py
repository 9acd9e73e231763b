"""The copying check of an evaluation, and its picture."""

from pathlib import Path

import torch

from configs.files import write_png
from configs.problems import one_line
from pipelines.evaluation.config import EvaluationConfig
from pipelines.evaluation.copying import CopyingCheck, copying_check, suspect_rows
from pipelines.evaluation.image_set import ImageSet, Mirrored
from pipelines.evaluation.reconstructions import Reconstructions
from pipelines.evaluation.report import ToImages
from pipelines.evaluation.stored_views import stored_views
from pipelines.pipeline_vqgan import VQGANPipeline
from stage1_vqgan import labelled_grid
from stage1_vqgan.networks import load_network
from stage2_prior import CodeStore

NETWORK = "pixels"  # it finds more changed copies than a classifier does, and needs no weights
COPIES_NAME = "copies.png"
COLUMNS = 8
FIGURES = ("suspected_copies", "suspected_copies_chance", "nearer_than_held_out")


def check_copies(
    pipeline: VQGANPipeline | None,
    device: torch.device,
    known: list[ImageSet],
    validation: ImageSet,
    generated: ImageSet,
) -> tuple[CopyingCheck | None, str]:
    """Compares generated images with training images and with held-out ones.

    Args:
        pipeline: gives held-out images back, as it does with `known`; None for the images of a file.
        device: where features are computed.
        known: the training images, see `known_images`.
        validation: held-out images.
        generated: the evaluated images.

    Returns:
        The check; or None and why it is left out.
    """
    if pipeline is not None:
        validation = Reconstructions(validation, pipeline.vqgan)
    network = load_network(NETWORK).to(device)
    try:
        return copying_check(generated, known, validation, network), ""
    except ValueError as error:
        return None, one_line(error)


def known_images(
    config: EvaluationConfig, pipeline: VQGANPipeline | None, store: CodeStore | None, train: ImageSet
) -> list[ImageSet]:
    """The training images of a prior in all their views, as its tokenizer gives them back.

    With a code store they are the views that it holds. Otherwise they are the images `train`, and the mirrored ones if
    the augmentation of the evaluation mirrors. Images of a file have no tokenizer here, so they are compared with the
    training images themselves.
    """
    if pipeline is not None and store is not None:
        return stored_views(store, pipeline.vqgan, config.max_real_images)
    images = train if pipeline is None else Reconstructions(train, pipeline.vqgan)
    augmentation = config.data.augmentation
    is_mirrored = augmentation.horizontal_flip or augmentation.ten_crop
    return [images, Mirrored(images)] if is_mirrored else [images]


def save_copies(
    config: EvaluationConfig, check: CopyingCheck, known: list[ImageSet], generated: ImageSet, to_images: ToImages
) -> None:
    """Writes copies.png: the most suspicious images above their nearest training images.

    Args:
        config: settings of the evaluation.
        check: what `check_copies` returned.
        known: the training images, see `known_images`.
        generated: the evaluated images.
        to_images: makes images of Pillow of pixels.
    """
    rows = suspect_rows(check.suspects, generated, known, to_images, columns=COLUMNS)
    write_png(Path(config.output_dir) / COPIES_NAME, labelled_grid(rows, COLUMNS, min_tile=48))
