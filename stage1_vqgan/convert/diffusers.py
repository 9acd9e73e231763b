"""Reads and writes the tokenizers of diffusers (`VQModel`), which have the blocks of VQGAN under other names.

A folder holds config.json and diffusion_pytorch_model.safetensors, or diffusion_pytorch_model.bin in old versions.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from configs import ConfigError, Problem
from configs.problems import shown
from configs.sections import Positive
from configs.values import read_value
from stage1_vqgan.configuration_vqgan import VQGANConfig
from stage1_vqgan.convert.files import as_float32, read_mapping, read_tensors, refuse
from stage1_vqgan.convert.names import Rules, count, to_ours, to_theirs
from stage1_vqgan.convert.original import Claim, Original, multiplier, read_claims, renamed
from stage1_vqgan.convert.verify import Reference
from stage1_vqgan.modeling_vqgan import VQGANModel

WEIGHTS = "diffusion_pytorch_model"
RULES: Rules = (
    ("encoder.down_blocks.*.resnets.*", "encoder.down.*.block.*"),
    ("encoder.down_blocks.*.attentions.*", "encoder.down.*.attn.*"),
    ("encoder.down_blocks.*.downsamplers.0", "encoder.down.*.downsample"),
    ("decoder.up_blocks.~.resnets.*", "decoder.up.~.block.*"),
    ("decoder.up_blocks.~.attentions.*", "decoder.up.~.attn.*"),
    ("decoder.up_blocks.~.upsamplers.0", "decoder.up.~.upsample"),
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.attentions.0", "mid.attn_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"),
    ("group_norm", "norm"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("to_out.0", "proj_out"),
)
# Names of the layers of attention before diffusers 0.15.
OLD_NAMES: Rules = (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))

FIELDS = {
    "in_channels": "in_channels",
    "out_channels": "in_channels",
    "layers_per_block": "num_res_blocks",
    "latent_channels": "latent_channels",
    "sample_size": "image_size",
    "num_vq_embeddings": "num_embeddings",
    "norm_num_groups": "norm_num_groups",
    "vq_embed_dim": "embed_dim",
    "mid_block_add_attention": "mid_attention",
}
FIXED: dict[str, list[Any]] = {
    "_class_name": ["VQModel"],
    "act_fn": ["silu", "swish"],
    "norm_type": ["group"],
    "lookup_from_codebook": [False],
}
MOVQ = (
    "received 'spatial'; supported is only 'group': this is a MoVQ, and the norms of its decoder depend on the code at "
    "each position, which those of a VQGANModel cannot"
)
BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
IGNORED = ["_diffusers_version", "_name_or_path", "scaling_factor", "force_upcast", "block_out_channels", *BLOCKS]


def read(checkpoint: Path, config: Path | None = None) -> Original:
    """Reads a tokenizer from its folder, which includes its configuration; `config` must be None.

    Raises:
        ConfigError: a file cannot be read, is not of a tokenizer, or describes what a VQGANModel does not support.
    """
    if not checkpoint.is_dir():
        raise refuse("checkpoint", checkpoint, "give the folder that holds config.json and the weights")
    values = {
        name: value
        for name, value in read_mapping(checkpoint / "config.json", "checkpoint").items()
        if value is not None
    }
    if values.get("norm_type") == "spatial":
        raise ConfigError([Problem("config: norm_type", MOVQ)])
    claims = [*read_claims(values, "", FIELDS, FIXED, IGNORED), *_level_claims(values)]
    files = [path for suffix in ("safetensors", "bin") if (path := checkpoint / f"{WEIGHTS}.{suffix}").is_file()]
    if not files:
        raise refuse("checkpoint", checkpoint, f"it holds neither {WEIGHTS}.safetensors nor {WEIGHTS}.bin")
    weights = as_float32(read_tensors(files[0]), files[0])
    num_levels = count(weights, r"encoder\.down_blocks\.(\d{1,4})\.")
    weights = renamed(weights, lambda name: to_ours(to_ours(name, OLD_NAMES, 0), RULES, num_levels))
    return Original(
        weights={
            name: value[:, :, None, None] if _is_linear(name, value) else value for name, value in weights.items()
        },
        name_in_file=partial(to_theirs, rules=RULES, num_levels=num_levels),
        claims=claims,
        settings={"quantizer": "vq", "quantizer_options": {"legacy_codebook_loss": True}},
    )


def write(model: VQGANModel, folder: Path) -> list[str]:
    """Writes a tokenizer to a folder that `VQModel.from_pretrained` reads.

    Returns:
        Lines for the user: what was left out.

    Raises:
        ConfigError: the tokenizer has a feature that a VQModel lacks.
    """
    config = model.config
    if problems := list(_inexpressible(config)):
        raise ConfigError(problems)
    attends = config.attention
    down, up = ([f"Attn{block}" if attends_here else block for attends_here in attends] for block in BLOCKS.values())
    values = {
        "_class_name": "VQModel",
        "act_fn": "silu",
        "block_out_channels": config.widths,
        "down_block_types": down,
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.num_res_blocks,
        "mid_block_add_attention": config.mid_attention,
        "norm_num_groups": config.norm_num_groups,
        "norm_type": "group",
        "num_vq_embeddings": config.num_embeddings,
        "out_channels": config.in_channels,
        "sample_size": config.image_size,
        "up_block_types": up[::-1],
        "vq_embed_dim": config.embed_dim,
    }
    weights = renamed(
        {name: value.squeeze() if _is_attention(name) else value for name, value in model.state_dict().items()},
        partial(to_theirs, rules=RULES, num_levels=len(attends)),
    )
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    save_file(
        {name: value.contiguous() for name, value in weights.items()},
        folder / f"{WEIGHTS}.safetensors",
        {"format": "pt"},
    )
    return ["left out: dropout and the options of the codebook loss, which a VQModel does not have"]


def reference(folder: Path, model: VQGANModel) -> Reference:
    """The VQModel of diffusers in a folder; `model` is the tokenizer that was read from it or written to it."""
    from diffusers import VQModel

    theirs: Any = VQModel.from_pretrained(folder, low_cpu_mem_usage=False, local_files_only=True).float().eval()

    def run(pixels: Tensor) -> tuple[Tensor, Tensor]:
        latents = theirs.encode(pixels).latents
        codes = theirs.quantize(latents)[2][2].view(len(pixels), *latents.shape[2:])
        return codes, theirs.decode(latents).sample

    return run


def _level_claims(values: dict[str, Any]) -> list[Claim]:
    """The claims of the lists that have an entry for each level."""
    claims: list[Claim] = []
    problems = []
    for key, hint in (("block_out_channels", list[Positive]), *((key, list[str]) for key in BLOCKS)):
        try:
            entries = read_value(hint, values.get(key, []), strict=True)
        except ValueError as error:
            problems.append(Problem(f"config: {key}", str(error)))
            continue
        block = BLOCKS.get(key)
        strange = [entry for entry in entries if block and entry not in (block, f"Attn{block}")]
        if strange:
            message = f"received {shown(strange[0])}; supported are only {block} and Attn{block}"
            problems.append(Problem(f"config: {key}", message))
        elif block and entries:
            highest_first = entries if key == "down_block_types" else entries[::-1]
            attends = [level for level, entry in enumerate(highest_first) if entry != block]
            claims.append(Claim(key, "attn_levels", attends))
        elif entries:
            claims.append(Claim(key, "base_channels", entries[0]))
            claims.append(Claim(key, "channel_multiplier", [multiplier(width, entries[0]) for width in entries]))
    if problems:
        raise ConfigError(problems)
    return claims


def _inexpressible(config: VQGANConfig) -> Iterator[Problem]:
    if config.quantizer != "vq":
        yield Problem("checkpoint", f"its quantizer is {config.quantizer!r}; a VQModel only supports 'vq'")
    elif (config.quantizer_options or {}).get("l2_normalize"):
        yield Problem("checkpoint", "its quantizer_options.l2_normalize is true, which a VQModel does not support")
    if config.decoder_blocks != config.num_res_blocks + 1:
        has, allowed = config.decoder_num_res_blocks, config.num_res_blocks + 1
        yield Problem(
            "checkpoint",
            f"its decoder_num_res_blocks is {has}; a VQModel only supports {allowed}, one more than num_res_blocks",
        )
    if config.widths[0] != config.base_channels:
        message = f"its channel_multiplier begins with {config.channel_multiplier[0]}; a VQModel only supports 1"
        yield Problem("checkpoint", message)


def _is_attention(name: str) -> bool:
    return ".attn" in name and name.endswith(("q.weight", "k.weight", "v.weight", "proj_out.weight"))


def _is_linear(name: str, value: Tensor) -> bool:
    """Whether a weight belongs to a linear layer of attention, which is a 1×1 convolution in a VQGANModel."""
    return _is_attention(name) and value.ndim == 2
