"""Speed of the training loader, compared with decoding alone by Pillow in equally many processes:
`python -m benchmarks.image_loading PARQUET_OR_FOLDER [--image_size 256] [--workers 1 2]`.

"loader" is the loader of a training run. Its workers read, decode, crop and flip images, resize large crops, and
send uint8 batches. `ImageBatch.images` resizes the other crops on the model's device. "loader_and_images" includes
this call, on the CPU, in the process that receives the batches. Pillow decodes the same files from memory, into its own
image ("load") or into an RGB array ("array").

The lanes take turns, so that other load on the machine affects all of them, and medians over the rounds are compared.
`_cpu_ms` is the CPU time of the decoding processes in milliseconds per image. Other load changes it much less than the
images per second.
"""

import argparse
import io
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import psutil
import torch
from PIL import Image

from stage1_vqgan import AugmentationConfig, DataConfig, ImageDataset, Images, ImageSource, TrainingSampler, load_images
from stage1_vqgan.data.decoding import read
from stage1_vqgan.data.loading import training_loader


def load(content: bytes) -> None:
    """Decodes into an image of Pillow."""
    Image.open(io.BytesIO(content)).load()


def array(content: bytes) -> None:
    """Decodes into an RGB array."""
    np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


class Speed(NamedTuple):
    """Images per second of all processes together, and CPU time in milliseconds per image."""

    per_second: float
    cpu_ms: float


def decoding_speed(
    decoder: Callable[[bytes], None], contents: Sequence[bytes], processes: int, seconds: float
) -> Speed:
    """Speed of several processes. Each decodes for `seconds` after a warm-up."""
    with multiprocessing.get_context("fork").Pool(processes, torch.set_num_threads, (1,)) as pool:
        results = [pool.apply_async(_decode_for, (decoder, contents, seconds)) for _ in range(processes)]
        speeds = [result.get() for result in results]
    return Speed(sum(speed.per_second for speed in speeds), statistics.mean(speed.cpu_ms for speed in speeds))


def _decode_for(decoder: Callable[[bytes], None], contents: Sequence[bytes], seconds: float) -> Speed:
    for content in contents[:50]:
        decoder(content)
    count, started, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - started < seconds:
        decoder(contents[count % len(contents)])
        count += 1
    return Speed(count / (time.perf_counter() - started), 1000 * (time.process_time() - cpu) / count)


def loading_speed(dataset: ImageDataset, batch_size: int, workers: int, seconds: float, images: bool) -> Speed:
    """Speed of the training loader after a warm-up; with `images`, it includes `ImageBatch.images` on the CPU."""
    sampler = TrainingSampler(dataset.source.num_images or 0, batch_size, 0, 10**6, seed=0)
    batches = iter(training_loader(dataset, sampler, workers, pin_memory=False))
    for _ in range(4 * workers):  # wait for the workers to start, and use up the batches that they prepared meanwhile
        next(batches)
    count, started, cpu = 0, time.perf_counter(), _cpu_of_children()
    while time.perf_counter() - started < seconds:
        batch = next(batches)
        if images:
            batch.images()
        count += len(batch.indices)
    return Speed(count / (time.perf_counter() - started), 1000 * (_cpu_of_children() - cpu) / count)


def _cpu_of_children() -> float:
    times = [child.cpu_times() for child in psutil.Process().children()]
    return sum(part.user + part.system for part in times)


def measure(source: Images, args: argparse.Namespace, workers: int) -> dict[str, float]:
    """Medians of the speeds, and the ratio of the loader's speed to each of Pillow's."""
    augmentation = AugmentationConfig(max_zoom=args.max_zoom, random_crop=True, horizontal_flip=True)
    dataset = ImageDataset(source, (args.image_size, args.image_size), 3, augmentation, keep_batch_size=True)
    assert isinstance(source, ImageSource)
    files = [encoded.content for encoded in source.encoded(range(min(len(source), 1000)))]
    contents = [read(content) for content in files if isinstance(content, bytes | str)]
    ways: dict[str, Callable[[], Speed]] = {
        "load": lambda: decoding_speed(load, contents, workers, args.seconds),
        "loader": lambda: loading_speed(dataset, args.batch_size, workers, args.seconds, images=False),
        "array": lambda: decoding_speed(array, contents, workers, args.seconds),
        "loader_and_images": lambda: loading_speed(dataset, args.batch_size, workers, args.seconds, images=True),
    }
    rounds = [{name: way() for name, way in ways.items()} for _ in range(args.rounds)]
    result: dict[str, float] = {"workers": workers}
    for name in ways:
        result[f"{name}_per_second"] = round(statistics.median(speeds[name].per_second for speeds in rounds), 1)
        result[f"{name}_cpu_ms"] = round(statistics.median(speeds[name].cpu_ms for speeds in rounds), 3)
    for name in ("load", "array"):
        of_rate = statistics.median(speeds["loader"].per_second / speeds[name].per_second for speeds in rounds)
        of_cpu = statistics.median(speeds[name].cpu_ms / speeds["loader"].cpu_ms for speeds in rounds)
        result |= {f"loader/{name}": round(of_rate, 3), f"loader/{name}_by_cpu": round(of_cpu, 3)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.image_loading", description=__doc__)
    parser.add_argument("dataset", help="a parquet file or a folder of images")
    parser.add_argument("--image_size", type=int, default=256)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--max_zoom", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="duration of each measurement")
    args = parser.parse_args()
    source, _ = load_images(DataConfig(dataset=args.dataset, use_labels=False))
    torch.set_num_threads(1)
    for workers in args.workers:
        print(json.dumps(measure(source, args, workers)), flush=True)


if __name__ == "__main__":
    main()
