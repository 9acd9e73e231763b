"""Compression by a prior, compared with JPEG and WebP: `python -m benchmarks.compression PIPELINE --data DATA`.

All images are compressed together. JPEG and WebP get one picture with all of them, so that their headers, too, serve
all images. Each codec takes the best quality that is not larger than our bytes, and the lowest quality that is not
worse than our reconstructions. The PSNR is that of the mean squared error over all pixels.
"""

import argparse
import io
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from benchmarks.images import add_arguments, load_pipeline, read_split
from benchmarks.machine import environment
from benchmarks.report import table, write
from configs.files import write_png
from pipelines import VQGANPipeline
from stage1_vqgan import image_grid, labelled_grid

QUALITIES = {"JPEG": range(1, 96), "WEBP": range(0, 101)}
OPTIONS: dict[str, dict[str, Any]] = {"JPEG": {"optimize": True}, "WEBP": {"method": 6}}
SHOWN = 10  # images in the picture


class Result(NamedTuple):
    """What a codec makes of a picture."""

    name: str
    size: int  # bytes
    psnr: float  # dB
    picture: Image.Image


def mosaic(images: list[Image.Image]) -> Image.Image:
    """All images in one picture that is about square, without gaps."""
    return image_grid(images, columns=math.ceil(math.sqrt(len(images))), gap=0)


def tiles(picture: Image.Image, like: Image.Image, count: int) -> list[Image.Image]:
    """The first images of a mosaic."""
    columns = picture.width // like.width
    corners = [((n % columns) * like.width, (n // columns) * like.height) for n in range(count)]
    return [picture.crop((x, y, x + like.width, y + like.height)) for x, y in corners]


def psnr(one: list[Image.Image], other: list[Image.Image]) -> float:
    """Peak signal-to-noise ratio in dB of all images together."""
    errors = [np.square(np.asarray(a, float) - np.asarray(b, float)).mean() for a, b in zip(one, other, strict=True)]
    return 10 * math.log10(255**2 / float(np.mean(errors)))


def coded(images: list[Image.Image], codec: str, quality: int) -> Result:
    """A mosaic of the images at one quality."""
    picture, file = mosaic(images), io.BytesIO()
    picture.save(file, codec, quality=quality, **OPTIONS[codec])
    decoded = Image.open(file).convert(picture.mode)
    made = tiles(decoded, images[0], len(images))
    return Result(f"{codec}, quality {quality}", file.tell(), psnr(images, made), decoded)


def search(images: list[Image.Image], codec: str, fits: Callable[[Result], bool]) -> Result:
    """The first quality, from the lowest up, that does not fit any more; or the highest, if all fit."""
    low, high = 0, len(QUALITIES[codec]) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(coded(images, codec, QUALITIES[codec][middle])) else (low, middle)
    return coded(images, codec, QUALITIES[codec][low])


def at_size(images: list[Image.Image], codec: str, size: int) -> Result:
    """The best quality that is not larger than `size` bytes; the lowest quality, if all are larger."""
    found = search(images, codec, lambda result: result.size <= size)
    quality = int(found.name.rpartition(" ")[2])
    return found if found.size <= size or quality == QUALITIES[codec][0] else coded(images, codec, quality - 1)


def at_psnr(images: list[Image.Image], codec: str, least: float) -> Result:
    """The lowest quality with at least this PSNR; the highest quality, if none has it."""
    return search(images, codec, lambda result: result.psnr < least)


def ours(pipe: VQGANPipeline, codes: torch.Tensor, labels: list[str] | None) -> dict[str, Any]:
    """Bytes, seconds and score of our compression.

    Raises:
        AssertionError: the codes did not survive.
    """
    start = time.perf_counter()
    data = pipe.compress(codes=codes, class_labels=labels)
    compressed = time.perf_counter()
    assert torch.equal(pipe.decompress(data, "codes").cpu(), codes), "the codes have changed"
    end = time.perf_counter()
    label_bits = 0.0 if labels is None else len(codes) * math.log2(pipe.layout.num_classes)
    score_bits = pipe.score(codes=codes, class_labels=labels).nats.sum().item() / math.log(2) + label_bits
    return {
        "bytes": len(data),
        "score_bytes": score_bits / 8,
        "compress_seconds": round(compressed - start, 2),
        "decompress_seconds": round(end - compressed, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compression", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--output_dir", default="runs/benchmarks/compression")
    args = parser.parse_args()
    pipe = load_pipeline(args)
    images, codes, names = read_split(pipe, args.data, args)
    labels = names if names is not None and set(names) <= set(pipe.class_names) else None
    variants = {"codes by the prior": ours(pipe, codes, None)} if pipe.layout.has_null else {}
    if labels is not None:
        variants["codes and labels by the prior"] = ours(pipe, codes, labels)
    size = min(variant["bytes"] for variant in variants.values())
    reconstructions = [image.convert(images[0].mode) for image in pipe.decode(codes)]
    quality = psnr(images, reconstructions)
    others = [found for codec in QUALITIES for found in (at_size(images, codec, size), at_psnr(images, codec, quality))]
    plain = math.ceil(len(codes) * pipe.layout.length * math.log2(pipe.layout.num_codes) / 8)
    rows = [
        ("codes, log2 K bits each", plain, quality),
        *((name, variant["bytes"], quality) for name, variant in variants.items()),
        *((found.name, found.size, found.psnr) for found in others),
    ]
    pixels = len(images) * pipe.layout.pixels
    lines = [
        {"codec": name, "bits/pixel": round(8 * count / pixels, 4), "bytes": count, "PSNR": round(value, 2)}
        for name, count, value in rows
    ]
    print(table(lines))
    shown = [("original", images[:SHOWN]), (f"codes, {size:,} bytes", reconstructions[:SHOWN])]
    shown += [(f"{found.name}, {found.size:,}", tiles(found.picture, images[0], SHOWN)) for found in others]
    folder = Path(args.output_dir)
    result = {"environment": environment(), "data": args.data, "images": len(images), "ours": variants, "rows": lines}
    write(folder / "compression.json", result)
    write_png(folder / "compression.png", labelled_grid(shown, columns=SHOWN))


if __name__ == "__main__":
    main()
