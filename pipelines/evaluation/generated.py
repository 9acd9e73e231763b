"""The images that a pipeline generates for an evaluation: what is asked for, and its shards on disk.

Shape letters: N images, P tokens of a prompt, n images of a part.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from tqdm.auto import tqdm

from configs import ConfigError, Problem
from configs.randomness import draw_seeds
from pipelines.defaults import STANDARD, options_of, resolved
from pipelines.evaluation.config import EvaluationConfig
from pipelines.evaluation.prompts import held_out_prompts
from pipelines.evaluation.shards import ImageShards, claim, missing_of, pixels_of_levels, ranges, write_shard
from pipelines.pipeline_vqgan import VQGANPipeline
from pipelines.prompts import Groups, require_learnt
from stage1_vqgan.image_processing_pixels import floats_to_levels
from stage2_prior import CLASS, SamplingOptions, TokenLayout, UnmaskingOptions


@dataclass(frozen=True)
class Asked:
    """What the prior is asked for. An image depends on its prompt, its seed and the options alone.

    Attributes:
        prompts: int64 `(N, P)`, sorted by class.
        seeds: int64 `(N,)`. Seed n depends on `EvaluationConfig.seed` and n alone.
        labels: the classes int64 `(N,)` of each condition that has classes, by its name.
        settings: the sampling arguments that were given or are defaults of the pipeline.
        options, groups, unmasking: how codes are chosen.
    """

    prompts: Tensor
    seeds: Tensor
    labels: dict[str, np.ndarray]
    settings: dict[str, Any]
    options: SamplingOptions
    groups: Groups
    unmasking: UnmaskingOptions | None

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def record(self) -> dict[str, Any]:
        """All of it as JSON, with a hash in place of the tensors."""
        tensors = b"".join(tensor.numpy().tobytes() for tensor in (self.prompts, self.seeds))
        how = {name: repr(getattr(self, name)) for name in ("options", "groups", "unmasking")}
        return {"asked": hashlib.sha256(tensors).hexdigest()[:16], "count": len(self), **how}


def asked_of(config: EvaluationConfig, pipeline: VQGANPipeline) -> Asked:
    """What an evaluation asks of a prior: `samples_per_class` images of each class, or as many in all without classes.

    A prior with further conditions is asked for the conditions of held-out images. Settings that the configuration
    leaves out are the defaults of the pipeline.

    Raises:
        ConfigError: see `held_out_prompts`; or the prior cannot be guided, or a causal one is given steps.
    """
    layout = pipeline.layout
    given = [segment for segment in layout.conditions if segment.num_tokens]  # a prior without classes has none
    names = [segment.name for segment in given]
    asked = {"guidance_scale": config.guidance_scale if given else None, **config.unmasking}
    try:
        settings = resolved(pipeline.sampling_defaults, asked, names)
        options, groups, unmasking = options_of(layout, settings)
        require_learnt(layout, names, options, groups)
    except ValueError as error:
        raise ConfigError([Problem.of_error(error)]) from error
    prompts = held_out_prompts(config, layout) if layout.segments else class_prompts(layout, config.samples_per_class)
    classes = [segment for segment in given if segment.kind == "class"]
    labels = {one.name: prompts[:, layout.places[one.name]] - layout.first_tokens[one.name] for one in classes}
    seeds = draw_seeds(len(prompts), torch.Generator().manual_seed(config.seed))
    shown = {name: value for name, value in settings.items() if name == "guidance_scale" or value != STANDARD.get(name)}
    of_classes = {name: found[:, 0].numpy() for name, found in labels.items()}
    return Asked(prompts, seeds, of_classes, shown, options, groups, unmasking)


def class_prompts(layout: TokenLayout, each: int) -> Tensor:
    """`each` prompts of each class, int64 `(N, P)`; of a layout without classes, `each` prompts without a condition."""
    prompts = layout.null_prompt().repeat(max(1, layout.num_classes) * each, 1)
    if layout.num_classes:
        classes = torch.arange(layout.num_classes).repeat_interleave(each)
        prompts[:, layout.places[CLASS]] = classes[:, None] + layout.first_tokens[CLASS]
    return prompts


@torch.no_grad()
def sampled(pipeline: VQGANPipeline, asked: Asked, rows: range) -> Iterator[np.ndarray]:
    """The images of some rows, batch by batch.

    Yields:
        uint8 `(n, H, W, C)`, the bytes of the images that `generate` returns; for a pipeline whose values are not
        8-bit, float32 in [-1, 1].
    """
    chosen = slice(rows.start, rows.stop)
    how = (asked.options, None, None, None, asked.groups, asked.unmasking)
    codes = pipeline._sampled(asked.prompts[chosen], asked.seeds[chosen], *how)
    for batch in codes:
        for images in pipeline._decoded(batch, "np"):
            yield floats_to_levels(images) if has_bytes(pipeline) else images * 2 - 1


def has_bytes(pipeline: VQGANPipeline) -> bool:
    """Whether the values of the images are 8-bit."""
    values = pipeline.image_processor.values
    return values is None or values.of_bytes


def bytes_of_samples(pipeline: VQGANPipeline) -> int:
    """Bytes of one image in a shard."""
    return pipeline.layout.pixels * pipeline.vqgan.config.in_channels * (1 if has_bytes(pipeline) else 4)


def generate_samples(config: EvaluationConfig, pipeline: VQGANPipeline) -> tuple[Tensor, dict[str, np.ndarray]]:
    """Generates the images of an evaluation in memory.

    Returns:
        Pixels float32 `(N, C, H, W)` in [-1, 1], and their classes, int64 `(N,)`, by the name of the condition.

    Raises:
        ConfigError: see `asked_of`.
    """
    asked = asked_of(config, pipeline)
    images = np.concatenate(list(sampled(pipeline, asked, range(len(asked)))))
    return pixels_of_levels(images), asked.labels


def store_samples(
    folder: Path, pipeline: VQGANPipeline, weights: dict[str, Any], asked: Asked, processes: PartialState
) -> ImageShards:
    """Generates the images that are asked for into shards of a folder. The processes share the work.

    A run that was interrupted goes on with the missing shards. Shards of other weights or settings are removed. Any
    number of processes makes the same images.

    Args:
        folder: for the shards.
        pipeline: on the device of this process.
        weights: what identifies its weights, as JSON.
        asked: what is asked for.
        processes: the processes of the run. All of them call this together.
    """
    if processes.is_main_process:
        claim(folder, {**weights, "dtype": str(pipeline.dtype), **asked.record})
    processes.wait_for_everyone()
    own = list(missing_of(folder, ranges(len(asked)), processes.process_index, processes.num_processes))
    total = sum(len(rows) for _, rows in own)
    with tqdm(total=total, desc="generating", unit="image", disable=not processes.is_main_process) as bar:
        for path, rows in own:
            images = []
            for part in sampled(pipeline, asked, rows):
                images.append(part)
                bar.update(len(part))
            write_shard(path, np.concatenate(images))
    processes.wait_for_everyone()
    return ImageShards(folder, asked.labels.get(CLASS))
