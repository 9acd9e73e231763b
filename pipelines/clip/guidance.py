"""CLIP guidance: Adam moves the latents of a tokenizer until CLIP finds that their image resembles the prompts.

Shape letters: B images, C channels, H W image size, D code width, h w code grid, M cut-outs of an image, P prompts.

Source: Crowson et al. 2022, "VQGAN-CLIP: open domain image generation and editing with natural language guidance",
section 3: the cut-outs, the loss, and the latents in front of the quantizer, which are clamped to the range of the
codebook after each step. The moving average of the latents and the pull to the start image are those of the authors'
notebooks.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from numbers import Integral
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from configs.arguments import choice, described, instance, is_number, number, whole
from configs.memory import shortage
from pipelines.clip.encoder import CLIPEncoder
from pipelines.clip.latents import LatentSpace
from pipelines.clip.objective import Objective
from pipelines.outputs import OUTPUT_TYPES
from pipelines.pipeline_vqgan import VQGANPipeline
from pipelines.requests import image_seeds
from stage1_vqgan import VQGANImageProcessor, VQGANModel

# Called with the number of steps done, the images so far, and the similarities `(B, P)` of the last step.
Callback = Callable[[int, list[Image.Image], Tensor], None]


@dataclass(frozen=True)
class CLIPGuidanceOutput:
    """Output of [`CLIPGuidance`].

    Attributes:
        images: list of B PIL images; or float32 array `(B, H, W, C)` or tensor `(B, C, H, W)` in [0, 1].
        codes: int64 `(B, h, w)`, or `(B, h, w, G)`; the codes of these images.
        similarities: float32 `(steps, B, P)` on the CPU, the cosine similarity of image and prompt in CLIP, in [-1, 1],
            as the mean over the cut-outs of a step.
        seeds: the seed of each image.
    """

    images: Any
    codes: Tensor
    similarities: Tensor
    seeds: list[int]


class CLIPGuidance:
    """Makes images that resemble texts or images, by a tokenizer and a CLIP. It needs no prior and no training.

    Args:
        model: a tokenizer of gray or RGB images, which is put into evaluation mode; or a pipeline with such a one.
        clip: folder or Hub id of a CLIP or SigLIP of transformers.
        image_processor: prepares `init`; by default that of the pipeline, or for a tokenizer a new one.

    Raises:
        ValueError: the tokenizer has other channels or the quantizer "pyramid", or no such CLIP can be loaded.
    """

    def __init__(
        self,
        model: VQGANPipeline | VQGANModel,
        clip: str | Path,
        image_processor: VQGANImageProcessor | None = None,
    ):
        instance("model", model, (VQGANPipeline, VQGANModel), "a VQGANPipeline or a VQGANModel")
        self.vqgan = model.vqgan if isinstance(model, VQGANPipeline) else model.eval()
        config = self.vqgan.config
        if config.in_channels not in (1, 3):
            raise ValueError(
                f"model: received a tokenizer of {config.in_channels} channels; CLIP sees gray or RGB images"
            )
        if image_processor is None:
            own = VQGANImageProcessor(list(config.image_shape), config.in_channels)
            image_processor = model.image_processor if isinstance(model, VQGANPipeline) else own
        self.image_processor = image_processor
        self.space = LatentSpace(self.vqgan)
        self.clip = CLIPEncoder(clip)

    @torch.no_grad()
    def __call__(
        self,
        prompts: Any,
        *,
        steps: int = 300,
        size: int | Sequence[int] | None = None,
        init: Any = None,
        init_weight: float = 0.0,
        num_images: int = 1,
        num_cutouts: int = 32,
        learning_rate: float = 0.1,
        ema_decay: float = 0.0,
        seed: int | list[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        callback: Callback | None = None,
        callback_steps: int = 50,
        progress_bar: bool = True,
    ) -> CLIPGuidanceOutput:
        """Makes images.

        Args:
            prompts: what the images shall resemble: a text, a PIL image, `(text or image, weight)`, or a list of these.
                The weight is 1.0 by default. An image moves away from a prompt with a weight below 0.
            steps: number of optimizer steps.
            size: side of the images in pixels, or (height, width); by default that of the tokenizer's training. The
                tokenizer's downsampling factor must divide both.
            init: image at which all images start, in the forms that [`VQGANImageProcessor`] takes. It is resized and
                cropped to `size`. By default an image starts from random codes.
            init_weight: weight that pulls the latents to those of `init`; half the mean squared difference is added to
                the loss with this weight.
            num_images: B.
            num_cutouts: M; more of them are steadier and take more memory.
            learning_rate: of Adam, in units of the latents.
            ema_decay: decay of the moving average of the latents, whose codes and images are returned; 0.0 returns the
                last latents.
            seed, generator: see `VQGANPipeline.generate`. On a CPU, a run with the same seeds and arguments gives the
                same images.
            output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W), both in [0, 1].
            callback: called every `callback_steps` steps and after the last one with the number of steps done, the PIL
                images so far, and the similarities `(B, P)` of the last step.
            callback_steps: steps between two calls.
            progress_bar: whether to show a bar with the mean similarity to the first prompt.

        Raises:
            ValueError: an argument is out of range. The message names it, the value received and what is allowed.
            FloatingPointError: latents are NaN or infinite.
        """
        choice("output_type", output_type, OUTPUT_TYPES[:3])
        instance("callback", callback, (Callable, NoneType), "a function or None")
        steps, callback_steps = whole("steps", steps), whole("callback_steps", callback_steps)
        learning_rate = number("learning_rate", learning_rate, lambda value: value > 0, "a number above 0")
        ema_decay = number("ema_decay", ema_decay, lambda value: 0 <= value < 1, "a number from 0 to below 1")
        num_images, num_cutouts = whole("num_images", num_images), whole("num_cutouts", num_cutouts)
        shape = self._shape(size)
        self._require_memory(num_images, num_cutouts, shape)
        seeds = image_seeds(num_images, seed, generator).tolist()
        weighted = listed_prompts(prompts)
        self.clip.to(self.vqgan.device)
        start = self._start(init, shape, seeds)
        objective = Objective(
            space=self.space,
            clip=self.clip,
            targets=torch.stack([self.clip.embed_prompt(prompt) for prompt, _ in weighted]),
            weights=start.new_tensor([weight for _, weight in weighted]),
            start=start,
            init_weight=_init_weight(init_weight, init),
            seeds=seeds,
            num_cutouts=num_cutouts,
        )
        states = islice(objective.descent(learning_rate, ema_decay), steps)
        bar = tqdm(states, desc="guiding", total=steps, unit="step", disable=not progress_bar)
        similarities = []
        for step, (latents, similarity) in enumerate(bar, 1):
            similarities.append(similarity.cpu())
            bar.set_postfix(similarity=f"{similarities[-1][:, 0].mean():.3f}", refresh=False)
            if callback is not None and (step == steps or step % callback_steps == 0):
                callback(step, self._decoded(self._codes(latents), "pil"), similarities[-1])
        codes = self._codes(latents)
        return CLIPGuidanceOutput(self._decoded(codes, output_type), codes, torch.stack(similarities), seeds)

    def _codes(self, latents: Tensor) -> Tensor:
        if not latents.isfinite().all():
            advice = "compute in float32, lower the learning_rate, or check whether the weights are damaged"
            raise FloatingPointError(f"the latents are NaN or infinite; {advice}")
        return self.space.quantized(latents)[1]

    def _decoded(self, codes: Tensor, output_type: str) -> Any:
        return self.image_processor.postprocess(self.vqgan.decode_codes(codes), output_type)

    def _shape(self, size: Any) -> tuple[int, int]:
        """Height and width of the images."""
        factor = self.vqgan.config.downsampling_factor
        sides = self.vqgan.config.image_shape if size is None else size
        sides = tuple(sides) if isinstance(sides, tuple | list) else (sides, sides)
        if len(sides) != 2 or not all(is_number(side, Integral) and side > 0 and side % factor == 0 for side in sides):
            allowed = f"needs a side in pixels or (height, width), divisible by {factor}"
            raise ValueError(f"size: received {described(size)}; {allowed}")
        return int(sides[0]), int(sides[1])

    def _require_memory(self, num_images: int, num_cutouts: int, shape: tuple[int, int]) -> None:
        """Refuses images and cut-outs, 32-bit floats, that do not fit in memory together."""
        pixels = shape[0] * shape[1] + num_cutouts * self.clip.size**2
        if lack := shortage(4 * 3 * num_images * pixels, self.vqgan.device):
            asked = f"num_images {num_images}, num_cutouts {num_cutouts}, size {shape[0]}×{shape[1]}"
            raise ValueError(f"num_cutouts: received {asked}; {lack}; ask for fewer or smaller ones")

    def _start(self, init: Any, shape: tuple[int, int], seeds: list[int]) -> Tensor:
        """The latents `(B, D, h, w)` at which the images start."""
        if init is None:
            factor = self.vqgan.config.downsampling_factor
            return self.space.random(seeds, (shape[0] // factor, shape[1] // factor))
        processor = copy.copy(self.image_processor)
        processor.size = {"height": shape[0], "width": shape[1]}
        try:
            pixel_values = processor([init])["pixel_values"]
        except ValueError as error:
            raise ValueError(f"init: received {described(init)}; {str(error).partition(': ')[2]}") from error
        return self.space.of_image(pixel_values).repeat(len(seeds), 1, 1, 1)


def listed_prompts(prompts: Any) -> list[tuple[str | Image.Image, float]]:
    """Prompts and their weights; see [`CLIPGuidance`].

    Raises:
        ValueError: there is no prompt, or one is neither a text nor a PIL image, or its weight is not a number, or 0.
    """
    listed = prompts if isinstance(prompts, list) else [prompts]
    if not listed:
        raise ValueError("prompts: received an empty list; needs at least one text or image")
    return [_weighted(f"prompts[{place}]", prompt) for place, prompt in enumerate(listed)]


def _weighted(name: str, prompt: Any) -> tuple[str | Image.Image, float]:
    prompt, weight = prompt if isinstance(prompt, tuple) and len(prompt) == 2 else (prompt, 1.0)
    instance(name, prompt, (str, Image.Image), "a text, a PIL image, or (text or image, weight)")
    return prompt, number(name, weight, lambda value: value != 0, "a weight that is a number and not 0")


def _init_weight(weight: Any, init: Any) -> float:
    weight = number("init_weight", weight, lambda value: value >= 0, "a number from 0 up")
    if weight and init is None:
        raise ValueError(f"init_weight: received {weight}; it needs an image to pull to, so give init too")
    return weight
