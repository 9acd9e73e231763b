"""What is asked of `VQGANPipeline.generate`: which images, and whether the prior and the memory allow them."""

from typing import Any

import torch
from torch import Tensor

from configs.arguments import described, whole
from configs.memory import shortage
from configs.randomness import draw_seeds
from pipelines.arguments import listed_labels
from pipelines.chunks import bytes_of_image
from stage1_vqgan import VQGANModel
from stage2_prior import SamplingOptions, TokenLayout, UnmaskingOptions

LARGEST_SEED = 2**63 - 1


def require_conditions(layout: TokenLayout, options: SamplingOptions, has_labels: bool) -> None:
    """Checks that the prior has the null token if guidance or unconditional images need it.

    Raises:
        ValueError: it has none, or guidance has no labels.
    """
    if not layout.has_null and (options.guided or not has_labels):
        what = "guidance_scale" if has_labels else "class_labels"
        raise ValueError(
            f"{what}: this prior was trained without condition dropout, so it has not learnt the null token; "
            "it needs class_labels and guidance_scale 1.0"
        )
    if options.guided and not has_labels:
        raise ValueError(f"guidance_scale: received {options.guidance_scale}; guidance needs class_labels (or use 1.0)")


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


def condition_tokens(
    class_labels: Any, num_images: Any, num_images_per_label: Any, vqgan: VQGANModel, layout: TokenLayout, kind: str
) -> Tensor:
    """The condition tokens of the images that are asked for, int64 `(N, 1)`.

    Args:
        class_labels, num_images, num_images_per_label: see `VQGANPipeline.generate`.
        vqgan: the tokenizer.
        layout: the token layout.
        kind: the `output_type` of the images.

    Raises:
        ValueError: the arguments contradict each other, a label is unknown, or the images do not fit in memory.
    """
    each = whole("num_images_per_label", num_images_per_label)
    if class_labels is None:
        if each != 1:
            advice = "needs class_labels (use num_images for unconditional images)"
            raise ValueError(f"num_images_per_label: received {described(each)}; {advice}")
        count = 1 if num_images is None else whole("num_images", num_images)
        require_memory("num_images", count, count, layout.pixels, vqgan, layout, kind)
        return torch.full((count, 1), layout.null_token)
    if num_images is not None:
        advice = "cannot be given with class_labels (use num_images_per_label)"
        raise ValueError(f"num_images: received {described(num_images)}; {advice}")
    labels = listed_labels(class_labels)
    require_memory("class_labels", class_labels, len(labels), layout.pixels, vqgan, layout, kind)
    ids = layout.class_ids(labels)
    require_memory("num_images_per_label", each, each * len(ids), layout.pixels, vqgan, layout, kind)
    return layout.class_tokens(ids.repeat_interleave(each))[:, None]


def label_of_each(class_labels: Any, count: int) -> list[Any]:
    """Labels of `count` images, from one label for all of them or one for each.

    Raises:
        ValueError: there is another number of labels.
    """
    labels = listed_labels(class_labels)
    if len(labels) not in (1, count):
        raise ValueError(
            f"class_labels: received {len(labels)} labels for {count} images; needs one for all, or one for each"
        )
    return [*labels] * (count // len(labels))


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
