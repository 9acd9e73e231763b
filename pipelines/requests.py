"""What is asked of `VQGANPipeline.generate`: which images, and whether the prior and the memory allow them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from configs.arguments import choice, described, whole
from configs.memory import shortage
from configs.randomness import draw_seeds
from pipelines.chunks import bytes_of_image
from pipelines.conditions import ConditionTokenizer
from pipelines.defaults import options_of, resolved
from pipelines.outputs import OUTPUT_TYPES
from pipelines.prompts import (
    Given,
    Groups,
    asked_prompts,
    condition_ids,
    given_conditions,
    labels_of,
    number_of_prompts,
    prompt_lists,
    require_learnt,
    scale_lists,
)
from stage1_vqgan import VQGANModel
from stage2_prior import SamplingOptions, TokenLayout, UnmaskingOptions, require_callback

LARGEST_SEED = 2**63 - 1


class Request(NamedTuple):
    """What is asked of the prior for N images; see `VQGANPipeline.generate`.

    Attributes:
        prompts: int64 `(N, P)`.
        seeds: int64 `(N,)`.
        options: how codes are chosen.
        groups: the conditions of each scale of the guidance.
        output_type, batch_size, callback: those of `generate`.
        labels: the classes of the images, see `VQGANPipelineOutput`.
        given: names of the conditions that are given.
        asked: what was asked of each image, as arguments of `generate`; None if `labels` says it all.
        unmasking: steps and order of a masked prior.
    """

    prompts: Tensor
    seeds: Tensor
    options: SamplingOptions
    groups: Groups
    output_type: str
    batch_size: int | None
    callback: Callable[[int, Tensor], None] | None
    labels: list[Any] | None
    given: list[str]
    asked: list[dict[str, Any]] | None
    unmasking: UnmaskingOptions | None


class Requests:
    """Checks what is asked of the methods of a pipeline that sample images."""

    layout: TokenLayout
    sampling_defaults: Mapping[str, Any]
    _sampled: Callable[..., Iterator[Tensor]]

    def _request(
        self,
        make_prompts: Callable[[Sequence[Given]], Tensor],
        class_labels: Any = None,
        seed: Any = None,
        generator: Any = None,
        output_type: str = "pil",
        batch_size: int | None = None,
        callback_on_step_end: Callable[[int, Tensor], None] | None = None,
        text: Any = None,
        condition_images: Any = None,
        guidance_scale: Any = None,
        **options: Any,
    ) -> Request:
        """Checks arguments of `VQGANPipeline.generate`; `make_prompts` makes prompts `(N, P)` of what is given."""
        choice("output_type", output_type, OUTPUT_TYPES)
        batch_size = None if batch_size is None else whole("batch_size", batch_size)
        require_callback("callback_on_step_end", callback_on_step_end)
        given = given_conditions(self.layout, class_labels, text, condition_images)
        names = [one.segment.name for one in given]
        settings = resolved(self.sampling_defaults, {"guidance_scale": guidance_scale, **options}, names)
        sampling, groups, unmasking = options_of(self.layout, settings)
        require_learnt(self.layout, names, sampling, groups)
        prompts = make_prompts(given)
        count, each = len(prompts), len(prompts) // number_of_prompts(given, guidance_scale)
        sampling = sampling.of_images([number // each for number in range(count)])
        labels = labels_of(self.layout, given, prompts)
        has_more = self.layout.segments or scale_lists(guidance_scale)
        asked = asked_prompts(given, count, guidance_scale) if has_more else None
        seeds = image_seeds(count, seed, generator)
        how = (sampling, groups, output_type, batch_size, callback_on_step_end)
        return Request(prompts, seeds, *how, labels, names, asked, unmasking)

    def _sampled_for(self, request: Request, seeds: Tensor, known: Tensor | None = None) -> Iterator[Tensor]:
        """Samples the codes of a request batch by batch, with these seeds and known codes."""
        how = (request.options, request.batch_size, request.callback)
        return self._sampled(request.prompts, seeds, *how, known, request.groups, unmasking=request.unmasking)


def prompt_tokens(
    given: Sequence[Given],
    num_images: Any,
    num_images_per_label: Any,
    vqgan: VQGANModel,
    layout: TokenLayout,
    kind: str,
    tokenizers: Mapping[str, ConditionTokenizer] | None = None,
    guidance_scale: Any = 1.0,
) -> Tensor:
    """The prompts of the images that are asked for, int64 `(N, P)`. What is not given has null tokens.

    Args:
        given: what is given, see `given_conditions`.
        num_images, num_images_per_label: see `VQGANPipeline.generate`.
        vqgan: the tokenizer.
        layout: the token layout.
        kind: the `output_type` of the images.
        tokenizers: the tokenizers of texts and condition images, by the names of the conditions.
        guidance_scale: see `VQGANPipeline.generate`; a list has one for each prompt.

    Raises:
        ValueError: the arguments contradict each other, a label is unknown, or the images do not fit in memory.
    """
    each = images_of_each(given, num_images, num_images_per_label, guidance_scale)
    count = number_of_prompts(given, guidance_scale)
    for one in given:
        received = one.values[0] if one.is_single else one.values
        require_memory(one.key, received, len(one.values), layout.pixels, vqgan, layout, kind)
    prompts = layout.null_prompt().repeat(count, 1)
    for one in given:
        ids = condition_ids(one, layout, tokenizers or {})
        prompts[:, layout.places[one.segment.name]] = ids + layout.first_tokens[one.segment.name]
    name = "num_images_per_label" if num_images is None and given else "num_images"
    require_memory(name, each, each * count, layout.pixels, vqgan, layout, kind)
    return prompts.repeat_interleave(each, 0)


def images_of_each(
    given: Sequence[Given], num_images: Any, num_images_per_label: Any, guidance_scale: Any = 1.0
) -> int:
    """The number of images of each prompt. With `num_images`, a list of guidance scales has one for each image.

    Raises:
        ValueError: a number is no whole number, or the arguments contradict each other.
    """
    each = whole("num_images_per_label", num_images_per_label)
    if not given and each != 1:
        advice = "needs class_labels (use num_images for unconditional images)"
        raise ValueError(f"num_images_per_label: received {described(each)}; {advice}")
    if num_images is None:
        return each
    for one in given:
        if one.segment.kind == "class" or not one.is_single or each != 1:
            what = one.key if each == 1 else "num_images_per_label"
            advice = f"cannot be given with {what} (use num_images_per_label)"
            raise ValueError(f"num_images: received {described(num_images)}; {advice}")
    count, number = whole("num_images", num_images), number_of_prompts(given, guidance_scale)
    if not scale_lists(guidance_scale):
        return count
    if number != count:
        advice = "needs one each, or one number"
        raise ValueError(f"guidance_scale: received a list of {number} for {count} images; {advice}")
    return 1


def prompts_of(
    count: int,
    given: Sequence[Given],
    vqgan: VQGANModel,
    layout: TokenLayout,
    kind: str,
    tokenizers: Mapping[str, ConditionTokenizer],
    guidance_scale: Any = 1.0,
) -> Tensor:
    """The prompts of `count` images, int64 `(N, P)`: one for all of them, or one for each; see `prompt_tokens`.

    Raises:
        ValueError: there is another number of values.
    """
    number = number_of_prompts(given, guidance_scale)
    if number not in (1, count):
        key, _ = prompt_lists(given, guidance_scale)[0]
        raise ValueError(f"{key}: received {number} values for {count} images; needs one for all, or one for each")
    prompts = prompt_tokens(given, None, 1, vqgan, layout, kind, tokenizers, guidance_scale)
    return prompts.repeat(count // number, 1)


def image_seeds(count: int, seed: Any, generator: Any) -> Tensor:
    """The seed of each image, int64 `(N,)` on the CPU.

    Args:
        count: N, the number of images.
        seed, generator: see `VQGANPipeline.generate`.

    Raises:
        ValueError: both are given, a seed is not a whole number from 0 to 2**63 - 1, or a list has another length.
    """
    if seed is None:
        return draw_seeds(count, generator)
    if generator is not None:
        raise ValueError(f"seed: received {described(seed)}, and a generator as well; pass only one of them")
    if not isinstance(seed, list | tuple):
        return torch.arange(count) + whole("seed", seed, least=0, most=LARGEST_SEED + 1 - count)
    if len(seed) != count:
        raise ValueError(f"seed: received a list of {len(seed)} for {count} images; needs one each, or one number")
    return torch.tensor([whole("seed", one, least=0, most=LARGEST_SEED) for one in seed])


def require_memory(
    name: str, received: Any, count: int, pixels: int, vqgan: VQGANModel, layout: TokenLayout, kind: str
) -> None:
    """Refuses a request whose images cannot be in memory together.

    Args:
        name, received: the argument that the message names.
        count: number of images.
        pixels: number of pixels of one image, H·W.
        vqgan: the tokenizer, on its device.
        layout: the token layout.
        kind: the `output_type` of the images.

    Raises:
        ValueError: they need more memory than there is.
    """
    device = torch.device("cpu") if kind in ("pil", "np") else vqgan.device
    lack = shortage(count * bytes_of_image(vqgan, layout, pixels, kind), device)
    if lack is not None:
        raise ValueError(f"{name}: received {described(received)}; {lack}; ask for fewer images at once")
