"""What the demo app does with a request. Errors are ValueErrors whose text is for the visitor of the page."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from configs import ConfigError, Problem
from configs.arguments import whole
from pipelines.demo.mosaic import mosaics
from pipelines.pipeline_vqgan import VQGANPipeline
from stage1_vqgan.data.decoding import EncodedImage, decode
from stage1_vqgan.reconstruction import peak_signal_to_noise
from stage2_prior import UnmaskingOptions

ADVICE = "Upload a picture as PNG, JPEG, WebP or TIFF."
LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True)
class Reconstruction:
    """An image on its way through the tokenizer.

    Attributes:
        original: the image as the tokenizer sees it, a square.
        reconstruction: the image that the tokenizer decodes from the codes.
        mosaic: the codes, one coloured tile for each.
        facts: what the page says about them, in Markdown.
    """

    original: Image.Image
    reconstruction: Image.Image
    mosaic: Image.Image
    facts: str


def require_classes_only(pipeline: VQGANPipeline) -> None:
    """Refuses a prior with further conditions, for which the page has no inputs.

    Raises:
        ConfigError: names them.
    """
    if segments := pipeline.layout.segments:
        names = ", ".join(segment.summary for segment in segments)
        advice = "the page asks for classes only; use tessella generate, or VQGANPipeline.generate"
        raise ConfigError([Problem("pipeline", f"received a prior with further conditions, {names}; {advice}")])


def can_guide(pipeline: VQGANPipeline) -> bool:
    """Whether guidance changes anything: the prior knows classes, and images of no given class."""
    return bool(pipeline.class_names) and pipeline.layout.has_null


def generate(
    pipeline: VQGANPipeline,
    most: int,
    classes: Sequence[int],
    count: int,
    seed: int,
    guidance_scale: float,
    report: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> list[tuple[Image.Image, str]]:
    """Generates images. The n-th image has the seed `seed` + n, so that it can be asked for alone.

    Args:
        pipeline: the pipeline.
        most: upper limit of the images.
        classes: ids; without any, images of no given class, which are not guided.
        count: images of each class.
        seed: seed of the first image.
        guidance_scale: see `VQGANPipeline.generate`.
        report: called after each step with the work that is done, and all work: numbers of codes, or, with a masked
            prior, of steps for an image.
        **options: temperature and filters, see `VQGANPipeline.generate`.

    Returns:
        The images, each with a caption: its class and seed.

    Raises:
        ValueError: more images than `most`, no class for a prior that needs one, or a value out of range.
    """
    count, seed = whole("images", count, most=most), whole("seed", seed, least=0, most=LARGEST_SEED)
    if len(classes) * count > most:
        raise ValueError(f"{len(classes)} classes with {count} images each are too many; allowed are {most} images")
    if not classes and not pipeline.layout.has_null:
        raise ValueError("Choose at least one class; this prior was not trained to do without.")
    length = pipeline.layout.length
    unmasking = UnmaskingOptions(num_steps=pipeline.sampling_defaults.get("num_steps"))
    steps = unmasking.steps(length) if pipeline.layout.family == "masked" else length
    total = len(classes or [0]) * count * steps
    sampled = 0

    def step(position: int, codes: Tensor) -> None:
        nonlocal sampled
        sampled += len(codes)
        report(sampled, total)

    asked = {"class_labels": classes, "num_images_per_label": count, "guidance_scale": guidance_scale}
    out = pipeline.generate(
        **(asked if classes else {"num_images": count}), seed=seed, callback_on_step_end=step, **options
    )
    names = [f"{name} · " for name in out.labels or []] or [""] * count
    return [
        (image, f"{name}seed {number}")
        for number, (image, name) in enumerate(zip(out.images, names, strict=True), seed)
    ]


def reconstruct(pipeline: VQGANPipeline, content: bytes | None) -> Reconstruction:
    """Sends an uploaded image through the tokenizer.

    Args:
        pipeline: the pipeline.
        content: the bytes of a file.

    Raises:
        ValueError: there is no file, it is no image that can be decoded, or it has too many pixels.
    """
    if content is None:
        raise ValueError("Choose an image first.")
    try:
        image = decode(EncodedImage("upload", content))
        pixels = pipeline.image_processor(image)["pixel_values"]
    except ValueError as error:
        raise ValueError(f"This file cannot be used: {error}. {ADVICE}") from error
    codes = pipeline.encode(image)
    decoded = pipeline.decode(codes, "pt").cpu() * 2 - 1
    original, reconstruction = pipeline.image_processor.postprocess(torch.cat([pixels, decoded]))
    facts = "\n".join(f"- {fact}" for fact in [*_of_image(image), *_of_codes(pipeline, codes, pixels, decoded)])
    return Reconstruction(original, reconstruction, mosaics(codes[0].cpu().numpy(), pipeline.layout.all_grids), facts)


def _of_image(image: Image.Image) -> list[str]:
    frames = getattr(image, "n_frames", 1)
    first = f"; the first of {frames} frames" if frames > 1 else ""
    return [f"**Upload**: {image.width}×{image.height} pixels, {image.format} ({image.mode}){first}"]


def _of_codes(pipeline: VQGANPipeline, codes: Tensor, pixels: Tensor, decoded: Tensor) -> list[str]:
    count, different, num_codes = codes.numel(), len(codes.unique()), pipeline.layout.num_codes
    return [
        f"**Codes**: {count} in a grid of {pipeline.layout.codes_text}; {different} different ones of the "
        f"{num_codes} in the codebook",
        f"**PSNR** of the reconstruction: {peak_signal_to_noise(decoded, pixels).item():.1f} dB (higher is closer)",
    ]
