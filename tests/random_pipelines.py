"""Random pipelines for tests: untrained, but images use many of their codes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipelines import VQGANPipeline
from stage1_vqgan import VQGANConfig, VQGANImageProcessor, VQGANModel
from stage2_prior import TokenLayout
from tests import tiny
from tests.devices import DEVICE

QUANTIZERS = {
    "one code": {},
    "residual": {"quantizer": "residual", "quantizer_options": {"depth": 2}},
    "pyramid": {"quantizer": "pyramid", "quantizer_options": {"hidden_channels": 8, "num_res_blocks": 1}},
}
PRIORS = {"causal": "llama", "masked": "bert"}  # architecture of each family


def coarse_noise(count: int, *size: int, seed: int = 0) -> np.ndarray:
    """Gray images uint8 `(count, *size)`, coarse noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 4, 4), np.uint8)
    return np.stack([np.array(Image.fromarray(image).resize(size[::-1])) for image in coarse])


@torch.no_grad()
def random_pipeline(random_prior: Callable[..., Any], kind: str = "one code", family: str = "causal") -> VQGANPipeline:
    """A pipeline for gray images of 16×16 pixels. Its encoder has attention.

    Args:
        random_prior: the fixture.
        kind: of the tokenizer, in QUANTIZERS.
        family: of the prior, in PRIORS.
    """
    torch.manual_seed(0)
    vqgan = VQGANModel(VQGANConfig(**tiny.VQGAN | {"attn_resolutions": [4]}, **QUANTIZERS[kind]))
    latents = vqgan.encode(torch.rand(64, 1, 16, 16) * 2 - 1).latents
    for index, codebook in enumerate(vqgan.quantize.codebooks):
        rows = vqgan.quantize.inputs(latents)[index]
        codebook.place_entries(rows[torch.randperm(len(rows))[: codebook.num_embeddings]])
    config = vqgan.config
    fingerprint = config.fingerprint = vqgan.compute_fingerprint()
    layout = TokenLayout(32, ("ant", "bee", "cat"), config.grid, 4, fingerprint, grids=config.grids, family=family)
    pipeline = VQGANPipeline(vqgan, random_prior(PRIORS[family], layout), VQGANImageProcessor(16, 1), layout)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(DEVICE)
