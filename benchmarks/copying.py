"""Does the copying check expose a prior that copies, spare one that does not, and find copies that were changed?

    python -m benchmarks.copying [PRESET] [--images 100] [--feature_network transformers/FOLDER]

PRESET names a folder of presets whose pipeline has been built; by default it is digits, the preset of `make demo`.

The first table is of three priors with the same tokenizer: that of the pipeline, and two that train on purpose on a few
of its training images, so long that they repeat them: one on the images alone, one on the views of the preset. All are
compared with these few images; the first two also with all training images; the last two also with the views of their
code store. The table also has the figures of the other metrics.

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
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Features, Image as ImageFeature
from PIL import Image
from torch import Tensor

from benchmarks.families import Real
from benchmarks.machine import environment
from benchmarks.report import table, write
from benchmarks.stages import overrides
from configs import ConfigError, load_config, to_dict
from configs.files import write_png
from configs.interruption import Stopped
from configs.randomness import uniform_rows
from pipelines import VQGANPipeline
from pipelines.build import BuildConfig, build
from pipelines.commands import load_pipeline
from pipelines.evaluation.config import EvaluationConfig
from pipelines.evaluation.copies import NETWORK, check_copies, known_images
from pipelines.evaluation.copying import CopyingCheck, check_features, features, suspect_rows
from pipelines.evaluation.generated import generate_samples
from pipelines.evaluation.image_set import ImageSet
from pipelines.evaluation.prompts import open_store
from pipelines.evaluation.reading import PixelImages, SomeImages, parts, some_pixels
from pipelines.evaluation.reconstructions import Reconstructions
from pipelines.evaluation.shards import levels_of, pixels_of_levels
from stage1_vqgan import AugmentationConfig, labelled_grid, spread
from stage1_vqgan.data.augmentation import NUM_DRAWS, augment
from stage1_vqgan.networks import FrozenNetwork, load_network
from stage2_prior import CLASS, CodeStore, Stage2Config
from stage2_prior.tokenize import tokenize
from stage2_prior.training.run import train as train_prior

Sets = tuple[dict[str, ImageSet], list[ImageSet], ImageSet]  # changed images, training images, held-out images
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


def overfitted(args: argparse.Namespace, few: ImageSet, validation: ImageSet, good: VQGANPipeline, views: int) -> Path:
    """Trains a prior on a few images for many epochs.

    Args:
        args: the arguments of the command.
        few: the images.
        validation: those that the training evaluates; they choose nothing.
        good: a pipeline with the tokenizer.
        views: number of views of each image, by the augmentation of the preset.

    Returns:
        A folder with its `codes` and its `pipeline`.
    """
    images, root = args.output_dir / "images", args.output_dir / f"views_{views}"
    save_images(images, {"train": few, "validation": validation}, good)
    preset, data = f"{args.preset}/stage2", dict[str, Any](dataset=str(images), validation_split="validation")
    if views > 1:
        data["augmentation"] = to_dict(load_config(Stage2Config, preset, args.stage2).data.augmentation)
    steps = args.steps if views == 1 else args.view_steps
    values = {
        "output_dir": str(root / "prior"),
        "code_store": str(root / "codes"),
        "max_steps": steps,
        "eval_steps": steps,
        "save_steps": steps,
        "keep_best": False,
        "num_views": views,
        "data": data,
        "report_to": [],
    }
    config = load_config(Stage2Config, preset, {"per_device_train_batch_size": 64} | args.stage2 | values)
    tokenize(config)
    train_prior(config)
    build(BuildConfig(tokenizer=config.tokenizer, prior=config.output_dir, output_dir=str(root / "pipeline")))
    return root


class Prior(NamedTuple):
    """A prior, and the images that it generated.

    Attributes:
        name: its name in tables and in the picture.
        config: settings of its evaluation.
        pipe: its pipeline.
        train: the images that it was trained on.
        generated: the images.
        others: the other metrics of them.
    """

    name: str
    config: EvaluationConfig
    pipe: VQGANPipeline
    train: ImageSet
    generated: ImageSet
    others: dict[str, float]

    def known(self, train: ImageSet | CodeStore) -> list[ImageSet]:
        """Training images, or the views of a code store, as an evaluation compares with them."""
        if isinstance(train, CodeStore):
            return known_images(self.config, self.pipe, train, self.train)
        return known_images(self.config, self.pipe, None, train)

    def check(self, known: list[ImageSet], validation: ImageSet) -> CopyingCheck:
        """The check that an evaluation does, with these training images."""
        check, reason = check_copies(self.pipe, self.pipe.device, known, validation, self.generated)
        if check is None:
            raise SystemExit(reason)
        return check

    def pictures(self, check: CopyingCheck, known: list[ImageSet]) -> list[tuple[str, list[Image.Image]]]:
        """Two rows: the most suspicious images above their nearest training images."""
        show = self.pipe.image_processor.postprocess
        above, below = suspect_rows(check.suspects, self.generated, known, show, COLUMNS, COLUMNS)
        return [(self.name, above[1]), below]


def sampled(name: str, config: EvaluationConfig, pipe: VQGANPipeline, train: ImageSet, real: Real) -> Prior:
    """Generates the images of a prior, and measures them."""
    pipe.set_progress_bar_config(disable=True)
    samples, labels = generate_samples(config, pipe)
    return Prior(name, config, pipe, train, PixelImages(samples), real.metrics(samples, labels[CLASS]))


def line(prior: Prior, name: str, known: list[ImageSet], validation: ImageSet, check: CopyingCheck) -> dict[str, Any]:
    """A line of the first table."""
    found = check.figures
    compared = {"compared with": name, "generated": len(prior.generated), "train": len(known[0])}
    counts = compared | {"views": len(known), "held out": len(validation)}
    suspected = f"{found['suspected_copies']:.3f} ± {found['suspected_copies_chance']:.3f}"
    others = {"nearer": found["nearer_than_held_out"]} | prior.others
    rounded = {name: round(value, 3) for name, value in others.items()}
    return {"prior": prior.name, **counts, "suspected copies": suspected, **rounded}


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
    kinds: dict[str, ImageSet], train: list[ImageSet], held_out: ImageSet, network: FrozenNetwork
) -> dict[str, float]:
    """Which share of the images of each kind is suspected; see `copying_check`."""
    known = torch.stack([features(view, network, "training images") for view in train])
    others = features(held_out, network, "held-out images")
    return {
        name: check_features(features(images, network, name), known, others).figures["suspected_copies"]
        for name, images in kinds.items()
    }


def known_copies(args: argparse.Namespace, real: Real, pipe: VQGANPipeline) -> list[dict[str, Any]]:
    """The lines of the second table."""
    copied = some_pixels(real.train, spread(len(real.train), args.copies))
    augmentation = load_config(Stage2Config, f"{args.preset}/stage2", args.stage2).data.augmentation
    kinds: dict[str, ImageSet] = {name: PixelImages(one) for name, one in changed(copied, augmentation).items()}
    kinds["as the tokenizer gives it back"] = given_back(kinds["unchanged"], pipe)
    fresh, held_out = (SomeImages(real.validation, range(first, len(real.validation), 2)) for first in (0, 1))
    kinds["no copies: validation images"] = fresh
    through = {name: given_back(images, pipe) for name, images in kinds.items()}
    sets: dict[str, Sets] = {
        "": (kinds, known_images(real.config, None, None, real.train), held_out),
        ", through the tokenizer": (
            through,
            known_images(real.config, None, None, given_back(real.train, pipe)),
            given_back(held_out, pipe),
        ),
    }
    rows: dict[str, dict[str, Any]] = {name: {"change": name, "images": len(images)} for name, images in kinds.items()}
    for name in (NETWORK, *args.feature_networks):
        network = load_network(name).to(pipe.device)
        for how, (copies, train, others) in sets.items():
            for kind, share in shares(copies, train, others, network).items():
                rows[kind][name + how] = round(share, 3)
    return list(rows.values())


def given_back(images: ImageSet, pipe: VQGANPipeline) -> ImageSet:
    """What the tokenizer makes of images, in memory."""
    return PixelImages(torch.cat(list(parts(Reconstructions(images, pipe.vqgan)))))


def priors(args: argparse.Namespace, real: Real, good: VQGANPipeline) -> list[dict[str, Any]]:
    """The lines of the first table. Draws the picture."""
    few = SomeImages(real.train, spread(len(real.train), args.images, real.train.labels))
    plain = replace(real.config, data=replace(real.config.data, augmentation=AugmentationConfig()))
    lines, pictures = [], []

    def add(prior: Prior, sets: dict[str, ImageSet | CodeStore], shown: str) -> None:
        for name, train in sets.items():
            known = prior.known(train)
            check = prior.check(known, real.validation)
            lines.append(line(prior, name, known, real.validation, check))
            pictures.extend(prior.pictures(check, known) if name == shown else [])

    num_views = load_config(Stage2Config, f"{args.preset}/stage2", args.stage2).num_views
    these, every, views = f"these {len(few)} images", "all training images", "the views of its store"
    for count in dict.fromkeys((1, num_views)):
        root = overfitted(args, few, real.validation, good, count)
        name = f"of {len(few)} images" + (f" in {count} views" if count > 1 else "")
        prior = sampled(name, plain, load_pipeline(str(root / "pipeline")), few, real)
        if count == 1:
            add(prior, {these: few, every: real.train}, these)
        else:
            add(prior, {these: few, views: CodeStore(root / "codes")}, views)
    usual = sampled("of the pipeline", real.config, good, real.train, real)
    of_usual: dict[str, ImageSet | CodeStore] = {these: few, every: real.train}
    if real.config.code_store is not None:
        of_usual[views] = open_store(real.config, good.layout)
    add(usual, of_usual, next(reversed(of_usual)))
    write_png(args.output_dir / "copies.png", labelled_grid(pictures, COLUMNS, min_tile=48))
    return lines


def run(args: argparse.Namespace) -> None:
    """Measures both tables, prints and saves them."""
    where = environment()
    config = load_config(EvaluationConfig, f"{args.preset}/evaluate", args.evaluate)
    args.stage2.setdefault("tokenizer", f"{config.pipeline}/vqgan")
    good = load_pipeline(str(config.pipeline))
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
    parser.add_argument("--view_steps", type=int, default=1200, help="the same of the prior that copies views")
    parser.add_argument("--copies", type=int, default=500, help="largest number of training images that are changed")
    parser.add_argument("--feature_networks", nargs="+", default=[], metavar="NAME", help="further networks")
    settings: dict[str, Any] = {"nargs": "+", "default": [], "metavar": "KEY=VALUE"}
    parser.add_argument("--stage2", **settings, help="further settings of the prior that copies")
    parser.add_argument("--evaluate", **settings, help="further settings of the evaluation, such as pipeline")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmarks/copying"))
    args = parser.parse_args(arguments)
    if args.images < 2 or args.copies < 2:
        parser.error(f"--images and --copies: received {args.images} and {args.copies}; each must be at least 2")
    args.stage2, args.evaluate = map(overrides, (args.stage2, args.evaluate))
    try:
        run(args)
    except (ConfigError, Stopped) as error:
        print(error, flush=True)
        sys.exit(error.exit_code if isinstance(error, Stopped) else 2)


if __name__ == "__main__":
    main()
