"""Images per second of the training loader, against Pillow decoding alone on as many processes:
`python -m benchmarks.image_loading PARQUET_OR_FOLDER [--image_size 256] [--workers 1 2]`.

The loader does all that training needs: reads, decodes, crops, resizes, augments, and hands over uint8 batches. Pillow
decodes the same files from memory in as many processes, to its own image ("load") or on to an RGB array ("array"). The
three take turns, so that what else the machine does meets all of them; medians over the rounds are compared.
"""

import argparse
import io
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image

from stage1_vqgan import AugmentationConfig, DataConfig, ImageDataset, Images, ImageSource, TrainingSampler, load_images
from stage1_vqgan.data import training_loader
from stage1_vqgan.decoding import read


def load(content: bytes) -> None:
    """Pillow's own image."""
    Image.open(io.BytesIO(content)).load()


def array(content: bytes) -> None:
    """An RGB array."""
    np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def decoding_rate(decoder: Callable[[bytes], None], contents: Sequence[bytes], processes: int, seconds: float) -> float:
    """Images per second of all processes together, each busy for some seconds after a warm-up."""
    with multiprocessing.get_context("fork").Pool(processes, torch.set_num_threads, (1,)) as pool:
        results = [pool.apply_async(_decode_for, (decoder, contents, seconds)) for _ in range(processes)]
        return sum(result.get() for result in results)


def _decode_for(decoder: Callable[[bytes], None], contents: Sequence[bytes], seconds: float) -> float:
    for content in contents[:50]:
        decoder(content)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        decoder(contents[count % len(contents)])
        count += 1
    return count / (time.perf_counter() - started)


def loading_rate(dataset: ImageDataset, batch_size: int, workers: int, seconds: float) -> float:
    """Images per second that leave the training loader, from a warm start."""
    sampler = TrainingSampler(dataset.source.num_images or 0, batch_size, 0, 10**6, seed=0)
    batches = iter(training_loader(dataset, sampler, workers, pin_memory=False))
    for _ in range(4 * workers):  # until the workers have started and what they had prepared meanwhile is used up
        next(batches)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        count += len(next(batches).pixels)
    return count / (time.perf_counter() - started)


def measure(source: Images, args: argparse.Namespace, workers: int) -> dict[str, float]:
    """Medians of the three rates, and the loader's share of each of Pillow's."""
    augmentation = AugmentationConfig(max_zoom=args.max_zoom, random_crop=True, horizontal_flip=True)
    dataset = ImageDataset(source, args.image_size, 3, augmentation, keep_batch_size=True)
    assert isinstance(source, ImageSource)
    files = [encoded.content for encoded in source.encoded(range(min(len(source), 1000)))]
    contents = [read(content) for content in files if not isinstance(content, Image.Image)]
    rates: dict[str, list[float]] = {"load": [], "array": [], "loader": []}
    for _ in range(args.rounds):
        rates["load"].append(decoding_rate(load, contents, workers, args.seconds))
        rates["array"].append(decoding_rate(array, contents, workers, args.seconds))
        rates["loader"].append(loading_rate(dataset, args.batch_size, workers, args.seconds))
    medians = {f"{name}_per_second": round(statistics.median(values), 1) for name, values in rates.items()}
    ratios = {
        f"loader/{name}": round(statistics.median(a / b for a, b in zip(rates["loader"], rates[name], strict=True)), 3)
        for name in ("load", "array")
    }
    return {"workers": workers, **medians, **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.image_loading", description=__doc__)
    parser.add_argument("dataset", help="a parquet file or a folder of images")
    parser.add_argument("--image_size", type=int, default=256)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--max_zoom", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    args = parser.parse_args()
    source, _ = load_images(DataConfig(dataset=args.dataset, use_labels=False))
    torch.set_num_threads(1)
    for workers in args.workers:
        print(json.dumps(measure(source, args, workers)), flush=True)


if __name__ == "__main__":
    main()
