"""Encoding of JPEG files into a code store, compared with a plain loop over `datasets` and a DataLoader.

Without `--data`, the images are tiles of scikit-learn's two photographs. The loop uses the same tokenizer and image
processor: `Dataset.with_transform`, a DataLoader with equally many processes, `encode`, `numpy.save`. All of its codes
are compared with those of the store, in float32.
"""

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks import tokenizer
from benchmarks.case import OURS, Case, Prepared
from benchmarks.machine import full_precision
from configs import load_config
from stage1_vqgan import VQGANImageProcessor, VQGANModel
from stage2_prior import Stage2Config
from stage2_prior.tokenize import tokenize

PLAIN = "plain loop"
NUM_TILES = {"cpu": 96, "gpu": 4096, "tiny": 24}
BATCH = {"cpu": 16, "gpu": 128, "tiny": 8}
TILE = 288
HELD_OUT = 0.05  # every 20th image


class Material:
    """A saved tokenizer and a parquet file of JPEGs, in a temporary folder that is removed with this object."""

    def __init__(self, suite: str, data: str | None):
        self.folder = tempfile.TemporaryDirectory()
        root = Path(self.folder.name)
        self.suite, self.tokenizer, self.workers = suite, str(root / "vqgan"), min(16, os.cpu_count() or 1)
        model = tokenizer.tokenizer(suite)
        model.save_pretrained(self.tokenizer)
        VQGANImageProcessor(model.config.image_size, model.config.in_channels).save_pretrained(self.tokenizer)
        self.data = data or str(write_tiles(root / "tiles", NUM_TILES[suite]))
        self.count = len(self.images())

    def images(self) -> datasets.Dataset:
        """All images, not decoded."""
        path = Path(self.data)
        files = [str(path)] if path.is_file() else sorted(map(str, path.glob("*.parquet")))
        return datasets.load_dataset("parquet", data_files=files, split="train").cast_column("image", datasets.Image())


def write_tiles(folder: Path, count: int) -> Path:
    """Writes a parquet file of JPEGs; returns its path."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(array) for array in load_sample_images().images]
    places, contents = np.random.default_rng(0), []
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        left, top = (int(places.integers(side - TILE + 1)) for side in photograph.size)
        buffer = io.BytesIO()
        photograph.crop((left, top, left + TILE, top + TILE)).save(buffer, "JPEG", quality=92)
        contents.append({"bytes": buffer.getvalue(), "path": f"{number}.jpg"})
    folder.mkdir()
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": contents}, features=features).to_parquet(folder / "train.parquet")
    return folder


def store(material: Material) -> np.ndarray:
    """Encodes with this project; returns codes `(N, h · w)`, in the order of the images."""
    with tempfile.TemporaryDirectory(dir=material.folder.name) as folder, contextlib.redirect_stdout(io.StringIO()):
        values: dict[str, Any] = {
            "max_steps": 1,  # required, but no prior is trained
            "model": {"model_type": "llama"},
            "tokenizer": material.tokenizer,
            "code_store": f"{folder}/codes",
            "output_dir": f"{folder}/prior",
            "tokenize_batch_size": BATCH[material.suite],
            "dataloader_num_workers": material.workers,
            "num_views": 1,
            "data": {"dataset": material.data, "use_labels": False, "validation_fraction": HELD_OUT},
        }
        made = tokenize(load_config(Stage2Config, None, values))
        held_out = np.arange(material.count) % round(1 / HELD_OUT) == 0
        codes = np.empty((material.count, made.layout.length), np.uint16)
        for name, rows in (("train", ~held_out), ("validation", held_out)):
            split = made.split(name)
            codes[rows] = split.read(np.arange(len(split)))[0]
        return codes


class Transform:
    """Prepares images for the tokenizer. It is a class, because worker processes need to pickle it."""

    def __init__(self, processor: VQGANImageProcessor):
        self.processor = processor

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        return {"pixel_values": list(self.processor(rows["image"])["pixel_values"])}


def plain_loop(material: Material, device: torch.device) -> np.ndarray:
    """Encodes with the plain loop; returns codes `(N, h · w)`."""
    model = VQGANModel.from_pretrained(material.tokenizer).to(device).eval()
    processor = VQGANImageProcessor.from_pretrained(material.tokenizer)
    rows: Any = material.images().with_transform(Transform(processor))
    loader = DataLoader(rows, BATCH[material.suite], num_workers=material.workers, pin_memory=device.type == "cuda")
    codes = []
    with torch.inference_mode():
        for batch in loader:
            codes.append(model.encode(batch["pixel_values"].to(device, non_blocking=True)).codes.flatten(1).cpu())
    array = torch.cat(codes).numpy().astype(np.uint16)
    np.save(Path(material.folder.name) / "codes.npy", array)
    return array


LANES = {OURS: lambda material, device: store(material), PLAIN: plain_loop}


def prepared(lane: str, suite: str, data: str | None, device: torch.device) -> Prepared:
    """Prepares a lane with its own files."""
    datasets.disable_progress_bars()
    return quiet(partial(LANES[lane], Material(suite, data), device))


def quiet(call: Prepared) -> Prepared:
    """The same call without its progress bar."""

    def without_bar() -> Any:
        with contextlib.redirect_stderr(io.StringIO()):
            return call()

    return without_bar


def agree(suite: str, data: str | None, device: torch.device) -> Mapping[str, Any]:
    """Fraction of the codes that differ.

    Raises:
        AssertionError: more than one in a thousand differs.
    """
    material = Material(suite, data)
    with full_precision():
        ours, theirs = (quiet(partial(lane, material, device))() for lane in LANES.values())
    different = float((ours != theirs).mean())
    assert ours.shape == theirs.shape and different <= 1e-3, (ours.shape, theirs.shape, different)
    assert len(np.unique(ours)) > 16, "the images have hardly any codes to compare"
    return {"images": len(ours), "different codes": different}


def cases(suite: str, device: torch.device, data: str | None) -> Iterator[Case]:
    """One case: all images once, in float32."""
    count = Material(suite, data).count if data else NUM_TILES[suite]
    size = tokenizer.configuration(suite).image_size
    yield Case(
        row="tokenization",
        setting=f"{count} JPEGs, f16, {size}²",
        lanes={lane: partial(prepared, lane, suite, data, device) for lane in LANES},
        agree=partial(agree, suite, data, device),
        unit="images/s",
        count=count,
    )
