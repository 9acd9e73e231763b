"""The prompts of the commands generate and score: their keys, and the values that the pipeline takes.

The keys are the arguments of `VQGANPipeline.generate` and `VQGANPipeline.score`, under the same names.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from configs import Section
from pipelines.commands import images_in

if TYPE_CHECKING:
    from pipelines.pipeline_vqgan import VQGANPipeline

ALL = "all"


@dataclass(kw_only=True)
class PromptSettings(Section):
    """The prompt has the conditions that the prior was trained with. A condition that is null is left out.

    class_labels: names or ids of classes: one, several with commas (cats,dogs), a list, or "all". Of several conditions
        with classes, {name: classes}: --class_labels.style flat
    text: a text, or a list of them, for a prior with texts; of several texts, {name: text}
    condition_images: a file, a folder or a list of them, for a prior with condition images; of several, {name: files}
    """

    class_labels: int | str | list[int | str] | dict[str, int | str | list[int | str]] | None = None
    text: str | list[str] | dict[str, str | list[str]] | None = None
    condition_images: str | list[str] | dict[str, str | list[str]] | None = None


def asked_conditions(config: PromptSettings, pipeline: "VQGANPipeline") -> dict[str, Any]:
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
