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
from typing import TYPE_CHECKING, Any, NamedTuple

from configs import ConfigError, Problem, run
from configs.files import write_png, write_text
from configs.problems import one_line, shown
from configs.sections import BatchSize, Positive
from pipelines.command_prompts import PromptSettings, asked_conditions, opened
from pipelines.commands import ImageOutput, load_pipeline
from pipelines.reconstruct import image_files

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from pipelines.pipeline_vqgan import VQGANPipeline
    from stage2_prior import Segment, TokenLayout

ENDINGS = (".csv", ".jsonl")
COLUMNS = ("file", "nats", "bits_per_pixel", "best_class", "probability", "error")
IMAGES_AT_ONCE = 64
MOST_MEASURED = 256  # images whose maps determine the range of the colours
GRID_COLUMNS = 8


@dataclass(kw_only=True)
class ScoreConfig(PromptSettings, ImageOutput):
    """Scores images: how improbable a pipeline finds each one. Prints a JSON line for each: its file, nats, bits per
    pixel, best class and its probability. With a prompt, one value of each condition, it scores them as such images.

    pipeline: folder or Hub id of the pipeline
    images: an image, a folder of images, or a list of such
    table: file for all lines, the most improbable image first; its name ends with .csv or .jsonl
    output_dir: folder for the heat maps, a PNG file for each image
    grid: PNG file that shows the most improbable images above their heat maps
    grid_images: number of images in the grid
    best_class: also name the class that fits best, given the other conditions of the prompt; this reads each image once
        more for each class. Of several conditions with classes, the name of one: --best_class style
    batch_size: images that the prior reads at once; null takes as many as fit in memory
    """

    positional = "pipeline"

    pipeline: str
    images: str | list[str]
    table: str | None = None
    grid_images: Positive = 32
    best_class: bool | str = True
    batch_size: BatchSize | None = None

    def problems(self) -> Iterable[tuple[str, Any, str]]:
        yield from super().problems()
        if self.table is not None and not self.table.lower().endswith(ENDINGS):
            yield "table", self.table, "must be the name of a file that ends with .csv or .jsonl"


class Asked(NamedTuple):
    """What is asked of each image.

    Attributes:
        prompt: arguments of `VQGANPipeline.score`.
        best: the condition whose best class is asked for.
        others: arguments of `VQGANPipeline.class_posterior`: the prompt without that condition.
    """

    prompt: dict[str, Any]
    best: "Segment | None"
    others: dict[str, Any]


def score(config: ScoreConfig) -> list[dict[str, Any]]:
    """Scores the images, prints the lines, and saves table and pictures.

    A file that cannot be decoded has an `error` in its line in place of a score.

    Returns:
        The lines, in the order of the files.

    Raises:
        ConfigError: the pipeline or an image cannot be found, no image can be decoded, a value of the prompt is wrong,
            the prior has no likelihood, or a file exists.
    """
    # These imports are slow, so they come after the check of the arguments.
    from tqdm.auto import tqdm

    found = image_files([config.images] if isinstance(config.images, str) else config.images)
    files = list(found.values())
    paths = config.images_of(list(found))
    config.require_new("table", [] if config.table is None else [Path(config.table)])
    pipeline = load_pipeline(config.pipeline, config.device)
    pipeline.set_progress_bar_config(disable=True)
    asked = asked_of(config, pipeline)
    lines: list[dict[str, Any]] = []
    nats: dict[int, Tensor] = {}  # of the codes of each image that can be decoded, by its number
    with tqdm(total=len(files), desc="scoring", unit="image") as bar:
        for start in range(0, len(files), IMAGES_AT_ONCE):
            some = files[start : start + IMAGES_AT_ONCE]
            for number, (line, of_codes) in enumerate(scored(some, pipeline, asked, config), start):
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


def asked_of(config: ScoreConfig, pipeline: "VQGANPipeline") -> Asked:
    """What is asked of each image.

    Raises:
        ConfigError: a value is wrong, there are several for a condition, or the prior needs another condition.
    """
    from pipelines.prompts import asked_prompts, given_conditions
    from pipelines.requests import prompts_of

    try:
        values = asked_conditions(config, pipeline)
        given = given_conditions(pipeline.layout, **values | {"condition_images": opened(values["condition_images"])})
        for one in given:
            if len(one.values) > 1:
                advice = "give one for all images; score() of the pipeline takes a list with one for each image"
                raise ValueError(f"{one.key}: received {len(one.values)} values; {advice}")
        prompts_of(1, given, pipeline.vqgan, pipeline.layout, "codes", pipeline._tokenizers)  # checks the values
        best = best_condition(config, pipeline.layout)
        require_conditions(pipeline.layout, [one.segment.name for one in given], best)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError([Problem.of_error(error)]) from error
    others = [one for one in given if best is None or one.segment.name != best.name]
    return Asked(asked_prompts(given, 1)[0], best, asked_prompts(others, 1)[0])


def best_condition(config: ScoreConfig, layout: "TokenLayout") -> "Segment | None":
    """The condition that `best_class` means; None if nobody asks for it, or the prior has no classes.

    Raises:
        ValueError: there is no such condition, or there are several to choose from.
    """
    from pipelines.prompts import class_condition, classes_of

    if config.best_class is False or (config.best_class is True and not classes_of(layout)):
        return None
    try:
        return class_condition(layout, None if config.best_class is True else config.best_class)
    except ValueError as error:
        reason = str(error).partition("; ")[2]
        raise ValueError(f"best_class: received {shown(config.best_class)}; {reason}, or false") from error


def require_conditions(layout: "TokenLayout", given: Sequence[str], best: "Segment | None") -> None:
    """Refuses a prior that needs more conditions than are given, for its scores or for the best class.

    Raises:
        ValueError: names what to give.
    """
    from pipelines.prompts import require_given
    from pipelines.scoring import needed_class

    if given or needed_class(layout) is None:
        require_given(layout, given)
    if best is not None:
        try:
            require_given(layout, [*given, best.name], ", or best_class false")
        except ValueError as error:
            raise ValueError(f"best_class: {Problem.of_error(error).message}") from error


def scored(
    files: Sequence[Path], pipeline: "VQGANPipeline", asked: Asked, config: ScoreConfig
) -> Iterator[tuple[dict[str, Any], "Tensor | None"]]:
    """The line of each file, and the nats of its codes; an error and None if it cannot be decoded.

    Raises:
        ConfigError: the prior has no likelihood.
    """
    read = [readable(file, pipeline) for file in files]
    images = [image for image in read if not isinstance(image, str)]
    try:
        results = iter(scores(images, pipeline, asked, config) if images else [])
    except ValueError as error:
        raise ConfigError([Problem.of_error(error)]) from error
    for image in read:
        yield ({"error": image}, None) if isinstance(image, str) else next(results)


def readable(file: Path, pipeline: "VQGANPipeline") -> "Image.Image | str":
    """An image that the pipeline can encode, or in one line why it cannot."""
    try:
        image = image_in(file)
        pipeline.image_processor(image)
    except ValueError as error:
        return one_line(error)
    return image


def image_in(file: Path) -> "Image.Image":
    """The image in a file.

    Raises:
        ValueError: the file cannot be decoded.
    """
    from stage1_vqgan import EncodedImage, decode

    return decode(EncodedImage(str(file), str(file)))


def scores(
    images: list["Image.Image"], pipeline: "VQGANPipeline", asked: Asked, config: ScoreConfig
) -> list[tuple[dict[str, Any], "Tensor"]]:
    """The line of each image, and the nats of its codes."""
    options: dict[str, Any] = {"codes": pipeline.encode(images), "batch_size": config.batch_size}
    out = pipeline.score(**asked.prompt, **options)
    lines = [
        {"nats": round(nats, 4), "bits_per_pixel": round(bits, 6)}
        for nats, bits in zip(out.nats.tolist(), out.bits_per_pixel.tolist(), strict=True)
    ]
    if asked.best is not None:
        probabilities, classes = pipeline.class_posterior(condition=asked.best.name, **asked.others, **options).max(1)
        for line, share, number in zip(lines, probabilities.tolist(), classes.tolist(), strict=True):
            line |= {"best_class": asked.best.class_names[number], "probability": round(share, 6)}
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
        image = image_in(files[number])
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
