"""Reads the tokenizers of LlamaGen: the blocks of VQGAN under other names, attention at the last level, and codebook
entries of unit length.

Source: Sun et al. 2024, "Autoregressive model beats diffusion: Llama for scalable image generation", section 2.1.
"""

from functools import partial
from pathlib import Path
from typing import Any

from stage1_vqgan.convert.files import as_float32, read_mapping, refuse
from stage1_vqgan.convert.names import Rules, count, to_ours, to_theirs
from stage1_vqgan.convert.original import Claim, Original, leave_out, read_claims, renamed, section
from stage1_vqgan.convert.unwrap import read_tokenizer

LEFT_OUT = {
    r"quantize\.codebook_used$": "the record of codes used in training",
    r"(io\d*|grad\w*)\.": "stored inputs, outputs and gradients",
}
RULES: Rules = (
    ("encoder.conv_blocks.*.res.*", "encoder.down.*.block.*"),
    ("encoder.conv_blocks.*", "encoder.down.*"),
    ("decoder.conv_blocks.~.res.*", "decoder.up.~.block.*"),
    ("decoder.conv_blocks.~", "decoder.up.~"),
    ("mid.0", "mid.block_1"),
    ("mid.1", "mid.attn_1"),
    ("mid.2", "mid.block_2"),
)
FIELDS = {
    "codebook_size": "num_embeddings",
    "codebook_embed_dim": "embed_dim",
    "z_channels": "latent_channels",
    "in_channels": "in_channels",
    "out_channels": "in_channels",
    "ch": "base_channels",
    "encoder_ch_mult": "channel_multiplier",
    "decoder_ch_mult": "channel_multiplier",
    "num_res_blocks": "num_res_blocks",
    "dropout": "dropout",
    "dropout_p": "dropout",
    "image_size": "image_size",
}
FIXED: dict[str, list[Any]] = {"norm_type": ["group"], "resamp_with_conv": [True]}
# Keys of the configuration that are options of the quantizer.
OPTIONS = {
    "codebook_l2_norm": "l2_normalize",
    "commit_loss_beta": "commitment_cost",
    "entropy_loss_ratio": "entropy_weight",
}
# Keys that only matter for the logs of its training.
IGNORED = ["codebook_show_usage"]


def read(checkpoint: Path, config: Path | None) -> Original:
    """Reads a tokenizer from its checkpoint and, if given, its configuration.

    Raises:
        ConfigError: a file cannot be read, or is not of such a tokenizer.
    """
    stored, chosen = read_tokenizer(checkpoint)
    tensors, notes = leave_out(stored, LEFT_OUT)
    num_levels = count(tensors, r"encoder\.conv_blocks\.(\d{1,4})\.")
    if not num_levels:  # the weights of a taming tokenizer would be accepted here, but give other codes
        raise refuse("checkpoint", checkpoint, "it has no encoder.conv_blocks.*, the name of LlamaGen for the levels")
    claims, options = _read_config(config) if config else ([], {})
    return Original(
        weights=renamed(as_float32(tensors, checkpoint), partial(to_ours, rules=RULES, num_levels=num_levels)),
        name_in_file=partial(to_theirs, rules=RULES, num_levels=num_levels),
        claims=claims,
        settings={"quantizer": "vq", "quantizer_options": {"l2_normalize": True, **options}},
        notes=chosen + notes,
    )


def _read_config(path: Path) -> tuple[list[Claim], dict[str, Any]]:
    values = read_mapping(path)
    nested = "config" in values
    values = section(values, "config") if nested else values
    claims = read_claims(values, "config." if nested else "", FIELDS, FIXED, [*OPTIONS, *IGNORED])
    return claims, {option: values[name] for name, option in OPTIONS.items() if name in values}
