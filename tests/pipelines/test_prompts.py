"""Prompts of several conditions: texts, condition images and several classes in `generate`, and their tokenizers."""

import dataclasses
import json
import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import VQGANPipeline
from pipelines.conditions import ImageTokenizer, TextTokenizer
from stage1_vqgan import VQGANConfig, VQGANImageProcessor, VQGANModel
from stage2_prior import Segment, TokenLayout
from stage2_prior.condition_text import encode_texts, train_text_tokenizer
from stage2_prior.prior import build_prior
from tests import tiny

TEXTS = ["a red cat", "a blue dog", "two red dogs", "no cat at all"]
STYLES = ("flat", "drawn", "shaded")
K, L = tiny.VQGAN["num_embeddings"], 16


def tokenizer_of(seed, image_size):
    """A random tokenizer that uses many codes, with its image processor."""
    torch.manual_seed(seed)
    model = VQGANModel(VQGANConfig(**{**tiny.VQGAN, "image_size": image_size})).eval()
    with torch.no_grad():
        latents = model.encode(torch.rand(64, 1, image_size, image_size) * 2 - 1).latents
        rows = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
        model.quantize.place_entries(rows[torch.randperm(len(rows))[:K]])
    model.config.fingerprint = model.compute_fingerprint()
    return ImageTokenizer(model, VQGANImageProcessor(image_size, 1))


@pytest.fixture(scope="module")
def parts():
    """The tokenizer of the images, that of the small images, and that of the texts."""
    return tokenizer_of(0, 16), tokenizer_of(1, 8), TextTokenizer(train_text_tokenizer(TEXTS, 300).to_str())


def make(parts, segments, class_names=("ant", "bee", "cat"), conditions=None, **fields):
    """A pipeline with a random prior over these segments."""
    own, small, text = parts
    layout = TokenLayout(K, class_names, (4, 4), 4, own.fingerprint, segments=tuple(segments), **fields)
    torch.manual_seed(2)
    prior = build_prior(tiny.RANDOM_PRIORS["llama"], layout)
    found = {"caption": text, "small": small}
    chosen = {segment.name: found[segment.name] for segment in segments if segment.name in found}
    pipeline = VQGANPipeline(own.vqgan, prior, own.image_processor, layout, chosen if conditions is None else conditions)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def segments(parts):
    own, small, text = parts
    image = {"kind": "image", "num_tokens": K, "length": 4, "grids": ((2, 2, 1),), "image_shape": (8, 8)}
    return {
        "style": Segment("style", "class", 3, class_names=STYLES),
        "caption": Segment("caption", "text", 300, 6, fingerprint=text.fingerprint),
        "small": Segment("small", fingerprint=small.fingerprint, **image),
        "corner": Segment("corner", fingerprint=own.fingerprint, **image),
    }


@pytest.fixture(scope="module")
def pipeline(parts, segments):
    return make(parts, segments.values())


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8))


def prompts_of(pipeline, monkeypatch, **asked):
    """The prompts int64 `(N, P)` that `generate` samples from."""
    seen = []
    sampled = pipeline._sampled

    def record(prompts, *args, **options):
        seen.append(prompts)
        return sampled(prompts, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_sampled", record)
        pipeline.generate(**asked, seed=0, output_type="codes")
    return seen[0].cpu()


def test_a_prompt_holds_the_tokens_of_each_condition(pipeline, parts, segments, picture, monkeypatch):
    own, small, text = parts
    layout = pipeline.layout
    asked = {"class_labels": {"class": ["cat", 0], "style": "drawn"}, "text": ["a cat", "a red dog"]}
    prompts = prompts_of(pipeline, monkeypatch, **asked, condition_images={"small": picture, "corner": picture})
    pixels = own.image_processor.__class__(8, 1)(picture)["pixel_values"]
    with torch.no_grad():
        codes = [one.vqgan.encode(pixels).codes.flatten() for one in (small, own)]
    texts = encode_texts(text.tokenizer, asked["text"], segments["caption"])
    for row, number in enumerate((2, 0)):
        ids = [torch.tensor([number, 1]), texts[row], *codes]
        assert prompts[row].tolist() == (torch.cat(ids) + layout.offsets).tolist()


def test_what_is_not_given_is_null(pipeline, monkeypatch):
    layout = pipeline.layout
    prompts = prompts_of(pipeline, monkeypatch, num_images=2)
    assert prompts.tolist() == [layout.null_prompt().tolist()] * 2
