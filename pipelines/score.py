"""Command that scores images with a pipeline, to find unusual ones.

Usage: `python -m pipelines.score PIPELINE --images DIR --table scores.csv --grid unusual.png`.
"""

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs import ConfigError, Problem, run
from configs.files import write_png, write_text
from configs.problems import one_line
from configs.sections import BatchSize, Positive
from pipelines.commands import ImageOutput, load_pipeline
from pipelines.generate import asked_classes
from pipelines.reconstruct import image_files

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from pipelines.pipeline_vqgan import VQGANPipeline
    from stage2_prior import TokenLayout

ENDINGS = (".csv", ".jsonl")
COLUMNS = ("file", "nats", "bits_per_pixel", "best_class", "probability", "error")
IMAGES_AT_ONCE = 64
ONLY_CLASSES = "; this command gives classes alone, score() of a pipeline also texts and images"
MOST_MEASURED = 256  # images whose maps determine the range of the colours
GRID_COLUMNS = 8


@dataclass(kw_only=True)
class ScoreConfig(ImageOutput):
    """Scores images: how improbable a pipeline finds each one. Prints a JSON line for each: its file, nats, bits per
    pixel, best class and its probability.

    pipeline: folder or Hub id of the pipeline
    images: an image, a folder of images, or a list of such
    table: file for all lines, the most improbable image first; its name ends with .csv or .jsonl
    output_dir: folder for the heat maps, a PNG file for each image
    grid: PNG file that shows the most improbable images above their heat maps
    grid_images: number of images in the grid
    class_label: name or id of a class: how improbable an image is as one of this class; of several conditions with
        classes, {name: class}; null scores without a class
    best_class: also name the class that fits best, given the other conditions in class_label; this reads each image
        once more for each class
    batch_size: images that the prior reads at once; null takes as many as fit in memory
    """

    positional = "pipeline"

    pipeline: str
    images: str | list[str]
    table: str | None = None
    grid_images: Positive = 32
    class_label: int | str | dict[str, int | str] | None = None
    best_class: bool = True
    batch_size: BatchSize | None = None

    def problems(self) -> Iterable[tuple[str, Any, str]]:
        yield from super().problems()
        if self.table is not None and not self.table.lower().endswith(ENDINGS):
            yield "table", self.table, "must be the name of a file that ends with .csv or .jsonl"


def score(config: ScoreConfig) -> list[dict[str, Any]]:
    """Scores the images, prints the lines, and saves table and pictures.

    A file that cannot be decoded has an `error` in its line in place of a score.

    Returns:
        The lines, in the order of the files.

    Raises:
        ConfigError: the pipeline or an image cannot be found, no image can be decoded, a class is unknown, the prior
            has no likelihood, or a file exists.
    """
    # These imports are slow, so they come after the check of the arguments.
    from tqdm.auto import tqdm

    found = image_files([config.images] if isinstance(config.images, str) else config.images)
    files = list(found.values())
    paths = config.images_of(list(found))
    config.require_new("table", [] if config.table is None else [Path(config.table)])
    pipeline = load_pipeline(config.pipeline, config.device)
    pipeline.set_progress_bar_config(disable=True)
    labels = labels_of(config, pipeline)
    lines: list[dict[str, Any]] = []
    nats: dict[int, Tensor] = {}  # of the codes of each image that can be decoded, by its number
    with tqdm(total=len(files), desc="scoring", unit="image") as bar:
        for start in range(0, len(files), IMAGES_AT_ONCE):
            some = files[start : start + IMAGES_AT_ONCE]
            for number, (line, of_codes) in enumerate(scored(some, pipeline, labels, config), start):
                lines.append({"file": str(files[number]), **line})
                tqdm.write(json.dumps(lines[-1]))
                if of_codes is not None:
                    nats[number] = of_codes
            bar.update(len(some))
    if not nats:
        raise ConfigError([Problem("images", f"none of {len(lines)} can be decoded; the first: {lines[0]['error']}")])
    ranking = sorted(nats, key=lambda number: -lines[number]["nats"])
    if config.table is not None:
        write_table(config.table, [lines[number] for number in ranking] + [line for line in lines if "error" in line])
    if paths or config.grid is not None:
        draw(config, pipeline, files, paths, {number: nats[number] for number in ranking})
    mean = sum(lines[number]["bits_per_pixel"] for number in nats) / len(nats)
    print(f"{len(nats)} of {len(lines)} images, mean {mean:.4f} bits per pixel", file=sys.stderr)
    return lines


def labels_of(config: ScoreConfig, pipeline: "VQGANPipeline") -> Any:
    """The argument `class_labels` of `score` that `class_label` asks for.

    Raises:
        ConfigError: it is none of the classes, or several; or the prior needs another condition.
    """
    from pipelines.prompts import condition_ids, given_conditions

    try:
        labels = asked_classes(config.class_label, pipeline)
        given = given_conditions(pipeline.layout, labels)
        for one in given:
            if not one.is_single:
                raise ValueError(f"class_label: received {len(one.values)} classes; give one")
            condition_ids(one, pipeline.layout, {})
    except ValueError as error:
        raise ConfigError([Problem("class_label", Problem.of_error(error).message)]) from error
    require_conditions(config, pipeline.layout, [one.segment.name for one in given])
    return labels


def require_conditions(config: ScoreConfig, layout: "TokenLayout", given: Sequence[str]) -> None:
    """Refuses a prior that needs more conditions than are given, for its scores or for the best class.

    Raises:
        ConfigError: names what to give, in the words of this command.
    """
    from pipelines.prompts import require_given
    from pipelines.scoring import needed_class
    from stage2_prior import CLASS

    key, only = "class_label", any(segment.kind != "class" for segment in layout.segments)
    try:
        if given or needed_class(layout) is None:
            require_given(layout, given, ONLY_CLASSES if only else "")
        if config.best_class and layout.num_classes:
            key = "best_class"
            require_given(layout, [*given, CLASS], ", or best_class false")
    except ValueError as error:
        message = Problem.of_error(error).message.replace("class_labels", "class_label")
        raise ConfigError([Problem(key, message)]) from error


def scored(
    files: Sequence[Path], pipeline: "VQGANPipeline", labels: Any, config: ScoreConfig
) -> Iterator[tuple[dict[str, Any], "Tensor | None"]]:
    """The line of each file, and the nats of its codes; an error and None if it cannot be decoded.

    Raises:
        ConfigError: the prior has no likelihood.
    """
    read = [readable(file, pipeline) for file in files]
    images = [image for image in read if not isinstance(image, str)]
    try:
        results = iter(scores(images, pipeline, labels, config) if images else [])
    except ValueError as error:
        raise ConfigError([Problem.of_error(error)]) from error
    for image in read:
        yield ({"error": image}, None) if isinstance(image, str) else next(results)


def readable(file: Path, pipeline: "VQGANPipeline") -> "Image.Image | str":
    """An image that the pipeline can encode, or in one line why it cannot."""
    try:
        image = opened(file)
        pipeline.image_processor(image)
    except ValueError as error:
        return one_line(error)
    return image


def opened(file: Path) -> "Image.Image":
    """The image in a file.

    Raises:
        ValueError: the file cannot be decoded.
    """
    from stage1_vqgan import EncodedImage, decode

    return decode(EncodedImage(str(file), str(file)))


def scores(
    images: list["Image.Image"], pipeline: "VQGANPipeline", labels: Any, config: ScoreConfig
) -> list[tuple[dict[str, Any], "Tensor"]]:
    """The line of each image, and the nats of its codes."""
    from stage2_prior import CLASS

    codes = pipeline.encode(images)
    options: dict[str, Any] = {"codes": codes, "batch_size": config.batch_size}
    out = pipeline.score(class_labels=labels, **options)
    others = {name: label for name, label in labels.items() if name != CLASS} if isinstance(labels, dict) else {}
    lines = [
        {"nats": round(nats, 4), "bits_per_pixel": round(bits, 6)}
        for nats, bits in zip(out.nats.tolist(), out.bits_per_pixel.tolist(), strict=True)
    ]
    if config.best_class and pipeline.class_names:
        probabilities, classes = pipeline.class_posterior(class_labels=others or None, **options).max(1)
        for line, share, number in zip(lines, probabilities.tolist(), classes.tolist(), strict=True):
            line |= {"best_class": pipeline.class_names[number], "probability": round(share, 6)}
    return list(zip(lines, out.code_nats.float(), strict=True))


def write_table(path: str, lines: Sequence[dict[str, Any]]) -> None:
    """Writes lines as CSV or JSON Lines, as the ending of the path says."""
    if path.lower().endswith(".jsonl"):
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        return
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [name for name in COLUMNS if any(name in line for line in lines)])
    writer.writeheader()
    writer.writerows(lines)
    write_text(path, text.getvalue())


def draw(
    config: ScoreConfig,
    pipeline: "VQGANPipeline",
    files: Sequence[Path],
    paths: Sequence[Path],
    nats: dict[int, "Tensor"],
) -> None:
    """Saves the heat maps and the grid. The same colour means the same bits per pixel in all of them.

    Args:
        files: all files.
        paths: where the heat map of each file goes; empty if nobody asked for them.
        nats: of the codes of each image by its number, the most improbable image first.
    """
    import torch
    from tqdm.auto import tqdm

    from pipelines.heat_maps import span_of, surprise_maps
    from stage1_vqgan import labelled_grid, spread

    numbers = list(nats)
    some = torch.stack([nats[numbers[place]] for place in spread(len(numbers), MOST_MEASURED)])
    span = span_of(surprise_maps(some, pipeline.layout))
    shown = numbers[: config.grid_images] if config.grid is not None else []
    originals, maps = [], []
    for number in tqdm(numbers if paths else shown, desc="drawing", unit="image"):
        image = opened(files[number])
        (heat_map,) = pipeline.heat_maps(image, nats[number][None], span)
        if paths:
            write_png(paths[number], heat_map)
        if number in shown:
            originals += pipeline.image_processor.postprocess(pipeline.image_processor(image)["pixel_values"])
            maps.append(heat_map)
    if config.grid is not None:
        rows = []
        for start in range(0, len(shown), GRID_COLUMNS):
            stop = min(start + GRID_COLUMNS, len(shown))
            rows.append((f"{start + 1} to {stop}", [image.convert("RGB") for image in originals[start:stop]]))
            rows.append(("heat map", maps[start:stop]))
        write_png(config.grid, labelled_grid(rows, columns=GRID_COLUMNS))


if __name__ == "__main__":
    run(ScoreConfig, score, "python -m pipelines.score")
