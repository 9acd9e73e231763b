"""Super-resolution, colourisation and other conditions that are made from the image: how well the result fits them.

    python -m benchmarks.restoration PIPELINE --data DATA --validation_split test

The pipeline has one condition, a transform of the image, such as `downscale 4` or `gray`. Held-out images are
transformed; the pipeline generates an image for each result, with no sight of the original.

| column | meaning |
| --- | --- |
| condition | PSNR in dB of the transformed output against the condition: how well the output agrees with its input |
| original | PSNR in dB of the output against the original image; a sharp guess costs more here than a blurred one |
| features | distance to the original image, 1 - cosine of the features of EfficientNet-Lite0; no training used these |
| colour | mean difference of the largest and the smallest channel; of images with three channels |

The other rows are base lines: bicubic enlargement, the condition itself, and the original image through the tokenizer,
which is about the best that this pipeline can reach.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.emoji import Features
from benchmarks.images import add_arguments, load_pipeline, read_split
from benchmarks.machine import environment
from benchmarks.report import table, write
from configs.files import write_png
from pipelines import VQGANPipeline
from stage1_vqgan import labelled_grid
from stage2_prior.condition_images import apply_transform

SHOWN = 12  # images in a row of the picture


def pixels_of(images: list[Image.Image]) -> Tensor:
    """Images as float `(N, C, H, W)` in [-1, 1]."""
    arrays = [np.asarray(image, np.float32) for image in images]
    return torch.stack([torch.from_numpy(np.atleast_3d(array)).permute(2, 0, 1) / 127.5 - 1 for array in arrays])


def psnr(one: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of all images together, of pixels in [-1, 1]."""
    return float(10 * torch.log10(4 / (one - other).square().mean()))


def colour(pixels: Tensor) -> float:
    """Mean difference of the largest and the smallest channel, 0 (gray) to 1."""
    return float((pixels.amax(1) - pixels.amin(1)).mean() / 2)


def restored(pipe: VQGANPipeline, conditions: list[Image.Image], args: argparse.Namespace) -> list[Image.Image]:
    """One image for each condition."""
    options = {"guidance_scale": args.guidance_scale, "temperature": args.temperature, "seed": 0}
    return pipe.generate(condition_images=conditions, **options).images


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.restoration",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmarks/restoration"))
    args = parser.parse_args()
    pipe = load_pipeline(args)
    transforms = [segment.transform for segment in pipe.layout.segments if segment.transform]
    if len(transforms) != 1 or len(pipe.layout.conditions) != 1:
        raise SystemExit(f"{args.pipeline}: its conditions are not one transform of the image")
    transform = transforms[0]
    originals = read_split(pipe, args.data, args, use_labels=False).images
    real = pixels_of(originals)
    small = apply_transform(transform, real)
    conditions = pipe.image_processor.postprocess(small)
    size = originals[0].size
    kinds = {
        "generated": restored(pipe, conditions, args),
        "bicubic" if small.shape != real.shape else "the condition": [
            image.resize(size, Image.Resampling.BICUBIC) for image in conditions
        ],
        "through the tokenizer": pipe.reconstruct(originals),
    }
    features = Features()
    of_real = features([image.convert("RGB") for image in originals])
    rows: list[dict[str, Any]] = []
    for name, images in kinds.items():
        pixels = pixels_of([image.convert(originals[0].mode) for image in images])
        of_images = features([image.convert("RGB") for image in images])
        row = {
            "": name,
            "condition": round(psnr(apply_transform(transform, pixels), small), 2),
            "original": round(psnr(pixels, real), 2),
            "features": round(float(1 - (of_images * of_real).sum(1).mean()), 3),
        }
        rows.append(row | ({"colour": round(colour(pixels), 3)} if real.shape[1] == 3 else {}))
    print(table(rows))
    result = {"environment": environment(), "settings": str(vars(args)), "images": len(originals), "rows": rows}
    write(args.output_dir / "restoration.json", result)
    chosen = np.linspace(0, len(originals) - 1, SHOWN).astype(int)
    enlarged = [image.resize(size, Image.Resampling.NEAREST) for image in conditions]
    shown = {"condition": enlarged, **kinds, "original": originals}
    lines = [(name, [images[number].convert("RGB") for number in chosen]) for name, images in shown.items()]
    write_png(args.output_dir / "restoration.png", labelled_grid(lines, SHOWN))


if __name__ == "__main__":
    main()
