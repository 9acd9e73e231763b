"""What conditions do, measured on emoji: text and style to image, and one style to another.

    python -m benchmarks.emoji pairs --data emoji --output_dir emoji_pairs_of_styles
    python -m benchmarks.emoji text PIPELINE --data emoji --pairs emoji_pairs
    python -m benchmarks.emoji guidance PIPELINE --data emoji --pairs emoji_pairs
    python -m benchmarks.emoji groups PIPELINE --data emoji
    python -m benchmarks.emoji transfer PIPELINE --data emoji --pairs emoji_pairs

The folders hold parquet files with the columns `image`, `style`, `group`, `text` and `code`; the same code is the same
emoji in another style, and the group is what kind of thing it shows. `emoji` has train.parquet and test.parquet; the
emoji of test are in no style in train. `emoji_pairs` has test.parquet; the train images show its emoji in the three
other styles.

`pairs` writes a data set whose rows have the column `source` too, the same emoji in another style. `text` generates
every emoji from its text and its style (and its group, if the prior has this condition); `guidance` does so with
several scales of guidance by each. `groups` generates emoji from style and group alone, `--count` of each pair.
`transfer` generates an emoji from its image in another style, a condition image.

`text` measures each combination of the sampling settings. To choose settings by emoji that are not those of the
figures, choose with `--half first`, and measure the choice with `--half second`.
Features are those of EfficientNet-Lite0, which no training has used.
"""

import argparse
import itertools
import time
import zlib
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, Image as ImageFeature, load_dataset
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.machine import environment
from benchmarks.report import table, write
from pipelines import VQGANPipeline
from pipelines.evaluation.metrics import frechet_distances
from stage1_vqgan import labelled_grid
from stage1_vqgan.networks import load_network

NETWORK = "efficientnet-lite0@96"
SETTINGS = ("guidance_scale", "temperature", "num_steps", "order", "order_temperature")
HALVES = ("first", "second")
SHOWN = 12  # images in a row of the picture
MAX_KINDS = 8  # kinds of images in a picture


class Emoji(NamedTuple):
    """Emoji, and what is known of each.

    Attributes:
        images: RGB images.
        styles, groups: int64 `(N,)`.
        texts: descriptions.
        codes: Unicode code points, the same for an emoji in all styles.
    """

    images: list[Image.Image]
    styles: np.ndarray
    groups: np.ndarray
    texts: list[str]
    codes: list[str]


def read(path: Path, half: str | None = None) -> tuple[Emoji, dict[str, list[str]]]:
    """The emoji of a parquet file, and the names of the styles and of the groups, by their column.

    Args:
        path: the file.
        half: None for all emoji. An emoji is in the same half in all styles.
    """
    rows: Any = load_dataset("parquet", data_files=str(path), split="train")
    if half is not None:
        halves = [HALVES[zlib.crc32(code.encode()) % 2] for code in rows["code"]]
        rows = rows.select(np.flatnonzero(np.array(halves) == half))
    images = [image.convert("RGB") for image in rows["image"]]
    styles, groups = np.array(rows["style"]), np.array(rows["group"])
    names = {column: rows.features[column].names for column in ("style", "group")}
    return Emoji(images, styles, groups, list(rows["text"]), list(rows["code"])), names


class Features:
    """Features of images, float32 `(N, D)` of length 1."""

    def __init__(self) -> None:
        self.network = load_network(NETWORK).eval()

    @torch.no_grad()
    def __call__(self, images: list[Image.Image]) -> Tensor:
        pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in images])
        parts = [self.network(part).pooled for part in tqdm(pixels.split(64), desc="features", leave=False)]
        return torch.nn.functional.normalize(torch.cat(parts))


def retrieval(generated: Tensor, real: Tensor, emoji: Emoji) -> dict[str, float]:
    """How often the nearest real image, among those of the style that was asked for, is the emoji asked for.

    Args:
        generated, real: features `(N, D)` of the generated and the real images of the same emoji.
        emoji: the N emoji.

    Returns:
        The shares of the nearest and of the five nearest, and what chance would give.
    """
    codes, first, five, chance = np.array(emoji.codes), [], [], []
    for style in np.unique(emoji.styles):
        rows = np.flatnonzero(emoji.styles == style)
        order = (generated[rows] @ real[rows].T).argsort(1, descending=True).numpy()
        hits = codes[rows][order[:, :5]] == codes[rows][:, None]
        first += hits[:, 0].tolist()
        five += hits.any(1).tolist()
        chance += [1 / len(rows)] * len(rows)
    return {"top_1": float(np.mean(first)), "top_5": float(np.mean(five)), "chance": float(np.mean(chance))}


class Judge:
    """What generated emoji are compared with."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.features = Features()
        self.train, self.names = read(args.data / "train.parquet")
        self.of_train = self.features(self.train.images)
        self.classifier = LogisticRegression(max_iter=2000).fit(self.of_train, self.train.styles)

    def measures(self, images: list[Image.Image], emoji: Emoji, real: Tensor) -> dict[str, float]:
        """Retrieval, and what the features say of styles and of the images as a set.

        `style` is the share of the images whose style is recognised as the one asked for; `style score` the accuracy on
        the real images of a classifier of styles that learns from these images; `distance` a Frechet distance.
        """
        found = self.features(images)
        sets = [part.double().numpy() for part in (self.of_train, real, found)]
        taught = LogisticRegression(max_iter=2000).fit(found, emoji.styles)
        return retrieval(found, real, emoji) | {
            "style": float(np.mean(self.classifier.predict(found) == emoji.styles)),
            "style score": float(np.mean(taught.predict(real) == emoji.styles)),
            "distance": frechet_distances(sets[0], sets[1], sets[2:], num_components=24)[0],
        }


def combinations(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All combinations of the sampling settings of the command line, of those that are stated."""
    stated = [key for key in SETTINGS if getattr(args, key)]
    return [
        dict(zip(stated, values, strict=True)) for values in itertools.product(*(getattr(args, key) for key in stated))
    ]


def classes(
    args: argparse.Namespace, pipeline: VQGANPipeline, emoji: Emoji, names: dict[str, list[str]]
) -> dict[str, list[str]]:
    """The style of each emoji, and its group if the prior has this condition: `class_labels` of a request."""
    asked = {args.style: [names["style"][style] for style in emoji.styles]}
    if "group" in {condition.name for condition in pipeline.layout.conditions}:
        asked["group"] = [names["group"][group] for group in emoji.groups]
    return asked


def generated(pipeline: VQGANPipeline, asked: dict[str, Any], settings: dict[str, Any]) -> list[Image.Image]:
    """The images of a request, with these sampling settings where it states no others."""
    return [image.convert("RGB") for image in pipeline.generate(**settings | asked, seed=0).images]


def reconstructed(pipeline: VQGANPipeline, emoji: Emoji) -> list[Image.Image]:
    """What the tokenizer makes of real images."""
    return [image.convert("RGB") for image in pipeline.reconstruct(emoji.images)]


def text(args: argparse.Namespace, pipeline: VQGANPipeline) -> dict[str, Any]:
    """Generates all emoji of both test sets from text and style with all settings, and without the text."""
    judge = Judge(args)
    results: dict[str, Any] = {}
    settings = combinations(args)
    for split, path in (("test", args.data), ("pairs", args.pairs)):
        emoji, _ = read(path / "test.parquet", args.half)
        real = judge.features(emoji.images)
        styles = {"class_labels": classes(args, pipeline, emoji, judge.names)}
        kinds = {
            ", ".join(["with text", *(f"{key} {one[key]}" for key in one if len(getattr(args, key)) > 1)]): partial(
                generated, pipeline, styles | {"text": emoji.texts}, one
            )
            for one in settings
        }
        pictured = ["real", *kinds][:MAX_KINDS]
        kinds["without text"] = partial(generated, pipeline, styles, settings[0])
        kinds["real, reconstructed"] = partial(reconstructed, pipeline, emoji)
        shown = [("real", emoji.images)]
        for kind, make in kinds.items():
            start = time.process_time()
            images = make()
            rate = len(images) / (time.process_time() - start)
            results[f"{split}, {kind}"] = judge.measures(images, emoji, real) | {"images per CPU second": rate}
            print(f"{split}, {kind}", results[f"{split}, {kind}"], flush=True)
            shown.append((kind, images))
        picture(args.output_dir / f"text_{split}.png", [row for row in shown if row[0] in pictured], emoji)
    return results


def guidance(args: argparse.Namespace, pipeline: VQGANPipeline) -> dict[str, Any]:
    """Generates the emoji of both test sets together, with guidance on the style alone and on the text alone."""
    judge = Judge(args)
    test, pairs_ = (read(folder / "test.parquet", args.half)[0] for folder in (args.data, args.pairs))
    emoji = Emoji(
        test.images + pairs_.images,
        np.r_[test.styles, pairs_.styles],
        np.r_[test.groups, pairs_.groups],
        test.texts + pairs_.texts,
        test.codes + pairs_.codes,
    )
    real = judge.features(emoji.images)
    asked = {"class_labels": classes(args, pipeline, emoji, judge.names), "text": emoji.texts}
    scales = [{}, *({args.style: s} for s in (0.0, 2.0, 4.0)), *({"text": s} for s in (0.0, 2.0, 4.0))]
    (settings,) = combinations(args)
    results = {}
    for scale in scales:
        name = ", ".join(f"{key} {value}" for key, value in scale.items()) or "none"
        images = generated(pipeline, asked | {"guidance_scale": scale or 1.0}, settings)
        results[name] = judge.measures(images, emoji, real)
    return results


def transfer(args: argparse.Namespace, pipeline: VQGANPipeline) -> dict[str, Any]:
    """Generates each emoji of `pairs` from its train image in another style. Copying that image is the base line."""
    judge = Judge(args)
    train, names = judge.train, judge.names
    emoji, _ = read(args.pairs / "test.parquet", args.half)
    (settings,) = combinations(args)
    sources = [train.images[train.codes.index(code)] for code in emoji.codes]
    labels = classes(args, pipeline, emoji, names)
    kinds: dict[str, list[Image.Image]] = {
        "generated": generated(pipeline, {"class_labels": labels, "condition_images": sources}, settings),
        "the input copied": sources,
        "the real image, reconstructed": pipeline.reconstruct(emoji.images),
    }
    real = judge.features(emoji.images)
    lines = [("input", sources), ("generated", kinds["generated"]), ("real", emoji.images)]
    picture(args.output_dir / "transfer.png", lines, emoji)
    return {
        kind: {
            "l1": float(np.mean([l1(one, other) for one, other in zip(images, emoji.images, strict=True)])),
            "feature distance": float(1 - (judge.features(images) * real).sum(1).mean()),
        }
        | judge.measures(images, emoji, real)
        for kind, images in kinds.items()
    }


def groups(args: argparse.Namespace, pipeline: VQGANPipeline) -> dict[str, Any]:
    """Generates emoji of each style and group, without a text. Draws a line of each group, with all styles."""
    judge = Judge(args)
    style_names, group_names = judge.names["style"], judge.names["group"]
    every = list(itertools.product(range(len(group_names)), range(len(style_names)), range(args.count)))
    wanted_groups, wanted_styles, _ = np.array(every).T
    labels = {
        args.style: [style_names[style] for style in wanted_styles],
        "group": [group_names[group] for group in wanted_groups],
    }
    of_groups = LogisticRegression(max_iter=2000).fit(judge.of_train, judge.train.groups)
    test, _ = read(args.data / "test.parquet")
    results = {}

    def measure(name: str, images: list[Image.Image], styles: np.ndarray, of_images: np.ndarray) -> None:
        found = judge.features(images)
        results[name] = {
            "images": len(images),
            "style": float(np.mean(judge.classifier.predict(found) == styles)),
            "group": float(np.mean(of_groups.predict(found) == of_images)),
        }

    measure("real", test.images, test.styles, test.groups)
    measure("real, reconstructed", reconstructed(pipeline, test), test.styles, test.groups)
    for one in combinations(args):
        images = generated(pipeline, {"class_labels": labels}, one)
        name = ", ".join(f"{key} {value}" for key, value in one.items())
        measure(name, images, wanted_styles, wanted_groups)
        lines = [
            (name, [images[number] for number, row in enumerate(every) if row[0] == group and row[2] < SHOWN // 4])
            for group, name in enumerate(group_names)
        ]
        args.output_dir.mkdir(parents=True, exist_ok=True)
        labelled_grid(lines, SHOWN).save(args.output_dir / f"groups_{len(results) - 2}.png")
    return results


def l1(one: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference of pixels in [0, 1]."""
    return float(np.abs(np.asarray(one, dtype=float) - np.asarray(other, dtype=float)).mean() / 255)


def picture(path: Path, rows: list[tuple[str, list[Image.Image]]], emoji: Emoji) -> None:
    """Saves a few emoji of each style, a line for each kind of images."""
    lines = []
    for style in np.unique(emoji.styles):
        shown = np.flatnonzero(emoji.styles == style)[:SHOWN]
        lines += [(name, [images[number] for number in shown]) for name, images in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    labelled_grid(lines, SHOWN).save(path)


def pairs(args: argparse.Namespace) -> None:
    """Writes the train and test images with the same emoji in each other style as the column `source`."""
    for split in ("train", "test"):
        emoji, names = read(args.data / f"{split}.parquet")
        by_code = defaultdict(list)
        for number, code in enumerate(emoji.codes):
            by_code[code].append(number)
        rows = [(one, other) for group in by_code.values() for one in group for other in group if one != other]
        raw: Any = load_dataset("parquet", data_files=str(args.data / f"{split}.parquet"), split="train")
        encoded = raw.cast_column("image", ImageFeature(decode=False))["image"]
        columns = {
            "image": [encoded[one] for one, _ in rows],
            "source": [encoded[other] for _, other in rows],
            "style": [names[emoji.styles[one]] for one, _ in rows],
        }
        found = Dataset.from_dict(columns).cast_column("image", ImageFeature()).cast_column("source", ImageFeature())
        args.output_dir.mkdir(parents=True, exist_ok=True)
        found.to_parquet(str(args.output_dir / f"{split}.parquet"))
        print(f"{len(rows):,} pairs in {args.output_dir / split}.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.emoji", description=__doc__)
    parser.add_argument("task", choices=["pairs", "text", "guidance", "groups", "transfer"])
    parser.add_argument("pipeline", nargs="?", help="folder of a pipeline")
    parser.add_argument("--data", type=Path, required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--pairs", type=Path, help="folder with the test.parquet of emoji known in other styles")
    parser.add_argument("--style", default="style", help="name of the condition with the styles")
    parser.add_argument("--count", type=int, default=16, help="emoji of each style and group that groups generates")
    parser.add_argument("--half", choices=HALVES, help="generate these emoji alone")
    parser.add_argument("--guidance_scale", type=float, nargs="+", default=[2.0])
    parser.add_argument("--temperature", type=float, nargs="+", default=[1.0])
    parser.add_argument("--num_steps", type=int, nargs="+", help="of a masked prior")
    parser.add_argument("--order", choices=["confidence", "halton"], nargs="+", help="of a masked prior")
    parser.add_argument("--order_temperature", type=float, nargs="+", help="of a masked prior")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmarks/emoji"))
    args = parser.parse_args()
    if args.task == "pairs":
        pairs(args)
        return
    if args.pipeline is None or (args.pairs is None and args.task != "groups"):
        parser.error(f"{args.task} needs a pipeline and --pairs")
    if args.task not in ("text", "groups") and len(combinations(args)) > 1:
        parser.error(f"{args.task} takes one value of each sampling setting")
    where = environment()
    results = {"text": text, "guidance": guidance, "groups": groups, "transfer": transfer}[args.task](
        args, VQGANPipeline.from_pretrained(args.pipeline)
    )
    print(table([{"": name} | {key: round(value, 3) for key, value in row.items()} for name, row in results.items()]))
    write(
        args.output_dir / f"{args.task}.json", {"environment": where, "settings": str(vars(args)), "results": results}
    )


if __name__ == "__main__":
    main()
