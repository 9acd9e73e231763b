"""Encoding and decoding of images, compared with the modules of taming-transformers and diffusers' `VQModel`.

All models have the same weights. Before the measurement, codes and images are compared in float32. One code in a
thousand may differ, because rounding can decide between two entries. Images may differ by 1e-4 of their norm.

"as shipped" is an unchanged module of a peer. "at its best" is channels-last and, on a GPU, compiled.
"""

import contextlib
import copy
import io
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.case import OURS, Case, Prepared
from benchmarks.ideal import decode_operations, encode_operations
from benchmarks.machine import full_precision
from benchmarks.peers import absent
from configs import load_config
from stage1_vqgan import Stage1Config, VQGANConfig, VQGANModel

# The f16 layout of the original. The suites cpu and tiny have a quarter of its width, and images of 64 pixels.
NARROW: dict[str, Any] = {
    "image_size": 64,
    "base_channels": 32,
    "latent_channels": 64,
    "num_embeddings": 1024,
}
BATCHES = {"cpu": 4, "gpu": 64, "tiny": 2}

Both = Callable[[Tensor], Tensor]


def configuration(suite: str) -> VQGANConfig:
    """The configuration of the suite, without l2_normalize, which the peers do not support."""
    narrow = {f"model.{name}": value for name, value in NARROW.items()} if suite != "gpu" else {}
    values = {**narrow, "model.quantizer_options": {"l2_normalize": False}}
    return load_config(Stage1Config, "imagenet256/stage1", values).vqgan_config()


@cache
def tokenizer(suite: str) -> VQGANModel:
    """A random float32 tokenizer on the CPU. Its entries have the distribution of its latents."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = VQGANModel(configuration(suite)).eval()
        latents = model.encode(images(suite, 1)).latents
        deviation, mean = torch.std_mean(latents, (0, 2, 3))
        entries = model.quantize.embedding.weight
        entries.copy_(mean + deviation * torch.randn_like(entries))
    return model


def images(suite: str, batch: int) -> Tensor:
    """Smooth random images, `(B, 3, H, W)` in [-1, 1]."""
    size = configuration(suite).image_shape
    small = torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return nn.functional.interpolate(small, size, mode="bilinear")


def codes(suite: str, batch: int) -> Tensor:
    """Random codes, `(B, h, w)`."""
    config = configuration(suite)
    shape = batch, *config.grid
    return torch.randint(config.num_embeddings, shape, generator=torch.Generator().manual_seed(1))


def ours(suite: str) -> tuple[Both, Both, list[nn.Module]]:
    """Functions that encode and decode; and the model, encoder, decoder and, if it stays float32, quantizer."""
    model = copy.deepcopy(tokenizer(suite))

    def encode(pixels: Tensor) -> Tensor:
        return cast(Tensor, model.encode(pixels).codes)

    return encode, model.decode_codes, [model, model.encoder, model.decoder]


def taming(suite: str) -> tuple[Both, Both, list[nn.Module]]:
    """The result of `ours` for the modules of taming-transformers."""
    from taming.modules.diffusionmodules.model import Decoder, Encoder
    from taming.modules.vqvae.quantize import VectorQuantizer2

    config, weights = configuration(suite), tokenizer(suite).state_dict()
    sizes = {
        "ch": config.base_channels,
        "out_ch": config.in_channels,
        "ch_mult": tuple(config.channel_multiplier),
        "num_res_blocks": config.num_res_blocks,
        "attn_resolutions": [min(config.resolutions[level]) for level in config.attn_levels or ()],
        "in_channels": config.in_channels,
        "resolution": config.image_size,
        "z_channels": config.latent_channels,
    }
    width, latent = config.embed_dim, config.latent_channels
    with contextlib.redirect_stdout(io.StringIO()):  # the decoder prints
        model = nn.ModuleDict(
            {
                "encoder": Encoder(**sizes, double_z=False),
                "quant_conv": nn.Conv2d(latent, width, 1),
                "quantize": VectorQuantizer2(config.num_embeddings, width, beta=0.25, sane_index_shape=True),
                "post_quant_conv": nn.Conv2d(width, latent, 1),
                "decoder": Decoder(**sizes),
            }
        )
    model.load_state_dict(weights)
    quantize: Any = model["quantize"]

    def encode(pixels: Tensor) -> Tensor:
        return quantize(model["quant_conv"](model["encoder"](pixels)).float())[2][2]

    def decode(codes: Tensor) -> Tensor:
        entries = quantize.get_codebook_entry(codes.flatten(), (*codes.shape, width))
        return model["decoder"](model["post_quant_conv"](entries.to(model["post_quant_conv"].weight.dtype)))

    return encode, decode, [model.eval(), model["encoder"], model["decoder"], quantize]


def diffusers(suite: str) -> tuple[Both, Both, list[nn.Module]]:
    """The result of `ours` for diffusers' `VQModel`."""
    import tempfile
    from pathlib import Path

    from diffusers import VQModel

    from stage1_vqgan.convert.diffusers import write

    with tempfile.TemporaryDirectory() as folder:
        write(tokenizer(suite), Path(folder))
        model = VQModel.from_pretrained(folder).eval()
    config = configuration(suite)

    def encode(pixels: Tensor) -> Tensor:
        indices = model.quantize(model.encode(pixels).latents.float())[2][2]
        return indices.view(len(pixels), *config.grid)

    def decode(codes: Tensor) -> Tensor:
        entries = model.quantize.get_codebook_entry(codes.flatten(), (*codes.shape, config.embed_dim))
        return model.decode(entries.to(model.dtype), force_not_quantize=True).sample

    return encode, decode, [model, model.encoder, model.decoder, model.quantize]


MAKERS = {OURS: ours, "taming-transformers": taming, "diffusers": diffusers}


def prepared(maker: str, direction: str, suite: str, device: torch.device, dtype: torch.dtype, best: bool) -> Prepared:
    """A call of a lane on one batch. `best` compiles the modules and makes those of peers channels-last."""
    *pair, modules = MAKERS[maker](suite)
    index = 0 if direction == "encode" else 1
    call, whole, work = pair[index], modules[0], modules[1 + index]
    inputs = images(suite, BATCHES[suite]).to(dtype) if index == 0 else codes(suite, BATCHES[suite])
    inputs = inputs.to(device)
    whole.to(device, dtype)
    for quantizer in modules[3:]:  # searches in float32, as ours does
        quantizer.float()
    if maker == OURS or best:
        whole.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        inputs = inputs.contiguous(memory_format=torch.channels_last) if inputs.is_floating_point() else inputs
    if best:
        work.compile(dynamic=False)
    return torch.inference_mode()(partial(call, inputs))


def agree(makers: list[str], direction: str, suite: str, device: torch.device) -> Mapping[str, Any]:
    """Fraction of the codes that differ from ours, or relative difference of the images from ours, by peer."""
    found = {}
    with torch.inference_mode(), full_precision():
        made = {}
        for maker in makers:
            *pair, modules = MAKERS[maker](suite)
            modules[0].to(device)
            index = 0 if direction == "encode" else 1
            made[maker] = pair[index]((images if index == 0 else codes)(suite, 2).to(device))
    expected = made.pop(OURS)
    for maker, values in made.items():
        if direction == "encode":
            found[maker] = (values != expected).float().mean().item()
            assert len(expected.unique()) > 16, "the images have hardly any codes to compare"
        else:
            found[maker] = ((values - expected).norm() / expected.norm()).item()
        assert values.shape == expected.shape and found[maker] <= (1e-3 if direction == "encode" else 1e-4), found
    return {"different codes" if direction == "encode" else "relative difference": found}


def cases(direction: str, suite: str, device: torch.device) -> Iterator[Case]:
    """One case: one batch in one direction."""
    config, batch = configuration(suite), BATCHES[suite]
    dtype = torch.float32 if suite == "cpu" else torch.bfloat16
    missing = absent({"taming-transformers": "taming", "diffusers": "diffusers"})
    makers = [maker for maker in MAKERS if maker not in missing]
    arguments = direction, suite, device, dtype
    lanes: dict[str, Callable[[], Prepared]] = {}
    for maker in makers:
        lanes[maker if maker == OURS else f"{maker}, as shipped"] = partial(prepared, maker, *arguments, False)
        if suite != "cpu":
            best = f"{maker}, compiled" if maker == OURS else f"{maker}, at its best"
            lanes[best] = partial(prepared, maker, *arguments, True)
    ideal = encode_operations if direction == "encode" else decode_operations
    yield Case(
        row=direction,
        setting=f"f16, {config.image_size}², batch {batch}",
        lanes=lanes,
        agree=partial(agree, makers, direction, suite, device),
        unit="images/s",
        count=batch,
        operations=lambda: batch * ideal(config),
        dtype=dtype,
        absent=missing,
    )


def encode_cases(suite: str, device: torch.device, data: str | None) -> Iterator[Case]:
    """Images → codes."""
    return cases("encode", suite, device)


def decode_cases(suite: str, device: torch.device, data: str | None) -> Iterator[Case]:
    """Codes → images."""
    return cases("decode", suite, device)
