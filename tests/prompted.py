"""Random pipelines with several conditions: classes, a text, and condition images with and without a tokenizer."""

import torch

from pipelines import VQGANPipeline
from pipelines.conditions import ImageTokenizer, TextTokenizer
from stage1_vqgan import VQGANConfig, VQGANImageProcessor, VQGANModel
from stage2_prior import Segment, TokenLayout
from stage2_prior.condition_text import train_text_tokenizer
from stage2_prior.prior import build_prior
from tests import tiny

TEXTS = ["a red cat", "a blue dog", "two red dogs", "no cat at all"]
STYLES, ANIMALS = ("flat", "drawn", "shaded"), ("ant", "bee", "cat")
K, L = tiny.VQGAN["num_embeddings"], 16


def tokenizer_of(seed, image_size, channels=1):
    """A random tokenizer that uses many codes, with its image processor."""
    torch.manual_seed(seed)
    model = VQGANModel(VQGANConfig(**{**tiny.VQGAN, "image_size": image_size, "in_channels": channels})).eval()
    with torch.no_grad():
        latents = model.encode(torch.rand(64, channels, image_size, image_size) * 2 - 1).latents
        rows = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
        model.quantize.place_entries(rows[torch.randperm(len(rows))[:K]])
    model.config.fingerprint = model.compute_fingerprint()
    return ImageTokenizer(model, VQGANImageProcessor(image_size, channels))


def make_parts():
    """The tokenizer of the images, that of the small images, and that of the texts."""
    return tokenizer_of(0, 16), tokenizer_of(1, 8), TextTokenizer(train_text_tokenizer(TEXTS, 300).to_str())


def make_segments(parts):
    """The conditions that pipelines of these parts can have, by name."""
    own, small, text = parts
    image = {"kind": "image", "num_tokens": K, "length": 4, "grids": ((2, 2, 1),), "image_shape": (8, 8)}
    return {
        "animal": Segment("animal", "class", 3, class_names=ANIMALS),
        "style": Segment("style", "class", 3, class_names=STYLES),
        "caption": Segment("caption", "text", text.num_tokens, 6, fingerprint=text.fingerprint),
        "small": Segment("small", fingerprint=small.fingerprint, **image),
        "corner": Segment("corner", fingerprint=own.fingerprint, **image),
    }


def make(parts, segments, class_names=(), conditions=None, **fields):
    """A pipeline with a random prior over these segments."""
    own, small, text = parts
    layout = TokenLayout(K, class_names, (4, 4), 4, own.fingerprint, segments=tuple(segments), **fields)
    torch.manual_seed(2)
    prior = build_prior(tiny.RANDOM_PRIORS["llama"], layout)
    found = {"caption": text, "small": small}
    if conditions is None:
        conditions = {segment.name: found[segment.name] for segment in segments if segment.name in found}
    pipeline = VQGANPipeline(own.vqgan, prior, own.image_processor, layout, conditions)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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
