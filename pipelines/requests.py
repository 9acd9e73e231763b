"""What is asked of `VQGANPipeline.generate`: which images, and whether the prior and the memory allow them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from configs.arguments import described, whole
from configs.memory import shortage
from configs.randomness import draw_seeds
from pipelines.chunks import bytes_of_image
from pipelines.conditions import ConditionTokenizer
from pipelines.prompts import Given, condition_ids, number_of_prompts
from stage1_vqgan import VQGANModel
from stage2_prior import TokenLayout, UnmaskingOptions

LARGEST_SEED = 2**63 - 1


def unmasking_options(
    layout: TokenLayout, num_steps: Any, order: Any, order_temperature: Any
) -> UnmaskingOptions | None:
    """The steps and the order of a masked prior; None for a causal prior.

    Args:
        layout: the token layout.
        num_steps, order, order_temperature: see `VQGANPipeline.generate`.

    Raises:
        ValueError: a value is out of range, or is given for a causal prior.
    """
    asked = {"num_steps": num_steps, "order": order, "order_temperature": order_temperature}
    given = {name: value for name, value in asked.items() if value is not None}
    if layout.family == "masked":
        unmasking = UnmaskingOptions(**given)
        unmasking.steps(layout.length)
        return unmasking
    for name, value in given.items():
        advice = "this prior is causal: it chooses one code after another; leave it out"
        raise ValueError(f"{name}: received {described(value)}; {advice}")
    return None


def prompt_tokens(
    given: Sequence[Given],
    num_images: Any,
    num_images_per_label: Any,
    vqgan: VQGANModel,
    layout: TokenLayout,
    kind: str,
    tokenizers: Mapping[str, ConditionTokenizer] | None = None,
) -> Tensor:
    """The prompts of the images that are asked for, int64 `(N, P)`. What is not given has null tokens.

    Args:
        given: what is given, see `given_conditions`.
        num_images, num_images_per_label: see `VQGANPipeline.generate`.
        vqgan: the tokenizer.
        layout: the token layout.
        kind: the `output_type` of the images.
        tokenizers: the tokenizers of texts and condition images, by the names of the conditions.

    Raises:
        ValueError: the arguments contradict each other, a label is unknown, or the images do not fit in memory.
    """
    each = images_of_each(given, num_images, num_images_per_label)
    count = number_of_prompts(given)
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


def images_of_each(given: Sequence[Given], num_images: Any, num_images_per_label: Any) -> int:
    """The number of images of each prompt.

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
    return whole("num_images", num_images)


def prompts_of(
    count: int,
    given: Sequence[Given],
    vqgan: VQGANModel,
    layout: TokenLayout,
    kind: str,
    tokenizers: Mapping[str, ConditionTokenizer],
) -> Tensor:
    """The prompts of `count` images, int64 `(N, P)`: one for all of them, or one for each; see `prompt_tokens`.

    Raises:
        ValueError: there is another number of values.
    """
    number = number_of_prompts(given)
    if number not in (1, count):
        (key, *_) = [one.key for one in given if not one.is_single]
        raise ValueError(f"{key}: received {number} values for {count} images; needs one for all, or one for each")
    return prompt_tokens(given, None, 1, vqgan, layout, kind, tokenizers).repeat(count // number, 1)


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
