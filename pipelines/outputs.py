"""What `VQGANPipeline.generate` returns, and how a pipeline and its output describe themselves."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from configs.arguments import described
from configs.problems import cut, listed
from stage1_vqgan import VQGANModel
from stage2_prior import TokenLayout

OUTPUT_TYPES = ("pil", "np", "pt", "codes")


@dataclass(repr=False)
class VQGANPipelineOutput(ModelOutput):
    """Output of [`VQGANPipeline.generate`] and of the methods that edit images. `len(out)` is N, the number of images.

    Attributes:
        images: list of N PIL images; or float32 array `(N, H, W, C)` or tensor `(N, C, H, W)` in [0, 1]; or None.
        codes: int64 `(N, h, w)`; `(N, h, w, G)` or `(N, L)` if the tokenizer has several codes at each position, or
            several grids.
        labels: the class name of each image: of the condition "class", or of the only one with classes. If only others
            are given, `{condition: class name}` of these. None for images of no given class.
        seeds: the seed of each image, from 0 to 2**63 - 1. `generate(out.labels[n], seed=out.seeds[n])` with the same
            options makes image n again, if nothing else was asked of it.
        prompts: of a prior with several conditions, or with a list of guidance scales, what was asked of each image, as
            arguments of `generate`: `generate(**out.prompts[n], seed=out.seeds[n])` makes image n again.
        scores: the score of each image by `best_by` of `generate`; None without it.
    """

    images: Any = None
    codes: Tensor | None = None
    labels: list[Any] | None = None
    seeds: list[int] | None = None
    prompts: list[dict[str, Any]] | None = None
    scores: list[float] | None = None

    def __len__(self) -> int:
        return 0 if self.codes is None else len(self.codes)

    def __repr__(self) -> str:
        lines = [f"codes: {described(self.codes)}"]
        if isinstance(self.images, list):
            image = self.images[0]
            lines.insert(0, f"images: {len(self.images)} PIL images, {image.mode}, {image.width}×{image.height}")
        elif self.images is not None:
            lines.insert(0, f"images: {described(self.images)}")
        if self.labels is not None:
            counts = Counter(label_text(label) for label in self.labels)
            lines.append(f"labels: {listed([f'{cut(name, 40)} ({count})' for name, count in counts.items()], 8)}")
        if self.seeds is not None:
            lines.append(f"seeds: {listed([str(seed) for seed in self.seeds], 4)}")
        return "\n  ".join([f"{type(self).__name__}(", *lines]) + "\n)"


def label_text(label: Any) -> str:
    """An entry of `VQGANPipelineOutput.labels` in words."""
    return " · ".join(label.values()) if isinstance(label, dict) else label


def pipeline_text(
    vqgan: VQGANModel, prior: PreTrainedModel, layout: TokenLayout, sampling_defaults: Mapping[str, Any]
) -> str:
    """A pipeline in a few lines: its images, its classes, its models, its defaults, and where they compute."""
    config, (height, width), factor = vqgan.config, layout.grid, layout.downsampling_factor
    channels = f"{config.in_channels} channel{'s' * (config.in_channels > 1)}"
    names = listed([cut(name, 40) for name in layout.class_names], 8)
    classes = f"classes: {layout.num_classes} ({names})" if names else "classes: none"
    lines = [
        f"images: {width * factor}×{height * factor} pixels, {channels}, {layout.codes_text} codes",
        *([classes] if names or not layout.segments else []),
        *([f"conditions: {', '.join(segment.summary for segment in layout.segments)}"] if layout.segments else []),
        f"vqgan: {config.quantizer}, {config.num_embeddings:,} codes, {vqgan.num_parameters():,} parameters",
        f"prior: {type(prior).__name__}, {prior.num_parameters():,} parameters",
        *([f"sampling defaults: {in_words(sampling_defaults)}"] if sampling_defaults else []),
        f"device: {prior.device}, {str(prior.dtype).removeprefix('torch.')}",
    ]
    return "\n  ".join(["VQGANPipeline(", *lines]) + "\n)"


def in_words(settings: Mapping[str, Any]) -> str:
    """Sampling arguments for a line of text, such as `guidance_scale 1.25, min_p 0.05`."""
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in settings.items()
    )
