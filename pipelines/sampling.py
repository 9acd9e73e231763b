"""Samples the codes of any number of images, in batches that fit in memory.

Shape letters: N images, n images of one batch. `codes_shape` is that of the layout, `(h, w)` for most tokenizers.
"""

from collections.abc import Callable, Iterator, Sequence
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
        self.decoders = DecoderPool(layout.num_positions, layout.num_codes)
        self.progress_bar: dict[str, Any] = {}

    def batches(
        self,
        prior: PreTrainedModel,
        prompts: Tensor,
        seeds: Tensor,
        options: SamplingOptions,
        batch_size: int | None = None,
        callback_on_step_end: Callable[[int, Tensor], None] | None = None,
        known: Tensor | None = None,
        groups: Sequence[Sequence[str] | None] = (None,),
        unmasking: UnmaskingOptions | None = None,
    ) -> Iterator[Tensor]:
        """Yields codes int64 `(n, *codes_shape)`, batch by batch. One progress bar covers all batches.

        Args:
            prior: language model of the layout's family over its tokens.
            prompts: condition tokens, int64 `(N, P)`.
            seeds: int64 `(N,)`.
            options: how codes are chosen. Scales for each image are those of the N images.
            batch_size: images sampled at once; by default as many as fit in memory.
            callback_on_step_end: see `VQGANPipeline.generate`.
            known: int64 `(N, L)`, codes that are given; -1 where a code is sampled.
            groups: names of the conditions that each scale of the guidance is about; None is all of them.
            unmasking: steps and order of a masked prior; the defaults of `UnmaskingOptions` if it is None.
        """
        layout, unmasking = self.layout, unmasking or UnmaskingOptions()
        masked = layout.family == "masked"
        steps, unit = (unmasking.steps(layout.length), "step") if masked else (layout.length, "code")
        if batch_size is None:
            batch_size = batch_size_that_fits(prior, layout.num_positions, options.rows_per_image, layout.family)
        batches = -(-len(prompts) // batch_size)
        batch_size = -(-len(prompts) // batches)  # spread the images evenly over the batches
        with (
            self._sampling(prior, batch_size, options, unmasking) as sampled,
            tqdm(total=batches * steps, **{"desc": "sampling", "unit": unit, **self.progress_bar}) as bar,
        ):
            for start in range(0, len(prompts), batch_size):
                count = min(batch_size, len(prompts) - start)
                # fill up the last batch: with one batch size, one recorded step serves all batches
                fill = [start + min(row, count - 1) for row in range(batch_size)]

                def on_step(step: int, chosen: Tensor, count: int = count) -> None:
                    bar.update()
                    if callback_on_step_end is not None:
                        callback_on_step_end(step, chosen[:count].clone())

                nulls, given = self._without(prompts[fill], groups), None if known is None else known[fill]
                codes = sampled(prompts[fill], nulls, seeds[fill], options.of_images(fill), on_step, given)
                bar.update((start // batch_size + 1) * steps - bar.n)  # few hidden codes need fewer steps
                yield codes[:count].view(-1, *layout.codes_shape)

    @contextmanager
    def _sampling(
        self, prior: PreTrainedModel, batch_size: int, options: SamplingOptions, unmasking: UnmaskingOptions
    ) -> Iterator[Callable[..., Tensor]]:
        """Lends a function that samples one batch: codes `(n, L)` of prompts, nulls, seeds, options, on_step, known."""
        layout, size = self.layout, (self.layout.length, self.layout.num_codes)
        if layout.family == "masked":
            places: dict[str, Any] = {"mask_token": layout.mask_token, "grids": layout.all_grids}
            yield lambda prompts, nulls, seeds, options, on_step, known: unmask(
                prior, prompts, nulls, seeds, *size, options, unmasking, on_step, known, **places
            )
        else:
            with self.decoders.borrow(prior, batch_size * options.rows_per_image) as decoder:
                yield lambda prompts, nulls, seeds, options, on_step, known: sample(
                    decoder, prompts, nulls, seeds, *size, options, on_step, known
                )

    def _without(self, prompts: Tensor, groups: Sequence[Sequence[str] | None]) -> Tensor:
        """Prompts `(n, P)` with null tokens in place of each group's conditions, group by group: `(G·n, P)`."""
        nulls = [self.layout.null_prompt(names).to(prompts.device) for names in groups]
        return torch.cat([prompts.where(null < 0, null) for null in nulls])
