"""Tokenizers with attention, our own and converted ones, for images of other sizes than those of their training.

The reference is the original's module, built for the new size: its attention is moved to the new resolutions of the
same levels.
"""

import contextlib
import io
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stage1_vqgan import VQGANConfig, VQGANModel
from stage1_vqgan.convert.command import READERS
from stage1_vqgan.convert.original import build_model
from tests.other_tokenizers import images, llamagen_weights, reference, taming_weights, write_taming

LEVELS, ATTENDS, TRAINED = (32, 32, 64), {"llamagen": (2,)}, 16
SIZES = [32, 24, [16, 40]]


def original(source, size):
    return reference(LEVELS, ATTENDS.get(source, (1, 2)), size=size)


@torch.no_grad()
def taming_encoder(weights, size):
    """The encoder of taming-transformers, which names its attention by resolution, up to the codebook."""
    module = pytest.importorskip("taming.modules.diffusionmodules.model")
    side = min(size) if isinstance(size, list) else size
    attends = [side >> level for level in range(3) if f"encoder.down.{level}.attn.0.q.weight" in weights]
    sizes = {"ch": 32, "out_ch": 3, "ch_mult": (1, 1, 2), "num_res_blocks": 1, "in_channels": 3, "z_channels": 8}
    with contextlib.redirect_stdout(io.StringIO()):
        encoder = module.Encoder(**sizes, attn_resolutions=attends, resolution=side, double_z=False).eval()
    model = nn.ModuleDict({"encoder": encoder, "quant_conv": nn.Conv2d(8, 4, 1)})
    model.load_state_dict({name: value for name, value in weights.items() if name in model.state_dict()})
    return lambda pixels: model["quant_conv"](model["encoder"](pixels))


def latents_of(theirs, source, built_from, size):
    """The encoder of the original, built for images of a size, with the weights of `theirs`."""
    if built_from == "taming":
        return taming_encoder(taming_weights(theirs), size)
    moved = original(source, size)
    moved.load_state_dict(theirs.state_dict())
    return lambda pixels: moved.encode(pixels).latents


def save(source, folder):
    """Saves a tokenizer of size TRAINED in `folder`/ours. Returns a model of diffusers with its weights."""
    theirs = original(source, TRAINED)
    if source == "own":
        sizes = {"base_channels": 32, "channel_multiplier": [1, 1, 2], "num_res_blocks": 1, "attn_resolutions": [8, 4]}
        codes = {"latent_channels": 8, "embed_dim": 4, "num_embeddings": 24}
        model = VQGANModel(VQGANConfig(image_size=TRAINED, **sizes, **codes))
        model.load_state_dict(taming_weights(theirs))
    elif source == "diffusers":
        theirs.save_pretrained(folder / "theirs")
        model = build_model(READERS[source](folder / "theirs", None))
    else:
        weights = {"llamagen": llamagen_weights}.get(source, taming_weights)(theirs)
        write_taming(folder, theirs, weights)
        kind, config = ("llamagen", None) if source == "llamagen" else ("taming", folder / "model.yaml")
        model = build_model(READERS[kind](folder / "last.ckpt", config))
    model.save_pretrained(folder / "ours")
    return theirs


@pytest.mark.parametrize("built_from", ["diffusers", "taming"])
@pytest.mark.parametrize(
    "source", ["own", *(pytest.param(name, marks=pytest.mark.slow) for name in ("taming", "llamagen", "diffusers"))]
)
@torch.no_grad()
def test_codes_are_those_of_the_original_built_for_the_size(tmp_path, source, built_from):
    theirs = save(source, tmp_path)
    normalized = F.normalize if source == "llamagen" else torch.Tensor.clone
    entries = normalized(theirs.quantize.embedding.weight).double()
    fingerprint = json.loads((tmp_path / "ours" / "config.json").read_text())["fingerprint"]
    for size in SIZES:
        model = VQGANModel.from_pretrained(tmp_path / "ours", image_size=size)
        pixels = images(3, 3, *model.config.image_shape)
        rows = latents_of(theirs, source, built_from, size)(pixels).permute(0, 2, 3, 1).flatten(0, 2)
        expected = torch.cdist(normalized(rows).double(), entries).argmin(1)
        assert torch.equal(model.encode(pixels).codes.flatten(), expected) and len(expected.unique()) > 3
        assert model.config.fingerprint == fingerprint
