"""Reads the tokenizers of CompVis/taming-transformers, whose tensors have the same names as ours.

Source: Esser et al. 2021, "Taming transformers for high-resolution image synthesis".
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs import ConfigError, Problem
from configs.problems import listed, shown
from stage1_vqgan.convert.files import as_float32, read_mapping, refuse
from stage1_vqgan.convert.original import Claim, Original, leave_out, read_claims, section
from stage1_vqgan.convert.unwrap import read_tokenizer

LEFT_OUT = {
    r"loss\.perceptual_loss\.": "LPIPS",
    r"model_ema\.": "a moving average of the weights; the weights themselves are used, as in the original",
    r"colorize$": "the colours of segmentation maps",
    r"(io\d*|grad\w*)\.": "stored inputs, outputs and gradients",
}
DISCRIMINATOR = "loss.discriminator."
FOREIGN = {r"encoder\.conv_blocks\.": "these are names of LlamaGen: use --from llamagen"}

FLAX_ATTENTION = (
    "vqgan-jax applies all attentions of a level after each of its blocks; this tokenizer applies one after each, as "
    "the original, with which these weights were trained: its codes can differ from those of vqgan-jax"
)

# Class name (the last part of `target`, which is never imported) → kind of quantizer.
TARGETS = {
    "VQModel": "vq",
    "VQModelInterface": "vq",
    "VQNoDiscModel": "vq",
    "VQSegmentationModel": "vq",
    "GumbelVQ": "gumbel",
}
FIELDS = {
    "z_channels": "latent_channels",
    "resolution": "image_size",
    "in_channels": "in_channels",
    "out_ch": "in_channels",
    "ch": "base_channels",
    "ch_mult": "channel_multiplier",
    "num_res_blocks": "num_res_blocks",
    "attn_resolutions": "attn_resolutions",
    "dropout": "dropout",
}
FIXED: dict[str, list[Any]] = {
    "double_z": [False],
    "resamp_with_conv": [True],
    "give_pre_end": [False],
    "tanh_out": [False],
    "use_linear_attn": [False],
    "attn_type": ["vanilla", "none"],
}


def read(checkpoint: Path, config: Path | None) -> Original:
    """Reads a tokenizer from its checkpoint and, if given, its configuration.

    Raises:
        ConfigError: a file cannot be read, or is not of such a tokenizer.
    """
    stored, chosen = read_tokenizer(checkpoint, FOREIGN)
    tensors, notes = leave_out(stored, LEFT_OUT)
    notes = chosen + notes
    if checkpoint.suffix == ".msgpack" and any(".attn." in name for name in tensors):
        notes.append(FLAX_ATTENTION)
    discriminator = {
        name.removeprefix(DISCRIMINATOR): tensors.pop(name) for name in list(tensors) if name.startswith(DISCRIMINATOR)
    }
    used = tensors.pop("quantize.used", None)
    weights = as_float32(tensors, checkpoint)
    kind = "gumbel" if any(name.startswith(("quantize.proj.", "quantize.embed.")) for name in weights) else "vq"
    claims, options = _read_config(config, kind, used is not None) if config else ([], {})
    if used is not None:
        claims = _keep_used(weights, used, claims, checkpoint)
        notes.append(f"remapped: the {len(used)} used entries of the codebook are kept; code i is the remapped index i")
        if kind == "vq":
            notes.append(
                "a latent nearest to a removed entry gets the nearest kept entry; the original draws one at random"
            )
    if kind == "vq":
        options = {"legacy_codebook_loss": True, **options}
    return Original(
        weights=weights,
        claims=claims,
        settings={"quantizer": kind, "quantizer_options": options},
        discriminator=_checked(discriminator, checkpoint),
        notes=notes,
    )


def _read_config(path: Path, kind: str, remapped: bool) -> tuple[list[Claim], dict[str, Any]]:
    """Reads the YAML of the original, a JSON with its `config`, or the config.json beside Flax weights.

    Returns:
        Its claims, and options of the quantizer.
    """
    values = read_mapping(path)
    if "ch_mult" in values:  # all keys in one section, with those of every configuration of transformers
        inner = {name: values[name] for name in (*FIELDS, *FIXED) if name in values}
        values = {"config": {name: values[name] for name in ("n_embed", "embed_dim") if name in values}}
        values["config"]["ddconfig"] = inner
    keys = ["model"] if "model" in values else ["config"]
    if keys == ["model"]:
        if "first_stage_config" in section(values, "model", "params"):
            keys = ["model", "params", "first_stage_config"]
        _check_target(section(values, *keys).get("target"), kind, ".".join(keys))
        keys = [*keys, "params"]
    params, prefix = section(values, *keys), ".".join(keys)
    if params.get("remap") and not remapped:
        message = f"received {shown(str(params['remap']))}, but the weights have no quantize.used"
        raise ConfigError([Problem(f"config: {prefix}.remap", message)])
    sizes: dict[str, Any] = {name: params[name] for name in ("n_embed", "embed_dim") if name in params}
    claims = read_claims(sizes, f"{prefix}.", {"n_embed": "num_embeddings", "embed_dim": "embed_dim"}, {})
    sizes = section(values, *keys, "ddconfig")
    claims += read_claims(sizes, f"{prefix}.ddconfig.", FIELDS, FIXED, ["use_timestep"])
    if "attn_type" in sizes:
        claims.append(Claim(f"{prefix}.ddconfig.attn_type", "mid_attention", sizes["attn_type"] != "none"))
    if kind == "gumbel":
        return claims, {"kl_weight": params["kl_weight"]} if "kl_weight" in params else {}
    named = {"beta": "commitment_cost", "legacy": "legacy_codebook_loss"}
    return claims, {option: values[name] for name, option in named.items() if name in values}


def _check_target(target: Any, kind: str, key: str) -> None:
    has = TARGETS.get(str(target).rpartition(".")[2])
    if target is None or has == kind:
        return
    if has is None:
        message = f"received {shown(str(target))}; supported are {', '.join(TARGETS)} (this is read, not imported)"
    else:
        found = "quantize.proj and quantize.embed" if kind == "gumbel" else "quantize.embedding"
        message = f"received {shown(str(target))}, but the weights have {found}"
    raise ConfigError([Problem(f"config: {key}.target", message)])


def _keep_used(weights: dict[str, Tensor], used: Tensor, claims: Collection[Claim], path: Path) -> list[Claim]:
    """Reduces the codebook in `weights` to its used entries, in their order; returns the claims that still hold."""
    names = [name for name in weights if name.startswith(("quantize.embedding.", "quantize.embed.", "quantize.proj."))]
    sizes = {len(weights[name]) for name in names}
    whole = used.ndim == 1 and not used.is_complex() and torch.equal(used, used.long())
    rows = used.long()
    if not whole or len(sizes) != 1 or not len(rows) or rows.min() < 0 or rows.max() >= min(sizes):
        message = f"quantize.used is {used.dtype} {tuple(used.shape)}; it must hold rows of {listed(names)}"
        raise refuse("checkpoint", path, message)
    if len(rows.unique()) < len(rows):
        raise refuse("checkpoint", path, "quantize.used names an entry of the codebook twice")
    entries = min(sizes)
    for claim in claims:
        if claim.field == "num_embeddings" and claim.value != entries:
            message = f"is {claim.value}, but the codebook in the weights has {entries} entries"
            raise ConfigError([Problem(f"config: {claim.key}", message)])
    for name in names:
        weights[name] = weights[name][rows].contiguous()
    return [claim for claim in claims if claim.field != "num_embeddings"]


def _checked(discriminator: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of a discriminator, ready to save: weights as float32, counters unchanged."""
    counters = {name: value for name, value in discriminator.items() if not value.is_floating_point()}
    floats = {name: value for name, value in discriminator.items() if name not in counters}
    return as_float32(floats, path) | {name: value.clone() for name, value in counters.items()}
