"""A tiny random CLIP, saved as its published ones are, and a tokenizer whose images depend clearly on its codes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from stage1_vqgan import VQGANConfig, VQGANModel
from tests import tiny
from tests.devices import DEVICE

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**TOWER, "image_size": 32, "patch_size": 8}
TEXT = {**TOWER, "vocab_size": 54, "max_position_embeddings": 12}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def widen(model: nn.Module, std: float) -> None:
    """Draws all matrices anew, so that inputs that differ have outputs that differ."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=std)


def save_clip(folder: Path) -> Path:
    """Saves a CLIP for images of 32×32 pixels and texts of small letters."""
    with seeded():
        model = CLIPModel(CLIPConfig(text_config={**TEXT, **SPECIAL}, vision_config=VISION, projection_dim=16))
        widen(model, 0.1)
    model.save_pretrained(folder)
    sides = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=sides).save_pretrained(folder)
    letters = [letter + end for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    words = ["<|startoftext|>", "<|endoftext|>", *letters]
    CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[]).save_pretrained(folder)
    return folder


def make_vqgan(**changes: Any) -> VQGANModel:
    """A random tokenizer of RGB images of 16×16 pixels."""
    with seeded():
        vqgan = VQGANModel(VQGANConfig(**{**tiny.VQGAN, "in_channels": 3, **changes}))
        for parameter in vqgan.quantize.parameters():
            nn.init.normal_(parameter)
        for layer in vqgan.decoder.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight.data *= 2
    return vqgan.eval().to(DEVICE)
