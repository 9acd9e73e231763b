"""Does the copying check expose a prior that copies, spare one that does not, and find copies that were changed?

    python -m benchmarks.copying [PRESET] [--images 100] [--feature_network transformers/FOLDER]

PRESET names a folder of presets whose pipeline has been built; by default it is digits, the preset of `make demo`.

The first table is of two priors with the same tokenizer: that of the pipeline, and one that trains on purpose on a few
of its training images, without augmentation, so long that it repeats them. Both are compared with all training images
and with these few. The table also has the figures of the other metrics.

The second table is of known copies: training images that were changed. It says which share of them is suspected, with
the features of each network. In the columns `through the tokenizer`, all images are its reconstructions, as the
evaluation of a pipeline compares them; in the others they are sharp, as the evaluation of a file compares them. The
check compares with one half of the validation images; the other half are the images that are no copies.

The output folder gets `copying.json`, the picture `copies.png`, and the models. After an interruption, the same command
continues.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Features, Image as ImageFeature
from torch import Tensor

from benchmarks.families import Real
from benchmarks.machine import environment
from benchmarks.recipes import overrides
from benchmarks.report import table, write
from configs import ConfigError, load_config
from configs.files import write_png
from configs.interruption import Stopped
from configs.randomness import uniform_rows
from pipelines import VQGANPipeline
from pipelines.build import BuildConfig, build
from pipelines.commands import load_pipeline
from pipelines.evaluation.config import EvaluationConfig
from pipelines.evaluation.copies import NETWORK, check_copies, counts_mirrored
from pipelines.evaluation.copying import CopyingCheck, check_features, features, suspect_rows
from pipelines.evaluation.generated import generate_samples
from pipelines.evaluation.image_set import ImageSet
from pipelines.evaluation.reading import PixelImages, SomeImages, parts, some_pixels
from pipelines.evaluation.reconstructions import Reconstructions
from pipelines.evaluation.shards import levels_of, pixels_of_levels
from stage1_vqgan import AugmentationConfig, labelled_grid, spread
from stage1_vqgan.data.augmentation import NUM_DRAWS, augment
from stage1_vqgan.networks import FrozenNetwork, load_network
from stage2_prior import CLASS, Stage2Config
from stage2_prior.tokenize import tokenize
from stage2_prior.training.run import train as train_prior

COLUMNS = 12  # images in a row of the picture
NOISE, BRIGHTER = 0.05, 0.1  # fractions of the range of pixels


def save_images(folder: Path, splits: dict[str, ImageSet], pipe: VQGANPipeline) -> None:
    """Writes images, as the tokenizer sees them, to a parquet file for each split."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, images in splits.items():
        pictures = [image for part in parts(images) for image in pipe.image_processor.postprocess(part)]
        columns: dict[str, Any] = {"image": pictures, "label": images.labels}
        kinds = Features({"image": ImageFeature(), "label": ClassLabel(names=pipe.class_names)})
        Dataset.from_dict(columns, kinds).to_parquet(folder / f"{name}.parquet")


def overfitted(args: argparse.Namespace, few: ImageSet, validation: ImageSet, good: VQGANPipeline) -> str:
    """Trains a prior on a few images for many epochs.

    Args:
        args: the arguments of the command.
        few: the images.
        validation: those that the training evaluates; they choose nothing.
        good: a pipeline with the tokenizer.

    Returns:
        The folder of the prior's pipeline.
    """
    root = args.output_dir
    save_images(root / "images", {"train": few, "validation": validation}, good)
    values = {
        "output_dir": str(root / "prior"),
        "code_store": str(root / "codes"),
        "max_steps": args.steps,
        "eval_steps": args.steps,
        "save_steps": args.steps,
        "keep_best": False,
        "num_views": 1,
        "data": {"dataset": str(root / "images"), "validation_split": "validation"},
        "report_to": [],
    }
    config = load_config(Stage2Config, f"{args.preset}/stage2", args.stage2 | values)
    tokenize(config)
    train_prior(config)
    build(BuildConfig(tokenizer=config.tokenizer, prior=config.output_dir, output_dir=str(root / "pipeline")))
    return str(root / "pipeline")


class Check:
    """The copying check of the generated images of a prior, with each of some sets of training images."""

    def __init__(self, config: EvaluationConfig, pipe: VQGANPipeline, real: Real) -> None:
        samples, labels = generate_samples(config, pipe)
        self.config, self.pipe, self.real, self.generated = config, pipe, real, PixelImages(samples)
        self.others = {name: round(value, 3) for name, value in real.metrics(samples, labels[CLASS]).items()}

    def against(self, train: ImageSet) -> CopyingCheck:
        """The product's own check with these training images."""
        check, reason = check_copies(
            self.config, self.pipe, self.pipe.device, train, self.real.validation, self.generated
        )
        if check is None:
            raise SystemExit(reason)
        return check

    def row(self, prior: str, train: ImageSet) -> dict[str, Any]:
        """A line of the first table."""
        found = self.against(train).figures
        counts = {"generated": len(self.generated), "train": len(train), "held out": len(self.real.validation)}
        suspected = f"{found['suspected_copies']:.3f} ± {found['suspected_copies_chance']:.3f}"
        nearer = round(found["nearer_than_held_out"], 3)
        return {"prior": prior, **counts, "suspected copies": suspected, "nearer": nearer, **self.others}

    def pictures(self, label: str, train: ImageSet) -> list[tuple[str, Any]]:
        """Two rows of the picture: the most suspicious images above their nearest training images."""
        known = Reconstructions(train, self.pipe.vqgan)
        show = self.pipe.image_processor.postprocess
        rows = suspect_rows(self.against(train).suspects, self.generated, known, show, COLUMNS, COLUMNS)
        return [(label, rows[0][1]), rows[1]]


def changed(images: Tensor, augmentation: AugmentationConfig) -> dict[str, Tensor]:
    """Copies of images that were changed, and images put together of two of them.

    Args:
        images: `(N, C, H, W)` in [-1, 1].
        augmentation: that of the training of a prior.

    Returns:
        Images of the same shape and range, by the change.
    """
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    others, (height, width) = images.roll(len(images) // 2, 0), images.shape[2:]
    top, left = (side * 3 // 8 for side in (height, width))
    square, half = images.clone(), images.clone()
    where = (..., slice(top, top + height // 4), slice(left, left + width // 4))
    square[where] = others[where]
    half[..., : height // 2, :] = others[..., : height // 2, :]
    kinds = {
        "unchanged": images,
        f"brighter by {BRIGHTER:.0%} of the range": (images + 2 * BRIGHTER).clamp(-1, 1),
        f"noise of {NOISE:.0%} of the range": (images + 2 * NOISE * noise).clamp(-1, 1),
        "shifted by a pixel": F.pad(images, (1, 0, 0, 0), "replicate")[..., :-1],
        "a square in the middle, a quarter of the side, of another image": square,
        "the upper half of another image": half,
    }
    if augmentation != AugmentationConfig() and not augmentation.ten_crop:
        kinds["augmented as in the training of the prior"] = augmented(images, augmentation)
    return kinds


def augmented(images: Tensor, augmentation: AugmentationConfig) -> Tensor:
    """A random view of each image `(N, C, H, W)`."""
    draws = uniform_rows(0, np.arange(len(images))[:, None], NUM_DRAWS)
    views = []
    for image, numbers in zip(levels_of(images), draws, strict=True):
        view, flips = augment(image, tuple(image.shape[:2]), augmentation, numbers)
        views.append(view.flip(1) if flips else view)
    return pixels_of_levels(torch.stack(views).numpy())


def shares(
    kinds: dict[str, ImageSet], train: ImageSet, held_out: ImageSet, network: FrozenNetwork, mirrored: bool
) -> dict[str, float]:
    """Which share of the images of each kind is suspected; see `copying_check`."""
    known = torch.cat([features(train, network, "training images", flip) for flip in (False, True)[: 1 + mirrored]])
    others = features(held_out, network, "held-out images")
    return {
        name: check_features(features(images, network, name), known, others, len(train)).figures["suspected_copies"]
        for name, images in kinds.items()
    }


def known_copies(args: argparse.Namespace, real: Real, pipe: VQGANPipeline) -> list[dict[str, Any]]:
    """The lines of the second table."""
    copied = some_pixels(real.train, spread(len(real.train), args.copies))
    augmentation = load_config(Stage2Config, f"{args.preset}/stage2", args.stage2).data.augmentation
    kinds: dict[str, ImageSet] = {name: PixelImages(one) for name, one in changed(copied, augmentation).items()}
    kinds["as the tokenizer gives it back"] = Reconstructions(kinds["unchanged"], pipe.vqgan)
    kinds["no copies: validation images"], held_out = halves(real.validation)
    rows: dict[str, dict[str, Any]] = {name: {"change": name, "images": len(images)} for name, images in kinds.items()}
    for name in (NETWORK, *args.feature_networks):
        network = load_network(name).to(pipe.device)
        sharp = shares(kinds, real.train, held_out, network, counts_mirrored(real.config))
        through = {kind: Reconstructions(images, pipe.vqgan) for kind, images in kinds.items()}
        sets = (Reconstructions(images, pipe.vqgan) for images in (real.train, held_out))
        blurred = shares(through, *sets, network, counts_mirrored(real.config))
        for kind, row in rows.items():
            row |= {name: round(sharp[kind], 3), f"{name}, through the tokenizer": round(blurred[kind], 3)}
    return list(rows.values())


def halves(images: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Every second image of a set, and the others."""
    even, odd = (SomeImages(images, range(first, len(images), 2)) for first in (0, 1))
    return even, odd


def priors(args: argparse.Namespace, real: Real, good: VQGANPipeline) -> list[dict[str, Any]]:
    """The lines of the first table. Draws the picture."""
    few = SomeImages(real.train, spread(len(real.train), args.images, real.train.labels))
    plain = replace(real.config, data=replace(real.config.data, augmentation=AugmentationConfig()))
    pipe = load_pipeline(overfitted(args, few, real.validation, good))
    pipe.set_progress_bar_config(disable=True)
    of_few, of_all = f"of {len(few)} images", "of the pipeline"
    overfit, usual = Check(plain, pipe, real), Check(real.config, good, real)
    picture = overfit.pictures(f"a prior {of_few}", few) + usual.pictures("the prior of the pipeline", real.train)
    write_png(args.output_dir / "copies.png", labelled_grid(picture, COLUMNS, min_tile=48))
    sets: tuple[ImageSet, ...] = (few, real.train)
    return [check.row(name, train) for name, check in ((of_few, overfit), (of_all, usual)) for train in sets]


def run(args: argparse.Namespace) -> None:
    """Measures both tables, prints and saves them."""
    where = environment()
    config = load_config(EvaluationConfig, f"{args.preset}/evaluate", args.evaluate)
    args.stage2.setdefault("tokenizer", f"{config.pipeline}/vqgan")
    good = load_pipeline(str(config.pipeline))
    good.set_progress_bar_config(disable=True)
    real = Real(config, good)
    results = {"priors": priors(args, real, good), "known copies": known_copies(args, real, good)}
    for rows in results.values():
        print(f"\n{table(rows)}")
    write(args.output_dir / "copying.json", {"environment": where, "settings": str(vars(args)), **results})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.copying", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", nargs="?", default="digits", help="folder of presets, by default digits")
    parser.add_argument("--images", type=int, default=100, help="training images of the prior that copies")
    parser.add_argument("--steps", type=int, default=300, help="steps of its training")
    parser.add_argument("--copies", type=int, default=500, help="largest number of training images that are changed")
    parser.add_argument("--feature_networks", nargs="+", default=[], metavar="NAME", help="further networks")
    for name in ("stage2", "evaluate"):
        parser.add_argument(f"--{name}", nargs="+", default=[], metavar="KEY=VALUE", help="further settings of it")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmarks/copying"))
    args = parser.parse_args(arguments)
    args.stage2, args.evaluate = map(overrides, (args.stage2, args.evaluate))
    try:
        run(args)
    except (ConfigError, Stopped) as error:
        print(error, flush=True)
        sys.exit(error.exit_code if isinstance(error, Stopped) else 2)


if __name__ == "__main__":
    main()
