"""Operations and bytes of an ideal implementation, which computes nothing twice.

Only matrix products and convolutions are counted, with two operations for a multiplication and its addition. The counts
come from forwards of the models on the device "meta", without data.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from benchmarks.machine import Ceilings
from stage1_vqgan import Stage1Config, VQGANConfig, VQGANModel
from stage1_vqgan.training.discriminator import PatchDiscriminator
from stage1_vqgan.training.losses import PerceptualLoss

META = torch.device("meta")


def count(forward: Callable[..., Any], *shape: int) -> int:
    """Operations of a forward on a tensor of a shape."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward(torch.empty(*shape, device=META))
    return counter.get_total_flops()


def encode_operations(config: VQGANConfig) -> int:
    """Operations to encode one image: encoder, projection, and a product with the codebook for each latent."""
    with META:
        model = VQGANModel(config)
    shape = 1, config.in_channels, *config.image_shape
    search = 2 * prod(config.grid) * config.num_embeddings * config.embed_dim
    return count(lambda x: model.quant_conv(model.encoder(x)), *shape) + search


def decode_operations(config: VQGANConfig) -> int:
    """Operations to decode one image from its codes."""
    with META:
        model = VQGANModel(config)
    shape = 1, config.embed_dim, *config.grid
    return count(lambda x: model.decoder(model.post_quant_conv(x)), *shape)


def training_step_operations(config: Stage1Config) -> int:
    """Operations for one image in a full training step of stage 1.

    A backward has twice the operations of its forward; with frozen weights it has as many as the forward.
    - Tokenizer: a forward and a backward.
    - LPIPS: forwards of image and reconstruction, and a backward to the reconstruction.
    - Discriminator, in the generator's update: a forward and a backward to the reconstruction.
    - Discriminator, in its own update: forwards and backwards of image and reconstruction.
    """
    model = config.vqgan_config()
    image = 1, model.in_channels, *model.image_shape
    total = 3 * (encode_operations(model) + decode_operations(model))
    if config.loss.perceptual_weight:
        perceptual = PerceptualLoss(config.loss.lpips_backbone, "random").to(META)
        total += 3 * count(lambda x: perceptual.lpips.net(x.expand(-1, 3, -1, -1)), *image)
    if config.loss.adversarial_weight:
        sizes = config.discriminator
        discriminator = PatchDiscriminator(model.in_channels, sizes.base_channels, sizes.num_layers).to(META)
        total += (2 + 2 * 3) * count(discriminator, *image)
    return total


def decode_floor(
    config: PreTrainedConfig, rows: int, length: int, num_codes: int, dtype: torch.dtype
) -> Callable[[Ceilings], float]:
    """Shortest possible seconds to sample the codes of a batch one after another, as a function of the ceilings.

    Each position reads all matrices once (only the codes' rows of the output layer), and the keys and values of all
    earlier positions. Its time is that of these reads or of the multiplications, whichever takes longer.

    Args:
        config: configuration of a causal language model.
        rows: number of sequences; with guidance, twice the number of images.
        length: number of codes of an image; the prompt is one token.
        num_codes: K.
        dtype: dtype of weights, keys and values.
    """
    with META:
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    matrices = [module.weight for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    weights = sum(weight.numel() for weight in matrices if weight is not head.weight) + num_codes * config.hidden_size
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads

    def seconds(ceilings: Ceilings) -> float:
        total = 0.0
        for seen in range(1, length + 1):
            operations = rows * (2 * weights + 4 * config.num_hidden_layers * heads * head_dim * seen)
            kept = rows * config.num_hidden_layers * 2 * key_value_heads * head_dim * seen
            total += ceilings.seconds(operations, (weights + kept) * dtype.itemsize)
        return total

    return seconds
