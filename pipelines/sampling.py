"""Samples the codes of any number of images, in batches that fit in memory.

Shape letters: N images, n images of one batch. `codes_shape` is that of the layout, `(h, w)` for most tokenizers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from stage2_prior import (
    DecoderPool,
    SamplingOptions,
    TokenLayout,
    UnmaskingOptions,
    batch_size_that_fits,
    sample,
    unmask,
    unmasking_batch_size,
)


class CodeSampler:
    """Samples codes with a prior, and keeps its decoders for later calls.

    Args:
        layout: meaning of the prior's tokens.

    Attributes:
        decoders: the decoders that are kept.
        progress_bar: options of tqdm.
    """

    def __init__(self, layout: TokenLayout):
        self.layout = layout
        self.decoders = DecoderPool(layout.length, layout.num_codes)
        self.progress_bar: dict[str, Any] = {}

    def batches(
        self,
        prior: PreTrainedModel,
        prompts: Tensor,
        seeds: Tensor,
        options: SamplingOptions,
        batch_size: int | None = None,
        callback_on_step_end: Callable[[int, Tensor], None] | None = None,
        unmasking: UnmaskingOptions | None = None,
    ) -> Iterator[Tensor]:
        """Yields codes int64 `(n, *codes_shape)`, batch by batch. One progress bar covers all batches.

        Args:
            prior: language model of the layout's family over its tokens.
            prompts: condition tokens, int64 `(N, 1)`.
            seeds: int64 `(N,)`.
            options: how codes are chosen.
            batch_size: images sampled at once; by default as many as fit in memory.
            callback_on_step_end: see `VQGANPipeline.generate`.
            unmasking: steps and order of a masked prior; None for a causal one.
        """
        length = self.layout.length
        if batch_size is None:
            fitting = batch_size_that_fits if unmasking is None else unmasking_batch_size
            batch_size = fitting(prior, length, options.guided)
        batches = -(-len(prompts) // batch_size)
        batch_size = -(-len(prompts) // batches)  # spread the images evenly over the batches
        steps, unit = (length, "code") if unmasking is None else (unmasking.num_steps, "step")
        with (
            self._sampling(prior, batch_size, options, unmasking) as sampled,
            tqdm(total=batches * steps, **{"desc": "sampling", "unit": unit, **self.progress_bar}) as bar,
        ):
            for labels, some_seeds in zip(prompts.split(batch_size), seeds.split(batch_size), strict=True):
                count = len(labels)
                # fill up the last batch: with one batch size, one recorded step serves all batches
                fill = torch.arange(batch_size, device=labels.device).clamp(max=count - 1)

                def on_step(step: int, chosen: Tensor, count: int = count) -> None:
                    bar.update()
                    if callback_on_step_end is not None:
                        callback_on_step_end(step, chosen[:count].clone())

                null = torch.full_like(labels, self.layout.null_token)
                yield sampled(labels[fill], null[fill], some_seeds[fill], on_step)[:count].view(
                    -1, *self.layout.codes_shape
                )

    @contextmanager
    def _sampling(
        self, prior: PreTrainedModel, batch_size: int, options: SamplingOptions, unmasking: UnmaskingOptions | None
    ) -> Iterator[Callable[..., Tensor]]:
        """Lends a function of prompts, null prompts, seeds and `on_step`, which samples the codes of one batch."""
        length, num_codes = self.layout.length, self.layout.num_codes
        if unmasking is not None:
            places = {"mask_token": self.layout.mask_token, "grids": self.layout.all_grids}
            yield lambda prompts, null, seeds, on_step: unmask(
                prior, prompts, null, seeds, length, num_codes, options, unmasking, on_step, **places
            )
            return
        with self.decoders.borrow(prior, batch_size * (2 if options.guided else 1)) as decoder:
            yield lambda prompts, null, seeds, on_step: sample(
                decoder, prompts, null, seeds, length, num_codes, options, on_step
            )
