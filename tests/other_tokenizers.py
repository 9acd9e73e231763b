"""Tokenizers of other code bases for the tests of the conversion.

An independent reference model, its results, and its weights under the names of each code base.
"""

import pytest
import torch
import yaml
from safetensors.torch import save_file


def images(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def reference(
    widths=(32, 64), attends=(), channels=3, layers=1, embed_dim=4, latent_channels=8, groups=32, size=16, **options
):
    """A VQModel of diffusers. Its entries have the distribution of the latents, so that images use many of them."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(len(widths) + channels)
    down = ["AttnDownEncoderBlock2D" if level in attends else "DownEncoderBlock2D" for level in range(len(widths))]
    up = ["AttnUpDecoderBlock2D" if level in attends else "UpDecoderBlock2D" for level in range(len(widths))]
    model = diffusers.VQModel(
        in_channels=channels,
        out_channels=channels,
        down_block_types=down,
        up_block_types=up[::-1],
        block_out_channels=widths,
        layers_per_block=layers,
        latent_channels=latent_channels,
        vq_embed_dim=embed_dim,
        num_vq_embeddings=24,
        norm_num_groups=groups,
        sample_size=size,
        **options,
    ).eval()
    factor = 2 ** (len(widths) - 1)
    latents = model.encode(images(6, channels, 2 * factor, 2 * factor)).latents
    model.quantize.embedding.weight.copy_(latents.permute(0, 2, 3, 1).flatten(0, 2)[:24])
    return model


@torch.no_grad()
def facts(model):
    """Codes and reconstructions of the reference, for two square images and a wide one, in the format of `--verify`."""
    factor, channels = 2 ** (len(model.config.block_out_channels) - 1), model.config.in_channels
    stored = {}
    for name, shape in {
        "io": (2, channels, 3 * factor, 3 * factor),
        "io2": (1, channels, 2 * factor, 5 * factor),
    }.items():
        pixels = images(*shape)
        latents = model.encode(pixels).latents
        stored[f"{name}.input"] = pixels
        stored[f"{name}.indices"] = model.quantize(latents)[2][2].flatten()
        stored[f"{name}.recon"] = model.decode(latents).sample.contiguous()
    return stored


def taming_weights(model, gradients=False):
    """The weights of the reference, or their gradients, with the names and shapes of taming-transformers."""
    last, weights = len(model.config.block_out_channels) - 1, {}
    tensors = {name: p.grad for name, p in model.named_parameters()} if gradients else model.state_dict()
    for name, value in tensors.items():
        parts = name.split(".")
        if parts[1] == "up_blocks":
            parts[2] = str(last - int(parts[2]))
        name = ".".join(parts)
        for theirs, ours in (
            ("down_blocks", "down"),
            ("up_blocks", "up"),
            ("mid_block.resnets.0", "mid.block_1"),
            ("mid_block.resnets.1", "mid.block_2"),
            ("mid_block.attentions.0", "mid.attn_1"),
            ("downsamplers.0", "downsample"),
            ("upsamplers.0", "upsample"),
            ("resnets", "block"),
            ("attentions", "attn"),
            ("conv_shortcut", "nin_shortcut"),
            ("conv_norm_out", "norm_out"),
            ("group_norm", "norm"),
            ("to_out.0", "proj_out"),
            ("to_", ""),
        ):
            name = name.replace(theirs, ours)
        weights[name] = value[:, :, None, None] if value.ndim == 2 and "attn" in name else value
    return weights


def taming_params(model):
    config = model.config
    widths, size = config.block_out_channels, config.sample_size
    attends = [size >> level for level, block in enumerate(config.down_block_types) if block.startswith("Attn")]
    return {
        "n_embed": config.num_vq_embeddings,
        "embed_dim": config.vq_embed_dim,
        "ddconfig": {
            "double_z": False,
            "z_channels": config.latent_channels,
            "resolution": size,
            "in_channels": config.in_channels,
            "out_ch": config.out_channels,
            "ch": widths[0],
            "ch_mult": [width // widths[0] for width in widths],
            "num_res_blocks": config.layers_per_block,
            "attn_resolutions": attends,
            "dropout": 0.0,
        },
        "lossconfig": {"target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", "params": {}},
    }


def llamagen_weights(model):
    """The weights of the reference with the names and shapes of LlamaGen."""
    last, weights = len(model.config.block_out_channels) - 1, {}
    for name, value in taming_weights(model).items():
        parts = name.split(".")
        if parts[1] == "up":
            parts[2] = str(last - int(parts[2]))
        name = ".".join(parts).replace(".up.", ".conv_blocks.").replace(".down.", ".conv_blocks.")
        name = name.replace("block_1", "0").replace("attn_1", "1").replace("block_2", "2").replace(".block.", ".res.")
        weights[name] = value
    return weights | {"quantize.codebook_used": torch.zeros(100)}


def write_taming(folder, model, weights=None, target="taming.models.vqgan.VQModel", **params):
    """Writes a Lightning checkpoint, its YAML, and the file for `--verify`."""
    state = {"state_dict": taming_weights(model) if weights is None else weights, "epoch": 3, "global_step": 1000}
    torch.save(state, folder / "last.ckpt")
    config = {"model": {"base_learning_rate": 4.5e-6, "target": target, "params": taming_params(model) | params}}
    (folder / "model.yaml").write_text(yaml.safe_dump(config))
    save_file(facts(model), folder / "facts.safetensors")
