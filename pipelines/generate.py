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
from configs.arguments import whole
from configs.files import write_png
from configs.sections import BatchSize, Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat
from pipelines.command_prompts import PromptSettings, asked_conditions, opened
from pipelines.commands import ImageOutput, UnmaskingSettings, load_pipeline

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
MOST_IMAGES = 10_000


@dataclass(kw_only=True)
class GenerateConfig(PromptSettings, UnmaskingSettings, ImageOutput):
    """Generates images with a pipeline, and prints a JSON line for each: its file, label, seed and settings.

    pipeline: folder or Hub id of the pipeline
    num_images: number of images without class_labels and lists; by default 1
    num_images_per_label: number of images of each class or other prompt
    seed: seed of the first image, the next ones have seed + 1, seed + 2, …; null chooses one by chance
    guidance_scale: strength of the guidance towards the class; 1 is no guidance, 1.5 to 3 is usual. For null, this and
        the next seven keys have the default of the pipeline, or else that of VQGANPipeline.generate. Of several
        conditions, {name: scale} guides by these alone: --guidance_scale.text 3. A list has one for each class or other
        prompt: --guidance_scale '[1.5, 3]'. A default for a condition that is left out has no effect
    guidance_schedule, guidance_power, guidance_interval: growth of the guidance, and the part of the codes that it acts
        on, as in VQGANPipeline.generate
    temperature: below 1 gives more typical images, above 1 more varied ones; 0 always takes the most likely code
    top_k, top_p, min_p: sample from the k most likely codes (0 is all), from the most likely ones that add up to this
        probability, from codes at least this many times as likely as the most likely one
    image_size: [height, width] of larger images than those of the training, or the side of a square
    best_of: sample so many candidates of each image, and keep the best one. The seed in its line and in the name of its
        file is that of the chosen one, which makes it again without best_of
    best_by: what is best: "likelihood" is the most probable image, "class" the one that shows its class most clearly.
        Of several conditions with classes, the name of one: --best_by style
    batch_size: images sampled at once; null takes as many as fit in memory
    """

    positional = "pipeline"
    refused: ClassVar[dict[str, str]] = {
        "classes": "the key is class_labels",
        "count": "the key is num_images_per_label, or num_images without class_labels",
    }

    pipeline: str
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
    best_by: str | None = None
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
    from pipelines.best_of import MOST_CANDIDATES, candidate_seeds
    from pipelines.defaults import resolved
    from pipelines.prompts import asked_prompts, given_conditions, number_of_prompts
    from pipelines.requests import image_seeds, images_of_each
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
        best_of = whole("best_of", config.best_of, most=MOST_CANDIDATES)
        candidates = candidate_seeds(image_seeds(len(names) * each, seed, None), best_of)
        config.images_of(file_names(names, each * best_of, candidates.flatten().tolist()))  # each may be chosen
        asked["condition_images"] = opened(asked["condition_images"])
        counts: dict[str, Any] = {"num_images": config.num_images, "num_images_per_label": config.num_images_per_label}
        others: dict[str, Any] = {key: getattr(config, key) for key in ("best_of", "best_by", "batch_size")}
        out = pipeline.generate(**asked, **counts, seed=seed, **others, **settings)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError([Problem.of_error(error)]) from error
    paths = config.images_of(file_names(names, each, out.seeds or []))
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


def file_names(names: Sequence[str], each: int, seeds: Sequence[int]) -> list[str]:
    """A name for each image, `each` of each prompt: its class, as far as file names allow, and its seed."""
    words = [re.sub(r"[^\w-]+", "_", name)[:60].strip("_") or "image" for name in names for _ in range(each)]
    return [f"{word}_{seed:04d}" for word, seed in zip(words, seeds, strict=True)]


if __name__ == "__main__":
    run(GenerateConfig, generate, "python -m pipelines.generate")
