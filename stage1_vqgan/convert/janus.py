"""Reads and writes the tokenizers of Janus (`JanusVQVAE` of transformers): the layout of LlamaGen, with our names.

A checkpoint is a folder or a file with such a tokenizer alone, or inside a whole Janus. A `JanusVQVAE` attends at its
last level only, counts the levels of its decoder from the other end, and decodes square grids of one size. Its decoder
takes entries of unit length, but its search compares with the entries as they are stored.
"""

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import JanusVisionConfig, JanusVQVAE, JanusVQVAEConfig

from configs import ConfigError, Problem
from configs.model_folder import weights_files
from configs.problems import shown
from configs.sections import Positive
from configs.values import read_value
from configs.weights_files import read_headers
from stage1_vqgan.configuration_vqgan import VQGANConfig
from stage1_vqgan.convert.files import as_float32, read_mapping, read_tensors, refuse
from stage1_vqgan.convert.names import Rules, count, to_ours, to_theirs
from stage1_vqgan.convert.original import Claim, Original, read_claims, renamed, section
from stage1_vqgan.convert.verify import Reference
from stage1_vqgan.modeling_vqgan import VQGANModel
from stage1_vqgan.quantizer_base import unit_length

# Where the tokenizer stands in a JanusForConditionalGeneration, in a JanusModel, and alone.
PREFIXES = ("model.vqmodel.", "vqmodel.", "")
CODEBOOK = "quantize.embedding.weight"
RULES: Rules = (("decoder.up.~", "decoder.up.~"),)
GROUPS = 32  # of every GroupNorm of the class

# Fields with the same meaning and name. The class also states the channels of the output.
SAME = (
    "embed_dim",
    "num_embeddings",
    "latent_channels",
    "in_channels",
    "base_channels",
    "channel_multiplier",
    "num_res_blocks",
    "dropout",
)
FIELDS = {**{name: name for name in SAME}, "out_channels": "in_channels"}
FIXED: dict[str, list[Any]] = {"model_type": [JanusVQVAEConfig.model_type], "double_latent": [False]}


def read(checkpoint: Path, config: Path | None) -> Original:
    """Reads a tokenizer from a folder, which includes its configuration, or from a file and, if given, a configuration.

    Raises:
        ConfigError: a file cannot be read, is not of such a tokenizer, or describes what a VQGANModel does not support.
    """
    if checkpoint.is_dir() and config is not None:
        raise refuse("config", config, "the checkpoint is a folder with a config.json; leave this out")
    values = read_mapping(checkpoint / "config.json", "checkpoint") if checkpoint.is_dir() else {}
    values = read_mapping(config) if config else values
    claims = _claims(values) if values else []
    weights, inside = _weights(checkpoint)
    num_levels = count(weights, r"encoder\.down\.(\d{1,4})\.")
    return Original(
        weights=renamed(weights, partial(to_ours, rules=RULES, num_levels=num_levels)),
        name_in_file=lambda name: inside + to_theirs(name, RULES, num_levels),
        claims=claims,
        settings={"norm_num_groups": GROUPS, "quantizer": "vq", "quantizer_options": {"l2_normalize": True}},
        notes=list(_notes(weights, inside)),
    )


def write(model: VQGANModel, folder: Path, field: str = "checkpoint") -> list[str]:
    """Writes a tokenizer to a folder that `JanusVQVAE.from_pretrained` reads, in float32.

    Args:
        model: the tokenizer.
        folder: the folder.
        field: configuration field for the error.

    Returns:
        Lines for the user: what was left out.

    Raises:
        ConfigError: the tokenizer has a feature that a JanusVQVAE lacks.
    """
    rename = partial(to_theirs, rules=RULES, num_levels=len(model.config.widths))
    weights = renamed({name: value.float() for name, value in model.state_dict().items()}, rename)
    _stock(model.config, weights, field).save_pretrained(folder)
    return [
        f"the JanusVQVAE decodes grids of {'×'.join(map(str, model.config.grid))} codes only",
        "left out: the options of the codebook loss, which a JanusVQVAE does not have",
    ]


def reference(checkpoint: Path, model: VQGANModel) -> Reference:
    """The class of transformers with the weights of a checkpoint, see `read`.

    Args:
        checkpoint: file or folder.
        model: the tokenizer that was read from it or written to it.

    Raises:
        ConfigError: the tokenizer has a feature that a JanusVQVAE lacks.
    """
    config = copy.deepcopy(model.config)
    config.image_size = config.downsampling_factor  # the class needs a square; `run` sets the grid
    stock = _stock(config, _weights(checkpoint)[0])

    def run(pixels: Tensor) -> tuple[Tensor, Tensor]:
        grid = [side // model.config.downsampling_factor for side in pixels.shape[2:]]
        stock.quantize.quant_state_dims = grid  # the class decodes grids of this size only
        codes = stock.encode(pixels).image_tokens.view(len(pixels), -1)
        return codes.view(-1, *grid), stock.decode(codes)

    return run


def _stock(config: VQGANConfig, weights: dict[str, Tensor], field: str = "checkpoint") -> JanusVQVAE:
    """The class of transformers with these weights, and with entries of unit length, in evaluation mode."""
    if problems := [Problem(field, message) for message in _inexpressible(config)]:
        raise ConfigError(problems)
    settings: dict[str, Any] = {name: getattr(config, name) for name in SAME}
    settings |= {"out_channels": config.in_channels, "num_patches": config.grid[0]}
    settings["channel_multiplier"] = list(map(int, config.channel_multiplier))
    with torch.device("meta"):
        stock = JanusVQVAE(JanusVQVAEConfig(**settings))
    stock.load_state_dict(weights | {CODEBOOK: unit_length(weights[CODEBOOK])}, assign=True)
    return stock.eval()


def _weights(checkpoint: Path) -> tuple[dict[str, Tensor], str]:
    """The float32 weights of the tokenizer by their names in JanusVQVAE, and the prefix of these names in the file."""
    files = [checkpoint]
    if checkpoint.is_dir():
        try:
            files = weights_files(checkpoint)
            read_headers(files)
        except (OSError, ValueError) as error:
            raise ConfigError([Problem("checkpoint", str(error))]) from None
    stored = {name: value for file in files for name, value in read_tensors(file).items()}
    inside = next((prefix for prefix in PREFIXES if prefix + CODEBOOK in stored), None)
    if inside is None:
        names = " or ".join(prefix + CODEBOOK for prefix in PREFIXES)
        raise refuse("checkpoint", checkpoint, f"it has no {names}, the codebook of a JanusVQVAE")
    weights = {name.removeprefix(inside): value for name, value in stored.items() if name.startswith(inside)}
    return as_float32(weights, checkpoint), inside


def _claims(values: dict[str, Any]) -> list[Claim]:
    """The claims of a configuration, of a JanusVQVAE or of a whole Janus. Keys that are missing have their defaults."""
    whole = "vq_config" in values
    stated = JanusVQVAEConfig().to_dict() | (section(values, "vq_config") if whole else values)
    known = {name: stated[name] for name in (*FIELDS, *FIXED)}
    claims = read_claims(known, "vq_config." if whole else "", FIELDS, FIXED)
    key, side = _side(values) if whole else ("num_patches", stated["num_patches"])
    try:
        side = read_value(Positive, side, strict=True)
    except ValueError as error:
        raise ConfigError([Problem(f"config: {key}", str(error))]) from None
    factor = 2 ** max(0, len(stated["channel_multiplier"]) - 1)
    return [*claims, Claim(key, "image_size", side * factor)]


def _side(values: dict[str, Any]) -> tuple[str, Any]:
    """Side of the grid of codes of a whole Janus, and its key. As in the class, the vision tower decides it."""
    vision = JanusVisionConfig().to_dict() | section({"vision_config": {}} | values, "vision_config")
    size, patch = vision["image_size"], vision["patch_size"]
    whole = type(size) is int and type(patch) is int and patch > 0
    return "vision_config.image_size // patch_size", size // patch if whole else [size, patch]


def _notes(weights: Mapping[str, Tensor], inside: str) -> Iterator[str]:
    if inside:
        yield "this is the checkpoint of a whole Janus: only the tokenizer of its images is converted"
    lengths = weights[CODEBOOK].norm(dim=-1)
    if (lengths - 1).abs().max() > 1e-5:
        yield (
            f"entries of the codebook have lengths from {lengths.min():.3g} to {lengths.max():.3g}: JanusVQVAE.encode "
            "compares with them as they are; this tokenizer compares with entries of unit length, which both decode"
        )


def _inexpressible(config: VQGANConfig) -> Iterator[str]:
    """What a JanusVQVAE lacks, in words."""
    if config.quantizer != "vq":
        yield f"its quantizer is {shown(config.quantizer)}; a JanusVQVAE only supports 'vq' with l2_normalize"
    elif not (config.quantizer_options or {}).get("l2_normalize"):
        yield "its quantizer_options.l2_normalize is false; a JanusVQVAE only decodes entries of unit length"
    if config.norm_num_groups != GROUPS:
        yield f"its norm_num_groups is {config.norm_num_groups}; a JanusVQVAE only supports {GROUPS}"
    last = [len(config.widths) - 1]
    if config.attn_levels != last:
        yield f"its attn_levels is {config.attn_levels}; a JanusVQVAE attends in its last level only, {last}"
    if not config.mid_attention or config.decoder_blocks != config.num_res_blocks + 1:
        has = f"mid_attention is {shown(config.mid_attention)}, decoder_num_res_blocks {config.decoder_num_res_blocks}"
        yield f"its {has}; a JanusVQVAE only supports true and {config.num_res_blocks + 1}"
    if config.grid[0] != config.grid[1]:
        yield f"its image_size is {config.image_size}; a JanusVQVAE only supports squares"
    if any(part % 1 for part in config.channel_multiplier):
        yield f"its channel_multiplier is {list(config.channel_multiplier)}; a JanusVQVAE only supports whole numbers"
