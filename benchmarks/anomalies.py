"""How well scores tell unusual images from usual ones: `python -m benchmarks.anomalies PIPELINE --data DATA`.

With `--against OTHER`, the images of DATA are usual and those of OTHER unusual. With `--usual_class NAME`, the images
of this class are usual and all other classes of DATA unusual. The AUROC is the probability that an unusual image has a
higher value than a usual one; 0.5 is chance.

| measure | value of an image |
| --- | --- |
| nats | -ln p of its codes, without a class |
| typicality | the distance of nats to their median over training images (Nalisnick et al. 2019) |
| nats - complexity | nats less those of the image as a lossless WebP (Serrà et al. 2020) |
| largest code | the nats of its least probable code |
| nats as the class | -ln p of its codes, as an image of the usual class |
| likelihood ratio | nats as the class less nats |
| posterior | 1 - the probability of the usual class, by Bayes' rule |
"""

import argparse
import io
import math
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import Tensor

from benchmarks.images import Split, add_arguments, load_pipeline, read_split
from benchmarks.machine import environment
from benchmarks.report import table, write
from configs.files import write_png
from pipelines import VQGANPipeline
from stage1_vqgan import labelled_grid

SHOWN = 10  # images in a row of the picture


def complexity(image: Image.Image) -> float:
    """Nats of an image as a lossless WebP."""
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=True)
    return file.tell() * 8 * math.log(2)


def measures(pipe: VQGANPipeline, images: list[Image.Image], codes: Tensor, usual: str | None, median: float) -> dict:
    """The values of each image, `(N,)` by measure.

    Args:
        usual: the class whose images are usual; None if those of all classes are.
        median: of the nats of training images.
    """
    out = pipe.score(codes=codes)
    nats = out.nats.numpy()
    values = {
        "nats": nats,
        "typicality": np.abs(nats - median),
        "nats - complexity": nats - [complexity(image) for image in images],
        "largest code": out.code_nats.flatten(1).amax(1).numpy(),
    }
    if usual in pipe.class_names:
        as_class = pipe.score(codes=codes, class_labels=usual).nats.numpy()
        posterior = pipe.class_posterior(codes=codes)[:, pipe.class_names.index(usual)].numpy()
        values |= {"nats as the class": as_class, "likelihood ratio": as_class - nats, "posterior": 1 - posterior}
    return values


def groups(pipe: VQGANPipeline, args: argparse.Namespace) -> tuple[Split, np.ndarray]:
    """All images, and bool `(N,)`, whether each one is unusual."""
    split = read_split(pipe, args.data, args)
    if args.usual_class is None:
        other = read_split(pipe, args.against, args)
        images, codes = (
            split.images + other.images,
            split.codes.new_tensor([*split.codes.tolist(), *other.codes.tolist()]),
        )
        return Split(images, codes, None), np.arange(len(images)) >= len(split.images)
    if split.labels is None or args.usual_class not in split.labels:
        raise SystemExit(f"--usual_class: received {args.usual_class!r}; no image of {args.data} has this class")
    return split, np.array(split.labels) != args.usual_class


def picture(pipe: VQGANPipeline, split: Split, unusual: np.ndarray, nats: np.ndarray, label: str | None) -> Image.Image:
    """The most and the least probable images of both groups, above their heat maps."""
    chosen: dict[str, np.ndarray] = {}
    for name, numbers in (("usual", np.flatnonzero(~unusual)), ("unusual", np.flatnonzero(unusual))):
        order = numbers[np.argsort(nats[numbers])]
        chosen |= {f"{name}, lowest": order[:SHOWN], f"{name}, highest": order[::-1][:SHOWN]}
    numbers = np.concatenate(list(chosen.values()))
    images = [split.images[number] for number in numbers]
    out = pipe.score(codes=split.codes[numbers], class_labels=label)
    maps, rows = pipe.heat_maps(images, out.code_nats), []
    for name, part in chosen.items():
        images, shown = images[len(part) :], [image.convert("RGB") for image in images[: len(part)]]
        maps, heat = maps[len(part) :], maps[: len(part)]
        rows += [(f"{name} nats", shown), ("heat map", heat)]
    return labelled_grid(rows, columns=SHOWN)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.anomalies", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--against", help="other images, which are unusual")
    parser.add_argument("--usual_class", help="name of the class of DATA whose images are usual")
    parser.add_argument("--output_dir", default="runs/benchmarks/anomalies")
    args = parser.parse_args()
    if (args.against is None) == (args.usual_class is None):
        parser.error("give either --against or --usual_class")
    pipe = load_pipeline(args)
    trained = read_split(pipe, args.data, args, train=True)
    known = [n for n in range(len(trained.codes)) if args.usual_class in (None, *(trained.labels or [])[n : n + 1])]
    median = pipe.score(codes=trained.codes[known]).nats.median().item()
    split, unusual = groups(pipe, args)
    values = measures(pipe, split.images, split.codes, args.usual_class, median)
    lines = [
        {
            "measure": name,
            "AUROC": round(float(roc_auc_score(unusual, value)), 4),
            "usual": round(float(np.median(value[~unusual])), 3),
            "unusual": round(float(np.median(value[unusual])), 3),
        }
        for name, value in values.items()
    ]
    print(f"{(~unusual).sum()} usual and {unusual.sum()} unusual images; the last two columns are medians")
    print(table(lines))
    folder = Path(args.output_dir)
    setting = {"pipeline": args.pipeline, "data": args.data, "against": args.against, "usual_class": args.usual_class}
    counts = {"usual": int((~unusual).sum()), "unusual": int(unusual.sum())}
    write(folder / "anomalies.json", {"environment": environment(), **setting, "images": counts, "rows": lines})
    label = args.usual_class if args.usual_class in pipe.class_names else None
    nats = values["nats" if label is None else "nats as the class"]
    write_png(folder / "anomalies.png", picture(pipe, split, unusual, nats, label))


if __name__ == "__main__":
    main()
