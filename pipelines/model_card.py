"""The README.md of a pipeline on the Hub. It is made from the files of the pipeline's folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.card import (
    card_metadata,
    cell,
    comment,
    install_block,
    license_part,
    measured,
    part,
    picture,
    read_facts,
    table,
    training_part,
    with_front_matter,
)
from configs.card_facts import dataset_ids
from configs.files import read_json
from configs.uploads import REPO_ID
from pipelines.conditions import ARGUMENTS
from pipelines.outputs import in_words
from stage1_vqgan import VQGANConfig
from stage1_vqgan.model_card import CAPTION, WITHOUT_PACKAGE, detail_rows as tokenizer_rows, num_parameters
from stage2_prior import TokenLayout
from stage2_prior.model_card import (
    TASK,
    auto_class,
    class_blocks,
    detail_rows as prior_rows,
    example_class,
    imports,
    kind_tag,
    sampling_code,
)

PLACEHOLDER = "path/or/repository"
METRICS_NAME, SAMPLES_NAME, RECONSTRUCTIONS_NAME = "metrics.json", "samples.png", "reconstructions.png"
TUNING_NAME = "tuning.json"
TAGS = ("vqgan", "image-generation")

MEANINGS = {
    "class_accuracy": "share of the images to which a classifier of real images gives the class that was asked for",
    "class_accuracy_real": "the same for real images",
    "classification_accuracy_score": "accuracy, on real images, of a classifier trained on generated images",
    "classification_accuracy_score_real": "the same, trained on as many real images",
    "frechet_distance": "distance to real images in averaged pixels; lower is better; not the FID of the literature",
    "frechet_distance_real": "the same for other real images",
    "nearest_neighbour_ratio": "distance to the nearest training image; 1: as far as unseen images, near 0: copies",
    "suspected_copies": "share of the images that look like copies of training images; an honest prior has .05",
    "nearer_than_held_out": "probability that an image is more like a copy than a held-out one; .5: no copies, 1: all",
    "reconstruction_l1": "mean absolute error of reconstructions, pixels in [-1, 1]",
    "psnr": "of reconstructions, in dB",
    "ssim": "of reconstructions",
    "codebook_usage": "share of the codes that occur",
}


def meanings_of(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The meanings of the metrics that a card shows, with the accuracies of further conditions."""
    added = [key for key in metrics if key.startswith("class_accuracy_") and key not in MEANINGS]
    own = "as `class_accuracy`, of the classes of this condition"
    return MEANINGS | {key: MEANINGS["class_accuracy_real"] if key.endswith("_real") else own for key in added}


def model_card(folder: Path, name: str, license: str) -> str:
    """A new card for the pipeline in a folder.

    Args:
        folder: the pipeline's folder; what its folder `card` holds is shown too.
        name: folder or Hub id in the examples.
        license: an identifier of the Hub.
    """
    index = read_json(folder / "model_index.json")
    layout, defaults = TokenLayout.from_dict(index["token_layout"]), index.get("sampling_defaults", {})
    config = VQGANConfig.from_pretrained(folder / "vqgan")
    tags = (*TAGS, kind_tag(layout))
    metadata = card_metadata(license, dataset_ids(folder), tags, pipeline_tag=task(layout), **_index(folder, name))
    kind = "Conditional image" if layout.segments else "Class-conditional image" if layout.num_classes else "Image"
    body = [
        f"# {kind} generator",
        part("pictures", picture(folder, SAMPLES_NAME, "Generated images")),
        part("use", _summary(folder, config, layout), *_use(name, layout, defaults), *_use_without(name, layout)),
        part("details", "## Details", table(_details(folder, config, layout)), *class_blocks(layout)),
        training_part(folder),
        _evaluation(folder, defaults),
        license_part(license),
        f"## Limits\n\n{LIMITS}",
    ]
    return with_front_matter(metadata, "\n" + "\n\n".join(body) + "\n")


LIMITS = (
    "The model generates images like those that it was trained on, with their gaps and their bias, and with errors of "
    "its own. It may repeat parts of training images. It has not been examined for any use in which an error could "
    "harm somebody."
)


def _summary(folder: Path, config: VQGANConfig, layout: TokenLayout) -> str:
    size, colour = (
        "×".join(map(str, config.image_shape)),
        {1: "gray", 3: "colour"}.get(config.in_channels, f"{config.in_channels}-channel"),
    )
    kind = cell(read_json(folder / "prior" / "config.json").get("model_type"))
    return (
        f"Generates {size} {colour} images in two stages: a VQGAN tokenizer turns an image into "
        f"{layout.length} codes out of {layout.num_codes:,}, and a {layout.family} language model (`{kind}`) samples "
        "such codes. Made with tessella."
    )


def task(layout: TokenLayout) -> str:
    """The task of a pipeline in the words of the Hub."""
    kinds = {segment.kind for segment in layout.segments}
    return "text-to-image" if "text" in kinds else "image-to-image" if "image" in kinds else TASK


def _use(name: str, layout: TokenLayout, defaults: Mapping[str, Any]) -> list[str]:
    arguments, meaning = "num_images=4", ""
    if layout.segments:
        asked = [*_asked(layout), "num_images_per_label=4"]
        arguments = "\n" + "".join(f"    {argument},\n" for argument in asked)
    elif layout.num_classes:
        number = example_class(layout)
        arguments = f"class_labels=[{number}], num_images_per_label=4"
        meaning = f"  # class {number}, {comment(layout.class_names[number])}"
    pillow = "from PIL import Image\n\n" if "Image.open" in arguments else ""
    return [
        "## Use",
        install_block(),
        f"""```python
{pillow}from pipelines import VQGANPipeline

pipe = VQGANPipeline.from_pretrained("{name}")
images = pipe.generate({arguments}).images{meaning}
images[0].save("image.png")
```""",
        f"Sampling arguments that are left out: {cell(in_words(defaults))}." if defaults else "",
    ]


def _asked(layout: TokenLayout) -> list[str]:
    """Arguments of `generate` that give an example of each condition."""
    values = {"class": "0", "text": '"…"', "image": 'Image.open("condition.png")'}
    by_kind = {
        kind: [f'"{segment.name}": {value}' for segment in layout.conditions if segment.kind == kind]
        for kind, value in values.items()
    }
    return [f"{ARGUMENTS[kind]}={{{', '.join(found)}}}" for kind, found in by_kind.items() if found]


def _use_without(name: str, layout: TokenLayout) -> list[str]:
    return [
        "Without this package: transformers loads the prior without other code. The tokenizer brings its own Python "
        "files, which `trust_remote_code=True` runs, so read them first.",
        WITHOUT_PACKAGE,
        f"""```python
{imports(layout)}
from transformers import AutoImageProcessor, AutoModel, {auto_class(layout)}

prior = {auto_class(layout)}.from_pretrained("{name}", subfolder="prior")
vqgan = AutoModel.from_pretrained("{name}", subfolder="vqgan", trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained("{name}", subfolder="vqgan", trust_remote_code=True)
{sampling_code(layout)}
images = processor.postprocess(vqgan.decode_codes(codes))
images[0].save("image.png")
```""",
    ]


def _details(folder: Path, config: VQGANConfig, layout: TokenLayout) -> list[tuple[str, str]]:
    rows = [*tokenizer_rows(config, folder / "vqgan"), ("Prior", f"{num_parameters(folder / 'prior'):,} parameters")]
    return rows + [row for row in prior_rows(layout) if row[0] == "Prompt"]


# ---------------------------------------------------------------------- evaluation


def _index(folder: Path, name: str) -> dict[str, Any]:
    """The fields of the metadata that hold metrics."""
    metrics = read_facts(folder, METRICS_NAME)
    shown = {key: metrics[key] for key in meanings_of(metrics) if key in metrics and not key.endswith("_real")}
    if not shown:
        return {}
    data = str(metrics.get("data") or "unknown")
    dataset_id = data if metrics.get("on_hub") and REPO_ID.fullmatch(data) else None
    return {"model_name": name.split("/")[-1], "eval_results": measured(TASK, data, dataset_id, shown)}


def _evaluation(folder: Path, defaults: Mapping[str, Any]) -> str:
    metrics = read_facts(folder, METRICS_NAME)
    found = {key: text for key, text in meanings_of(metrics).items() if metrics.get(key) is not None}
    rows = [_figure(key, metrics, text) for key, text in found.items()]
    shown, blocks = picture(folder, RECONSTRUCTIONS_NAME, "Images and their reconstructions", CAPTION), []
    if rows:
        settings = ", ".join(f"{key} {value}" for key, value in (metrics.get("settings") or {}).items())
        sampled = f"{metrics.get('num_samples', 0):,} generated images" + (f" ({cell(settings)})" if settings else "")
        text = f"{sampled}, compared with held-out images of {cell(metrics.get('data') or 'the data set')}."
        blocks = [text, table(rows, ("metric", "value", "±", "n", "compared with", "meaning"))]
    blocks += _tuning(folder, defaults)
    title = "## Evaluation" if blocks else "## Reconstructions" if shown else ""
    return part("evaluation", title, *blocks, shown)


def _figure(key: str, metrics: Mapping[str, Any], meaning: str) -> tuple[str, ...]:
    """The row of a figure: its value, standard error, number of images, and what they were compared with."""
    beside = (metrics.get("details") or {}).get(key, {})
    error = beside.get("standard_error")
    number = f"{beside['n']:,} {beside['images']}" if "n" in beside else ""
    spread = "" if error is None else f"{error:.2g}"
    return f"`{key}`", f"{metrics[key]:.4g}", spread, number, beside.get("reference", ""), meaning


def _tuning(folder: Path, defaults: Mapping[str, Any]) -> list[str]:
    """How the sampling defaults were chosen, if `pipelines.tune` chose these ones."""
    facts = read_facts(folder, TUNING_NAME)
    if not facts or facts.get("settings") != defaults:
        return []
    data = cell(facts.get("data") or "the data set")
    text = (
        f"`pipelines.tune` chose the sampling arguments by one half of the held-out images of {data}. "
        f"These are figures by the other half, {facts['num_samples']:,} images each, with new seeds:"
    )
    rows = [(cell(row["setting"]), *(f"{row[name]:.4g}" for name in facts["figures"])) for row in facts["rows"]]
    return [text, table(rows, ("setting", *(f"`{name}`" for name in facts["figures"])))]
