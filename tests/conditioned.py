"""A small data set of colour images with classes, texts and a second image, and settings of conditions on it."""

import io
from contextlib import contextmanager

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from configs import load_config
from stage1_vqgan import VQGANConfig, VQGANImageProcessor, VQGANModel
from stage2_prior import Stage2Config
from tests import tiny

SIZE = 16
TRAIN, VALIDATION = 30, 6
STYLES, WORDS = ("drawn", "flat", "shaded"), ("red", "green", "blue", "a circle", "a square", "and", "dotted")
AUGMENTATION = {"max_zoom": 1.3, "random_crop": True, "horizontal_flip": True, "rotate": 10}
ALL = {
    "style": {"kind": "class", "column": "style"},
    "text": {"column": "text", "max_tokens": 4, "vocab_size": 270},
    "gray": {"transform": "gray"},
    "small": {"transform": "downscale 2"},
    "twin": {"kind": "image", "column": "twin"},
}


@contextmanager
def prepared(folder):
    """Inside this context, the folder holds the data and two tokenizers, and `datasets` keeps its cache there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        datasets.disable_progress_bars()
        write_data(folder / "data")
        save_tokenizer(folder / "vqgan")
        save_tokenizer(folder / "own", 8, seed=1)
        yield folder


def image_bytes(rng):
    """A PNG of coloured noise on a coarse grid."""
    buffer, noise = io.BytesIO(), rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((24, 20)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write_data(folder, twin=None, **columns):
    """Writes train.parquet and validation.parquet, and returns the columns of both.

    Args:
        folder: folder of the files.
        twin: makes the second image from the number and the first one; by default it is the same.
        columns: other values of a column, by the name of the split.
    """
    rng, written = np.random.default_rng(0), {}
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "twin": datasets.Image(),
            "label": datasets.ClassLabel(names=["left", "right"]),
            "style": datasets.ClassLabel(names=list(STYLES)),
            "word": datasets.Value("string"),
            "text": datasets.Value("string"),
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", TRAIN), ("validation", VALIDATION)):
        images = [image_bytes(rng) for _ in range(count)]
        texts = [" ".join(rng.choice(WORDS, rng.integers(1, 4))) for _ in range(count)]
        rows = {
            "image": images,
            "twin": [image if twin is None else twin(number, image) for number, image in enumerate(images)],
            "label": [number % 2 for number in range(count)],
            "style": [number % 3 for number in range(count)],
            "word": [STYLES[number % 3] for number in range(count)],
            "text": [*texts[:-2], "", None],
        }
        written[split] = rows | {name: values[split] for name, values in columns.items() if split in values}
        datasets.Dataset.from_dict(written[split], features=features).to_parquet(folder / f"{split}.parquet")
    return written


def save_tokenizer(folder, size=SIZE, seed=0, **changes):
    """Saves a random tokenizer of colour images."""
    torch.manual_seed(seed)
    model = VQGANModel(VQGANConfig(**{**tiny.VQGAN, "in_channels": 3, "image_size": size, **changes}))
    model.save_pretrained(folder)
    size = {"height": size, "width": size}
    VQGANImageProcessor(size=size, num_channels=model.config.in_channels).save_pretrained(folder)
    return str(folder)


def settings(root, name, conditions, **changes):
    """The settings of a run whose data and tokenizer are in `root`, and whose results go to the folder `name`."""
    values = {
        "tokenizer": str(root / "vqgan"),
        "code_store": str(root / name / "codes"),
        "output_dir": str(root / name / "prior"),
        "data": {
            "dataset": str(root / "data"),
            "validation_split": "validation",
            "image_column": "image",
            "label_column": "label",
        },
        "conditions": conditions,
        "tokenize_batch_size": 16,
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "num_sample_images": 0,
        "report_to": [],
        "model": dict(tiny.LLAMA),
    }
    return load_config(Stage2Config, overrides={**values, **changes})
