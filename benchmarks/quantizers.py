"""Every quantizer at equal steps and bits on Fashion-MNIST:
`python -m benchmarks.quantizers --data FOLDER [--steps 100] [--bits 10]`, FOLDER with the parquet files of both splits.

`stage1_vqgan.training.train` trains the same VQ-VAE with each quantizer: without LPIPS and discriminator, with the same
seed, and with 8×8 codes of `--bits` bits (an even number) for each image; those with several codes for a position have
as many bits in all. The metrics come from the last evaluation of the run, over the whole test split. The width is the
usual one of each quantizer: channels of 4 levels for FSQ, a channel for each bit for LFQ and BSQ, 256 channels for
IBQ, whose similarities need entries of nearly equal length, and 8 channels for the others. `vq-l2` is VQ on the unit
sphere.

The time of a step is measured separately: the quantizers take turns, step by step, on one batch.
The results are `quantizers.json` and, for each quantizer, a grid of test images above their reconstructions.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from benchmarks.machine import environment
from benchmarks.measuring import interleaved, ratio, summary
from benchmarks.report import table, write
from configs import load_config
from stage1_vqgan import ImageDataset, Stage1Config, VQGANImageProcessor, VQGANModel, image_grid, load_images
from stage1_vqgan.data.samplers import some_images
from stage1_vqgan.training.run import train
from stage1_vqgan.training.step import VQGANTrainer

QUANTIZERS = (
    *("vq", "vq-l2", "ema", "simvq", "ibq", "gumbel", "fsq", "lfq", "bsq"),
    *("residual", "residual-4", "product", "pyramid"),
)
MODEL: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 1,
    "base_channels": 16,
    "channel_multiplier": [1, 2, 2],
    "num_res_blocks": 1,
    "attn_levels": [],
    "norm_num_groups": 8,
    "latent_channels": 32,
}
NUM_SHOWN = 16


def quantizer(name: str, bits: int) -> dict[str, Any]:
    """Fields of VQGANConfig for a quantizer with 64 · bits bits for each image."""
    kind, _, variant = name.partition("-")
    width = {"fsq": bits // 2, "lfq": bits, "bsq": bits, "ibq": 256}.get(kind, 8)
    bits_of_code = {"residual": bits // 2, "product": bits // 2, "pyramid": bits * 4 // 5}.get(name, bits)
    options: dict[str, dict[str, Any]] = {
        "fsq": {"levels": [4] * width},
        "residual": {"depth": 2},  # 8×8×2 codes
        "product": {"groups": 2},  # 8×8×2 codes
        "pyramid": {"hidden_channels": 32},  # 4×4 and 8×8 codes
    }
    fields = {"quantizer": kind, "embed_dim": width, "num_embeddings": 2**bits_of_code}
    if variant == "4":  # 4×4×4 codes
        return {**fields, "quantizer_options": {"depth": 4}, "channel_multiplier": [1, 2, 2, 2]}
    return {**fields, "quantizer_options": options.get(kind, {}) | ({"l2_normalize": True} if variant == "l2" else {})}


def settings(name: str, data: str, steps: int, output_dir: str, bits: int = 10) -> Stage1Config:
    """The settings of the run with one quantizer."""
    values: dict[str, Any] = {
        "output_dir": output_dir,
        "max_steps": steps,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 250,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(50, steps // 10),
        "ema_decay": 0.99,
        "eval_steps": steps,
        "save_steps": steps,
        "report_to": [],
        "model": MODEL | quantizer(name, bits),
        "data": {"dataset": data, "validation_split": "test"},
        "loss": {"perceptual_weight": 0, "adversarial_weight": 0},
        "codebook": {"restart_interval": 50},
    }
    return load_config(Stage1Config, None, values)


def test_images(config: Stage1Config) -> ImageDataset:
    """The images of the test split."""
    return ImageDataset(load_images(config.data)[1], (MODEL["image_size"],) * 2, MODEL["in_channels"])


def trained(name: str, data: str, steps: int, bits: int = 10) -> tuple[VQGANModel, dict[str, Any]]:
    """Trains a tokenizer; returns it and its metrics on the test split."""
    with tempfile.TemporaryDirectory() as folder:
        model = train(settings(name, data, steps, folder, bits))
        return model, json.loads((Path(folder) / "train_results.json").read_text())


def save_grid(model: VQGANModel, dataset: ImageDataset, path: Path) -> None:
    """Saves a grid of test images above their reconstructions."""
    originals = dataset.__getitems__(some_images(dataset.source, NUM_SHOWN)).images()
    with torch.no_grad():
        pair = torch.cat([originals, model(originals).reconstruction])
    processor = VQGANImageProcessor(dataset.image_shape, dataset.num_channels)
    image_grid(processor.postprocess(pair), len(originals), min_tile=64).save(path)


def step_times(names: list[str], data: str, rounds: int, bits: int = 10) -> dict[str, dict[str, Any]]:
    """The time of a training step with each quantizer, and its ratio to the time with VQ."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator, lanes = Accelerator(cpu=True), {}
    for name in dict.fromkeys(["vq", *names]):
        config = settings(name, data, 1000, "unused", bits)
        images = test_images(config).__getitems__(some_images(load_images(config.data)[1], 32)).images()
        trainer = VQGANTrainer(config, accelerator)
        trainer.set_learning_rate(0)
        lanes[name] = partial(trainer.step, images.contiguous(memory_format=torch.channels_last), 0)
    times = interleaved(lanes, rounds, warmup=2)
    return {name: summary(values) | {"ratio": ratio(values, times["vq"])} for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantizers", description=__doc__)
    parser.add_argument("--data", required=True, help="folder with the parquet files")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--bits", type=int, default=10, help="bits of a code, an even number")
    parser.add_argument("--rounds", type=int, default=10, help="rounds in the measurement of the time of a step")
    parser.add_argument("--quantizers", nargs="+", choices=QUANTIZERS, default=list(QUANTIZERS))
    parser.add_argument("--output_dir", default="runs/benchmarks/quantizers")
    args = parser.parse_args()
    where, folder = environment(), Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    times = step_times(args.quantizers, args.data, args.rounds, args.bits)
    results: dict[str, dict[str, Any]] = {}
    for name in args.quantizers:
        model, metrics = trained(name, args.data, args.steps, args.bits)
        results[name] = metrics | {"step": times[name]}
        print(name, metrics, flush=True)
        save_grid(model, test_images(settings(name, args.data, args.steps, "unused")), folder / f"{name}.png")
    rows = [
        {
            "quantizer": name,
            "PSNR (dB)": round(result["psnr"], 2),
            "SSIM": round(result["ssim"], 4),
            "usage": round(result["codebook_usage"], 3),
            "perplexity": round(result["codebook_perplexity"], 1),
            "step / vq": "{median} ({p10}–{p90})".format(**times[name]["ratio"]),
            "by CPU": times[name]["ratio"]["by_cpu"],
            "ms a step": times[name]["median_ms"],
            "contaminated": "yes" if times[name]["contaminated"] else "",
        }
        for name, result in results.items()
    ]
    print(table(rows))
    write(
        str(folder / "quantizers.json"),
        {"environment": where, "steps": args.steps, "bits": args.bits, "results": results},
    )


if __name__ == "__main__":
    main()
