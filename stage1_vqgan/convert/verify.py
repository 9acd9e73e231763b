"""Compares a converted tokenizer with the original."""

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from configs import ConfigError, Problem
from stage1_vqgan.convert.files import read_tensors, refuse
from stage1_vqgan.modeling_vqgan import VQGANModel

# Largest allowed difference of reconstructions, relative to the largest value of the original if that exceeds 1.
TOLERANCE = 1e-5
# Deep decoders amplify rounding further. So this many times the decoder's own float32 rounding error is allowed too.
ROUNDINGS = 4

# A tokenizer of another library: pixels `(B, C, H, W)` → codes `(B, h, w)` and reconstructions `(B, C, H, W)`.
Reference = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """Images, and their codes and reconstructions by the original.

    Attributes:
        name: name for messages.
        pixels: float32 `(B, C, H, W)`.
        codes: int64 `(B, h, w)`.
        reconstruction: float32 `(B, C, H, W)`, or None if it is unknown.
    """

    name: str
    pixels: Tensor
    codes: Tensor
    reconstruction: Tensor | None


def stored_cases(path: Path, model: VQGANModel) -> list[Case]:
    """Reads the cases of a safetensors file: `io.input`, `io.indices` and optionally `io.recon`; then `io2.*`, ….

    Raises:
        ConfigError: the file holds no cases, or they do not fit the tokenizer.
    """
    tensors = read_tensors(path, field="verify")
    cases = []
    for name, pixels in stored_inputs(tensors, path, model).items():
        factor = model.config.downsampling_factor
        grid = (len(pixels), pixels.shape[2] // factor, pixels.shape[3] // factor)
        codes, reconstruction = tensors.get(f"{name}.indices"), tensors.get(f"{name}.recon")
        if codes is None or codes.is_floating_point() or codes.numel() != grid[0] * grid[1] * grid[2]:
            found = "missing" if codes is None else f"{codes.dtype} {tuple(codes.shape)}"
            raise refuse("verify", path, f"{name}.indices is {found}; it must be integers of shape {grid}")
        if codes.min() < 0 or codes.max() >= model.config.num_embeddings:
            found, entries = f"from {int(codes.min())} to {int(codes.max())}", model.config.num_embeddings
            raise refuse("verify", path, f"{name}.indices has values {found}; this codebook has {entries} entries")
        if reconstruction is not None and reconstruction.shape != pixels.shape:
            shape = tuple(reconstruction.shape)
            raise refuse("verify", path, f"{name}.recon has shape {shape}; it must have the shape of {name}.input")
        cases.append(
            Case(name, pixels, codes.long().view(grid), None if reconstruction is None else reconstruction.float())
        )
    return cases


def stored_inputs(tensors: dict[str, Tensor], path: Path, model: VQGANModel) -> dict[str, Tensor]:
    """The images of a file, by the names of their cases."""
    inputs = {
        match[1]: value.float() for name, value in tensors.items() if (match := re.fullmatch(r"(io\d*)\.input", name))
    }
    if not inputs:
        raise refuse("verify", path, "it holds no io.input")
    factor, channels = model.config.downsampling_factor, model.config.in_channels
    for name, pixels in inputs.items():
        shape = tuple(pixels.shape)
        if len(shape) != 4 or shape[1] != channels or shape[2] % factor or shape[3] % factor or not pixels.numel():
            needed = f"(B, {channels}, H, W) with H and W divisible by {factor}"
            raise refuse("verify", path, f"{name}.input has shape {shape}; it must be {needed}")
    return inputs


@torch.no_grad()
def library_cases(reference: Reference, path: Path | None, model: VQGANModel) -> list[Case]:
    """Codes and reconstructions that another library computes, for the images of a file or for random images.

    Raises:
        ConfigError: the file holds no images for this tokenizer.
    """
    inputs = random_inputs(model) if path is None else stored_inputs(read_tensors(path, field="verify"), path, model)
    return [Case(name, pixels, *reference(pixels)) for name, pixels in inputs.items()]


def random_inputs(model: VQGANModel) -> dict[str, Tensor]:
    """Uniform noise as images: two square ones, and one that is wider than high."""
    generator, factor = torch.Generator().manual_seed(0), model.config.downsampling_factor
    shapes = {"random images": (2, 4, 4), "a wide random image": (1, 4, 6)}
    return {
        name: torch.rand(size, model.config.in_channels, factor * h, factor * w, generator=generator) * 2 - 1
        for name, (size, h, w) in shapes.items()
    }


@torch.no_grad()
def verify(model: VQGANModel, cases: Sequence[Case], allow_ties: bool = False) -> list[str]:
    """Compares codes, which must be equal, and reconstructions, which may differ by `TOLERANCE` or a few rounding
    errors of float32.

    Args:
        model: the tokenizer, after or before its conversion.
        cases: codes and reconstructions of the other code base.
        allow_ties: whether a code may differ if its entry is equally near to the latent up to rounding. Needed for
            diffusers and Janus, which compute distances with larger rounding errors.

    Returns:
        A line with the differences for each case.

    Raises:
        ConfigError: a difference is too large; the message states all differences.
    """
    lines, failed = [], False
    for case in cases:
        out = model(case.pixels)
        codes, latents = cast(Tensor, out.codes), cast(Tensor, out.latents)
        different = codes.ne(case.codes)
        ties = different & _is_tie(model, latents, codes, case.codes) if allow_ties else torch.zeros_like(different)
        wrong = int((different & ~ties).sum())
        line = f"{case.name}: {wrong} of {different.numel()} codes differ"
        line += f" ({int(ties.sum())} more are equally near up to rounding)" if ties.any() else ""
        failed |= wrong > 0
        if case.reconstruction is not None:
            # both decode z + (e - z), which differs from the entry e by rounding, and the decoder amplifies that
            image = model.decode_codes(case.codes) if different.any() else cast(Tensor, out.reconstruction)
            error = (image - case.reconstruction).abs().max().item()
            bound = TOLERANCE * max(1.0, case.reconstruction.abs().max().item())
            if error > bound:
                bound = max(bound, ROUNDINGS * _rounding(model, case.codes))
            failed |= not error <= bound
            line += f", reconstructions differ by at most {error:.1e} (allowed {bound:.1e})"
        lines.append(line)
    if failed:
        raise ConfigError(
            [Problem("verify", line) for line in lines], "the converted tokenizer differs from the original"
        )
    return lines


def _rounding(model: VQGANModel, codes: Tensor) -> float:
    """Largest difference between images that are decoded in float32 and in float64."""
    exact = copy.deepcopy(model).double().decode_codes(codes)
    return (exact - model.decode_codes(codes)).abs().max().item()


def _is_tie(model: VQGANModel, latents: Tensor, codes: Tensor, others: Tensor) -> Tensor:
    z = latents.double()
    z = F.normalize(z, dim=1) if getattr(model.quantize, "l2_normalize", False) else z  # its length decides nothing
    entries = [model.quantize.lookup(indices).double() for indices in (codes, others)]
    near, far = ((z - entry).square().sum(1) for entry in entries)
    return far - near <= TOLERANCE * (z.square().sum(1) + entries[1].square().sum(1))
