"""Samples the codes of any number of images, in batches that fit in memory.

Shape letters: N images, n images of one batch. `codes_shape` is that of the layout, `(h, w)` for most tokenizers.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from stage2_prior import DecoderPool, SamplingOptions, TokenLayout, batch_size_that_fits, sample


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
        known=None,
    ) -> Iterator[Tensor]:
        """Yields codes int64 `(n, *codes_shape)`, batch by batch. One progress bar covers all batches.

        Args:
            prior: causal language model over the tokens of the layout.
            prompts: condition tokens, int64 `(N, 1)`.
            seeds: int64 `(N,)`.
            options: how codes are chosen.
            batch_size: images sampled at once; by default as many as fit in memory.
            callback_on_step_end: see `VQGANPipeline.generate`.
        """
        length = self.layout.length
        if batch_size is None:
            batch_size = batch_size_that_fits(prior, length, options.guided)
        batches = -(-len(prompts) // batch_size)
        batch_size = -(-len(prompts) // batches)  # spread the images evenly over the batches
        with (
            self.decoders.borrow(prior, batch_size * (2 if options.guided else 1)) as decoder,
            tqdm(total=batches * length, **{"desc": "sampling", "unit": "code", **self.progress_bar}) as bar,
        ):
            if known is None:
                known = seeds.new_full((len(seeds), length), -1)
            for labels, some_seeds, some_known in zip(
                prompts.split(batch_size), seeds.split(batch_size), known.split(batch_size), strict=True
            ):
                count = len(labels)
                # fill up the last batch: with one batch size, one recorded step serves all batches
                fill = torch.arange(batch_size, device=labels.device).clamp(max=count - 1)

                def on_step(position: int, chosen: Tensor, count: int = count) -> None:
                    bar.update()
                    if callback_on_step_end is not None:
                        callback_on_step_end(position, chosen[:count].clone())

                null = torch.full_like(labels, self.layout.null_token)
                codes = sample(
                    decoder,
                    labels[fill],
                    null[fill],
                    some_seeds[fill],
                    length,
                    self.layout.num_codes,
                    options,
                    on_step,
                    some_known[fill],
                )
                yield codes[:count].view(-1, *self.layout.codes_shape)
