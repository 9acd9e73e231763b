"""Command that makes an image which resembles texts or images, by a tokenizer and a CLIP, without a prior.

Usage: `python -m pipelines.clip_guidance MODEL --clip CLIP --text "a lighthouse" --output lighthouse.png`.
"""

import json
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Le, Lt

from configs import ConfigError, Problem, Section, run
from configs.problems import one_line
from configs.sections import NonNegativeFloat, Positive, PositiveFloat
from pipelines.reconstruct import load_model

if TYPE_CHECKING:
    from PIL import Image

    from pipelines.clip.guidance import CLIPGuidanceOutput


@dataclass(kw_only=True)
class CLIPGuidanceConfig(Section):
    """Makes an image that resembles texts or images, and prints a JSON line: its file, seed and similarities.

    model: folder or Hub id of a tokenizer or of a pipeline, of which only the tokenizer is used
    clip: folder or Hub id of a CLIP or SigLIP of transformers
    text: a text, or a list of texts
    text_weights: the weight of each text, 1 by default; below 0 the image moves away from the text
    image: file of an image to resemble, or a list of files
    image_weights: the weight of each image, 1 by default
    output: PNG file of the result
    overwrite: replace the file if it exists; otherwise the command refuses to start
    save_steps: steps after which `output` gets the image so far; null saves only the last one
    steps: number of optimizer steps
    size: side of the image in pixels, or [height, width]; null takes that of the tokenizer's training
    init: file of an image to start from; null starts from random codes
    init_weight: weight that pulls the latents to those of `init`
    num_cutouts: random crops that CLIP sees in each step; more are steadier and take more memory
    learning_rate: of Adam, in units of the latents
    ema_decay: decay of the moving average of the latents, which is decoded; 0 decodes the last latents
    seed: seed of the random numbers; null chooses one by chance
    device: where to compute, such as "cpu" or "cuda"; null takes the GPU if there is one
    """

    positional = "model"

    model: str
    clip: str
    output: str
    text: str | list[str] | None = None
    text_weights: float | list[float] | None = None
    image: str | list[str] | None = None
    image_weights: float | list[float] | None = None
    overwrite: bool = False
    save_steps: Positive | None = None
    steps: Positive = 300
    size: Positive | list[Positive] | None = None
    init: str | None = None
    init_weight: NonNegativeFloat = 0.0
    num_cutouts: Positive = 32
    learning_rate: PositiveFloat = 0.1
    ema_decay: Annotated[float, Ge(0), Lt(1)] = 0.0
    seed: Annotated[int, Ge(0), Le(2**63 - 1)] | None = None
    device: str | None = None

    def problems(self) -> Iterable[tuple[str, Any, str]]:
        if not (listed(self.text) or listed(self.image)):
            yield "text", self.text, "give a text, or --image with the file of an image to resemble"
        for key in ("text", "image"):
            weights, count = listed(getattr(self, f"{key}_weights")), len(listed(getattr(self, key)))
            if weights and (len(weights) != count or 0 in weights):
                yield f"{key}_weights", weights, f"needs a number other than 0 for each of the {count} in {key}"
        if not self.output.lower().endswith(".png"):
            yield "output", self.output, "must be the name of a PNG file, such as image.png"


def clip_guidance(config: CLIPGuidanceConfig) -> "CLIPGuidanceOutput":
    """Makes and saves the image, and prints its line.

    Raises:
        ConfigError: a model or an image cannot be loaded, an argument is out of range, or the output exists.
    """
    # These imports are slow, so they come after the check of the arguments.
    from configs.files import write_png
    from pipelines.clip.guidance import CLIPGuidance

    path = Path(config.output)
    if path.exists() and not config.overwrite:
        message = f"received {config.output!r}, which exists; choose another name, or add --overwrite true"
        raise ConfigError([Problem("output", message)])
    prompts = [(key, each, weight) for key in ("text", "image") for each, weight in weighted(config, key)]
    asked: list[Any] = [(opened(key, each) if key == "image" else each, weight) for key, each, weight in prompts]
    init = None if config.init is None else opened("init", config.init)
    vqgan, processor = load_model(config.model, config.device)
    seed = secrets.randbelow(2**32) if config.seed is None else config.seed
    keys = ("steps", "init_weight", "num_cutouts", "learning_rate", "ema_decay")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        out = CLIPGuidance(vqgan, config.clip, processor)(
            asked,
            **{key: getattr(config, key) for key in keys},
            size=config.size,
            init=init,
            seed=seed,
            callback=lambda step, images, similarities: write_png(path, images[0]),
            callback_steps=config.save_steps or config.steps,
        )
    except ValueError as error:
        raise ConfigError([Problem.of_error(error)]) from error
    reached = out.similarities[-1, 0].tolist()
    found = [
        {key: each, "weight": weight, "similarity": round(similarity, 4)}
        for (key, each, weight), similarity in zip(prompts, reached, strict=True)
    ]
    print(json.dumps({"file": config.output, "seed": seed, "steps": config.steps, "prompts": found}))
    return out


def listed(value: Any) -> list[Any]:
    """A list as it is, one value as a list of one, and None as an empty list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def weighted(config: CLIPGuidanceConfig, key: str) -> list[tuple[str, float]]:
    """The prompts of the key "text" or "image", and their weights."""
    prompts = listed(getattr(config, key))
    return list(zip(prompts, listed(getattr(config, f"{key}_weights")) or [1.0] * len(prompts), strict=True))


def opened(key: str, file: str) -> "Image.Image":
    """The image in a file.

    Raises:
        ConfigError: it cannot be read.
    """
    from stage1_vqgan import EncodedImage, decode

    try:
        return decode(EncodedImage(file, file))
    except (OSError, ValueError) as error:
        raise ConfigError([Problem(key, f"received {file!r}; {one_line(error)}")]) from error


if __name__ == "__main__":
    run(CLIPGuidanceConfig, clip_guidance, "python -m pipelines.clip_guidance")
