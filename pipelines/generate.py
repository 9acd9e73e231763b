"""Command that generates images with a pipeline.

Usage: `python -m pipelines.generate PIPELINE --class_labels cats,dogs --output_dir DIR`.
"""

import json
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le

from configs import ConfigError, Problem, run
from configs.files import write_png
from configs.sections import BatchSize, Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat
from pipelines.commands import ImageOutput, UnmaskingSettings, images_in, load_pipeline

if TYPE_CHECKING:
    from pipelines.outputs import VQGANPipelineOutput
    from pipelines.pipeline_vqgan import VQGANPipeline
    from pipelines.prompts import Given

# Keys that `VQGANPipeline.generate` takes under the same names, and that the pipeline may have defaults of.
SAMPLING_KEYS = (
    "guidance_scale",
    "guidance_schedule",
    "guidance_power",
    "guidance_interval",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
)
ALL = "all"
MOST_IMAGES = 10_000


@dataclass(kw_only=True)
class GenerateConfig(UnmaskingSettings, ImageOutput):
    """Generates images with a pipeline, and prints a JSON line for each: its file, label, seed and settings.

    pipeline: folder or Hub id of the pipeline
    class_labels: names or ids of classes: one, several with commas (cats,dogs), a list, or "all"; null makes images of
        no given class. Of several class conditions, {name: classes}: --class_labels.style flat
    text: a text, or a list of them, for a prior with texts; of several texts, {name: text}
    condition_images: a file, a folder or a list of them, for a prior with condition images; of several, {name: files}
    num_images: number of images without class_labels and lists; by default 1
    num_images_per_label: number of images of each class or other prompt
    seed: seed of the first image, the next ones have seed + 1, seed + 2, …; null chooses one by chance
    guidance_scale: strength of the guidance towards the class; 1 is no guidance, 1.5 to 3 is usual. For null, this and
        the next seven keys have the default of the pipeline, or else that of VQGANPipeline.generate. Of several
        conditions, {name: scale} guides by these alone: --guidance_scale.text 3. A list has one for each class or other
        prompt: --guidance_scale '[1.5, 3]'
    guidance_schedule, guidance_power, guidance_interval: growth of the guidance, and the part of the codes that it acts
        on, as in VQGANPipeline.generate
    temperature: below 1 gives more typical images, above 1 more varied ones; 0 always takes the most likely code
    top_k, top_p, min_p: sample from the k most likely codes (0 is all), from the most likely ones that add up to this
        probability, from codes at least this many times as likely as the most likely one
    image_size: [height, width] of larger images than those of the training, or the side of a square
    best_of: sample so many candidates of each image, and keep the best one. The printed seed is that of the chosen one,
        which makes it again without best_of
    best_by: what is best: "likelihood" is the most probable image, "class" the one that shows its class most clearly
    batch_size: images sampled at once; null takes as many as fit in memory
    """

    positional = "pipeline"
    refused: ClassVar[dict[str, str]] = {
        "classes": "the key is class_labels",
        "count": "the key is num_images_per_label, or num_images without class_labels",
    }

    pipeline: str
    class_labels: int | str | list[int | str] | dict[str, int | str | list[int | str]] | None = None
    text: str | list[str] | dict[str, str | list[str]] | None = None
    condition_images: str | list[str] | dict[str, str | list[str]] | None = None
    num_images: Positive | None = None
    num_images_per_label: Positive = 1
    seed: Annotated[int, Ge(0), Le(2**63 - 1)] | None = None
    guidance_scale: (
        NonNegativeFloat | list[NonNegativeFloat] | dict[str, NonNegativeFloat | list[NonNegativeFloat]] | None
    ) = None
    guidance_schedule: Literal["constant", "linear", "cosine"] | None = None
    guidance_power: PositiveFloat | None = None
    guidance_interval: tuple[Fraction, Fraction] | None = None
    temperature: NonNegativeFloat | None = None
    top_k: NonNegative | None = None
    top_p: Annotated[float, Gt(0), Le(1)] | None = None
    min_p: Fraction | None = None
    image_size: Positive | list[Positive] | None = None
    best_of: Positive = 1
    best_by: Literal["likelihood", "class"] | None = None
    batch_size: BatchSize | None = None

    def problems(self) -> Iterable[tuple[str, Any, str]]:
        yield from super().problems()
        if self.output_dir is None and self.grid is None:
            yield "output_dir", None, "give a folder for the images, or --grid samples.png for one picture of all"


def generate(config: GenerateConfig) -> "VQGANPipelineOutput":
    """Generates and saves the images, and prints their lines.

    Raises:
        ConfigError: the pipeline cannot be loaded, a class is unknown, an argument is out of range, or a file exists.
    """
    # These imports are slow, so they come after the check of the arguments.
    from pipelines.defaults import resolved
    from pipelines.prompts import asked_prompts, given_conditions, number_of_prompts
    from pipelines.requests import images_of_each
    from stage1_vqgan import labelled_grid

    pipeline = load_pipeline(config.pipeline, config.device)
    scale = config.guidance_scale
    seed = secrets.randbelow(2**32) if config.seed is None else config.seed
    try:
        asked = asked_conditions(config, pipeline)
        given = given_conditions(pipeline.layout, **asked)
        settings = {key: getattr(config, key) for key in SAMPLING_KEYS} | config.unmasking
        settings = resolved(pipeline.sampling_defaults, settings, [one.segment.name for one in given])
        settings["image_size"] = config.image_size
        names = prompt_names(pipeline, given, number_of_prompts(given, scale))
        each = images_of_each(given, config.num_images, config.num_images_per_label, scale)
        require_few(names, each, "num_images_per_label" if given and config.num_images is None else "num_images")
        paths = config.images_of(file_names(names, each, seed))
        asked["condition_images"] = opened(asked["condition_images"])
        counts: dict[str, Any] = {"num_images": config.num_images, "num_images_per_label": config.num_images_per_label}
        others: dict[str, Any] = {key: getattr(config, key) for key in ("best_of", "best_by", "batch_size")}
        out = pipeline.generate(**asked, **counts, seed=seed, **others, **settings)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError([Problem.of_error(error)]) from error
    for path, image in zip(paths, out.images if paths else [], strict=True):
        write_png(path, image)
    if config.grid is not None:
        rows = [(name, out.images[n * each : (n + 1) * each]) for n, name in enumerate(names)]
        write_png(config.grid, labelled_grid(rows, columns=10))
    prompts = asked_prompts(given, len(out), scale) if out.prompts else [{}] * len(out)
    for number, (prompt, chosen) in enumerate(zip(prompts, out.seeds or [], strict=True)):
        file = str(paths[number]) if paths else config.grid
        label = out.labels[number] if out.labels else None
        line = {"file": file, "label": label, **prompt, "seed": chosen, **settings} | prompt
        print(json.dumps(line | ({"score": out.scores[number]} if out.scores else {})))
    return out


def asked_conditions(config: GenerateConfig, pipeline: "VQGANPipeline") -> dict[str, Any]:
    """The arguments `class_labels`, `text` and `condition_images` of `generate`; of images, their paths.

    Raises:
        ConfigError: there are no such images.
    """
    labels, images = asked_classes(config.class_labels, pipeline), config.condition_images
    if isinstance(images, dict):
        images = {name: asked_images(value) for name, value in images.items()}
    elif images is not None:
        images = asked_images(images)
    return {"class_labels": labels, "text": config.text, "condition_images": images}


def asked_classes(labels: Any, pipeline: "VQGANPipeline") -> Any:
    """The argument `class_labels` of `generate`, for one condition or for several by name; see `asked_labels`."""
    classes = {one.name: one.class_names for one in pipeline.layout.conditions if one.kind == "class"}
    only = next(iter(classes.values())) if len(classes) == 1 else ()
    if isinstance(labels, dict):
        return {name: single(asked_labels(value, classes.get(name, ())), value) for name, value in labels.items()}
    return single(asked_labels(labels, only), labels)


def single(labels: list[int | str] | None, value: Any) -> Any:
    """One label without its list, which then serves all images, unless `value` is a list."""
    return labels[0] if labels is not None and len(labels) == 1 and not isinstance(value, list) else labels


def asked_images(value: str | list[str]) -> str | list[str]:
    """The files of condition images: one, or a list of those that a list or a folder holds."""
    texts = value if isinstance(value, list) else [value]
    files = [str(file) for text in texts for _, file in images_in(text, "condition_images")]
    return files[0] if files == [value] else files


def opened(value: Any) -> Any:
    """The images of files, in the same lists and dictionaries.

    Raises:
        ValueError: a file cannot be decoded.
    """
    from stage1_vqgan import EncodedImage, decode

    if isinstance(value, dict):
        return {name: opened(one) for name, one in value.items()}
    if isinstance(value, list):
        return [opened(one) for one in value]
    try:
        return None if value is None else decode(EncodedImage(value, value))
    except ValueError as error:
        raise ValueError(f"condition_images: received {value!r}; {error}") from error


def prompt_names(pipeline: "VQGANPipeline", given: Sequence["Given"], count: int) -> list[str]:
    """The classes and texts of each of `count` prompts in words; empty for prompts without both.

    Raises:
        ValueError: a class is unknown.
    """
    from pipelines.prompts import condition_ids

    words = []
    for one in given:
        if one.segment.kind == "class":
            ids = condition_ids(one, pipeline.layout, {})[:, 0].tolist()
            words.append([one.segment.class_names[number] for number in ids])
        elif one.segment.kind == "text":
            words.append(list(one.values))
    rows = zip(*(found * count if len(found) == 1 else found for found in words), strict=True)
    return [" · ".join(row) for row in rows] if words else [""] * count


def require_few(names: Sequence[str], each: int, key: str) -> None:
    """Refuses more images than MOST_IMAGES.

    Raises:
        ValueError: there are more; `key` is the one to lower.
    """
    count = len(names) * each
    if count > MOST_IMAGES:
        raise ValueError(f"{key}: received {each}, so {count:,} images; one command makes at most {MOST_IMAGES:,}")


def asked_labels(value: Any, names: Sequence[str]) -> list[int | str] | None:
    """The classes that `class_labels` asks for, as names and ids.

    A text that is the name of a class is this class, even if it holds commas. Outside of a list, a number is the name
    of a class if there is one of this name, else an id.
    """
    if value is None or isinstance(value, list):
        return value
    text = str(value)
    if text in names:
        return [text]
    if text == ALL and names:
        return list(names)
    parts = [part.strip() for part in text.split(",")]
    return [int(part) if re.fullmatch("0|[1-9][0-9]*", part) and part not in names else part for part in parts]


def file_names(names: Sequence[str], each: int, seed: int) -> list[str]:
    """A name for each image: its class, as far as file names allow, and its seed."""
    words = [re.sub(r"[^\w-]+", "_", name)[:60].strip("_") or "image" for name in names for _ in range(each)]
    return [f"{word}_{number:04d}" for number, word in enumerate(words, seed)]


if __name__ == "__main__":
    run(GenerateConfig, generate, "python -m pipelines.generate")
