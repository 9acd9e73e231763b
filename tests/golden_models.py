"""Compares tokenizers that `stage1_vqgan.convert` has loaded with stored results of the original code."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from stage1_vqgan import VQGANConfig, VQGANModel
from stage1_vqgan.convert.command import READERS
from stage1_vqgan.convert.original import build_model
from tests.devices import DEVICE
from tests.golden import GOLDEN, GRADIENTS, ROUNDING_OF_A_LAYER, Found, elementwise, relative, state

ORIGINALS = {"tiny": "taming", "f16_narrow": "taming", "llamagen_tiny": "llamagen"}
# Encoder and decoder have about 40 layers together, which gives 1e-5; doubled as a margin. The largest error measured
# on three kinds of processor is 6e-6. A fault exceeds the bound: ten times the ε of GroupNorm gives at least 6e-5.
OUTPUTS = 2 * 40 * ROUNDING_OF_A_LAYER
# The originals decode z + (e - z), which differs from e by rounding, so the input of their decoder is less precise.
LOOKED_UP = 1.5 * OUTPUTS


def compare() -> Iterator[Found]:
    """Compares every stored quantity of every tokenizer.

    Raises:
        AssertionError: a code differs.
    """
    for name in ORIGINALS:
        stored = load_file(GOLDEN / f"{name}.safetensors", device=str(DEVICE))
        for group in ("io", "io2"):
            yield from _outputs(name, group, stored)
        for prefix, legacy in (("grad.", True), ("grad_fixed.", False)):
            expected = state(stored, prefix)
            if expected:
                yield from _gradients(name, prefix, legacy, stored["io.input"], expected)


def load(name: str) -> VQGANModel:
    """Loads the tokenizer of an original code base."""
    model = build_model(READERS[ORIGINALS[name]](GOLDEN / f"{name}.safetensors", GOLDEN / f"{name}.json"))
    return model.to(DEVICE)  # type: ignore[arg-type]


@torch.no_grad()
def _outputs(name: str, group: str, stored: dict[str, Tensor]) -> Iterator[Found]:
    model, pixels, expected = load(name), stored[f"{group}.input"], state(stored, f"{group}.")
    out: Any = model(pixels)
    assert torch.equal(out.codes.flatten(), expected["indices"]), (name, group)
    found = {
        "encoder": ("enc", model.encoder(pixels)),
        "latents": ("h", out.latents),
        "quantized": ("quant", out.quantized),
        "reconstruction": ("recon", out.reconstruction),
        "codebook loss": ("emb_loss", out.codebook_loss),
        "codebook loss, fixed": ("emb_loss_fixed", out.codebook_loss),
    }
    shape = "square" if pixels.shape[2] == pixels.shape[3] else "not square"
    for quantity, (key, value) in found.items():
        if key in expected:
            yield Found(quantity, f"{name}, {shape}", elementwise(value, expected[key]), OUTPUTS)
    looked_up = model.decode_codes(out.codes)
    yield Found("decode_codes", f"{name}, {shape}", elementwise(looked_up, expected["recon"]), LOOKED_UP)


def _gradients(name: str, prefix: str, legacy: bool, pixels: Tensor, expected: dict[str, Tensor]) -> Iterator[Found]:
    loaded = load(name)
    options = loaded.config.quantizer_options | {"legacy_codebook_loss": legacy}
    model = VQGANModel(VQGANConfig.from_dict(loaded.config.to_dict() | {"quantizer_options": options})).eval()
    model.to(DEVICE).load_state_dict(loaded.state_dict())
    pixels = pixels.clone().requires_grad_()
    out: Any = model(pixels)
    loss = (pixels - out.reconstruction).abs().mean() + out.codebook_loss
    loss.backward()
    where = f"{name}, β on the {'codebook' if legacy else 'commitment'} term"
    if "loss" in expected:
        yield Found("loss of the gradients", where, elementwise(loss.detach(), expected.pop("loss")), OUTPUTS)
    assert len(expected) >= 3
    for key, gradient in expected.items():
        found = pixels.grad if key == "input" else model.get_parameter(key).grad
        yield Found("gradients", f"{where}, {key}", relative(cast(Tensor, found), gradient), GRADIENTS)
