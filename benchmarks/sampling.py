"""Sampling of codes, compared with `transformers.generate` on the same prior; and of images, also compared with MONAI.

The priors are those of the presets, with random weights. `generate` has its default dynamic cache, or its static cache,
with which it compiles its forward on a GPU. With guidance, `generate` gets the null token as negative prompt; otherwise
it would use the class itself. The decoder of this project is reused in every call, as in `VQGANPipeline`.

Before the measurement, the greedy codes of the lanes are compared in float32. On a CPU all images must have the same
codes. On a GPU nine of ten images must, because rounding decides about one of ten thousand choices, and all later codes
of that image differ. The measurement samples at temperature 1.

On a GPU the modes of the sampler are lanes too: "eager" launches each kernel of a step, "without Triton" replays graphs
whose attention reads a window of the cache. "tessella" chooses by itself: graphs with the Triton attention, if it can.

The floor is `ideal.decode_floor`, plus the operations of the tokenizer's decoder for images.

MONAI's `VQVAETransformerInferer` gets a transformer with the layers and width of the prior, and MONAI's `VQVAE` with
the same grid of codes. These architectures differ from ours, so only the shapes of the images are compared.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import tokenizer
from benchmarks.case import OURS, Case, Prepared
from benchmarks.ideal import decode_floor, decode_operations
from benchmarks.machine import Ceilings
from benchmarks.peers import absent
from configs import load_config
from pipelines import VQGANPipeline
from stage1_vqgan import VQGANImageProcessor
from stage2_prior import Stage2Config, TokenLayout
from stage2_prior.prior import build_prior
from stage2_prior.sampling import graphs
from stage2_prior.sampling.decoder import EagerDecoder
from stage2_prior.sampling.decoders import make_decoder
from stage2_prior.sampling.loop import sample as draw
from stage2_prior.sampling.options import SamplingOptions


class Prior(NamedTuple):
    """A preset, changes of its settings, and the codebook size and grid of its codes."""

    preset: str
    changes: dict[str, Any]
    num_codes: int
    grid: tuple[int, int]


TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
LARGE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16}
PRIORS = {
    "digits": Prior("digits/stage2", {}, 256, (4, 4)),
    "fashion_mnist": Prior("fashion_mnist/stage2", {}, 512, (8, 8)),
    "111M": Prior("imagenet256/stage2", {}, 16384, (16, 16)),
    "343M": Prior("imagenet256/stage2", LARGE, 16384, (16, 16)),
    # these fit the narrow tokenizer of the suites cpu and tiny
    "narrow": Prior("fashion_mnist/stage2", {}, tokenizer.NARROW["num_embeddings"], (4, 4)),
    "tiny 111M": Prior("imagenet256/stage2", TINY, tokenizer.NARROW["num_embeddings"], (4, 4)),
    "tiny 343M": Prior("imagenet256/stage2", TINY, tokenizer.NARROW["num_embeddings"], (4, 4)),
}
# Prior, batch, guidance scale, and whether the codes are decoded into images.
Setting = tuple[str, int, float, bool]
SETTINGS: dict[str, list[Setting]] = {
    "cpu": [
        ("fashion_mnist", 1, 2.0, False),
        ("fashion_mnist", 64, 2.0, False),
        ("fashion_mnist", 64, 1.0, False),
        ("digits", 8, 2.0, False),
        ("narrow", 8, 2.0, True),
    ],
    "gpu": [
        *((prior, batch, 2.0, False) for batch in (64, 256, 1) for prior in ("111M", "343M")),
        *((prior, 64, guidance, True) for guidance in (2.0, 1.0) for prior in ("111M", "343M")),
        *((prior, batch, 1.0, False) for batch in (64, 256, 1) for prior in ("111M", "343M")),
        *((prior, 16, guidance, False) for guidance in (2.0, 1.0) for prior in ("111M", "343M")),
    ],
}
SETTINGS["tiny"] = [
    (f"tiny {prior}", 4 if decodes else batch, guidance, decodes) for prior, batch, guidance, decodes in SETTINGS["gpu"]
]
DYNAMIC, STATIC, MONAI = "generate, dynamic", "generate, static", "MONAI"
COMPILED, EAGER, WINDOWS = f"{OURS}, compiled", f"{OURS}, eager", f"{OURS}, without Triton"


def layout_of(name: str) -> TokenLayout:
    """The token layout of a prior."""
    prior = PRIORS[name]
    classes = tuple(map(str, range(1000 if prior.num_codes == 16384 else 10)))
    return TokenLayout(prior.num_codes, classes, prior.grid, 16, "benchmark")


def make_prior(name: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Builds a prior with random weights, large enough that its logits vary like those of a trained prior."""
    preset, changes, *_ = PRIORS[name]
    values = {f"model.{key}": value for key, value in changes.items()}
    model = load_config(Stage2Config, preset, values).model
    torch.manual_seed(0)
    with device:
        prior = build_prior({**model, "initializer_range": 0.06}, layout_of(name))
    return prior.to(device, dtype).eval()  # type: ignore[arg-type]


def prompts_of(layout: TokenLayout, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts of the classes in turn, and prompts of the null token, `(B, 1)` each."""
    prompts = layout.class_tokens(torch.arange(batch) % layout.num_classes)[:, None].to(device)
    return prompts, torch.full_like(prompts, layout.null_token)


def decoder_of(lane: str, prior: PreTrainedModel, rows: int, length: int, num_codes: int) -> EagerDecoder:
    """The decoder of a lane of this project."""
    if lane == EAGER:
        return EagerDecoder(prior, rows, length)
    if lane == WINDOWS:
        with patch.object(graphs, "use_decode_attention", return_value=False):
            return graphs.GraphDecoder(prior, rows, length)
    return make_decoder(prior, rows, length, num_codes, compiled=lane == COMPILED)


def sample(
    lane: str, prior: PreTrainedModel, layout: TokenLayout, batch: int, guidance: float, greedy: bool
) -> Callable[[], Tensor]:
    """A function that samples int64 codes `(batch, L)`."""
    prompts, nulls = prompts_of(layout, batch, prior.device)
    if lane.startswith(OURS):
        options = SamplingOptions(guidance_scale=guidance, temperature=0.0 if greedy else 1.0)
        rows, sizes = batch * options.rows_per_image, (layout.length, layout.num_codes)
        decoder = decoder_of(lane, prior, rows, *sizes)
        seeds = torch.arange(batch, device=prior.device)
        return partial(draw, decoder, prompts, nulls, seeds, *sizes, options)
    settings: dict[str, Any] = {"do_sample": not greedy, "attention_mask": torch.ones_like(prompts)}
    if lane == STATIC:
        settings["cache_implementation"] = "static"
    if guidance != 1:
        settings |= {
            "guidance_scale": guidance,
            "negative_prompt_ids": nulls,
            "negative_prompt_attention_mask": torch.ones_like(nulls),
        }
    return lambda: prior.generate(prompts, **settings)[:, 1:]  # type: ignore[operator]


def images(lane: str, prior: PreTrainedModel, suite: str, layout: TokenLayout, batch: int, guidance: float) -> Prepared:
    """A function that generates images `(batch, 3, H, W)` in [0, 1]."""
    vqgan = copy.deepcopy(tokenizer.tokenizer(suite))
    processor = VQGANImageProcessor(vqgan.config.image_size, vqgan.config.in_channels)
    vqgan.config.fingerprint = layout.tokenizer_fingerprint
    pipeline = VQGANPipeline(vqgan, prior, processor, layout).to(prior.device, prior.dtype)
    pipeline.set_progress_bar_config(disable=True)
    if lane.startswith(OURS):
        if lane == COMPILED:
            pipeline.compile()
        labels = (torch.arange(batch) % layout.num_classes).tolist()
        settings: dict[str, Any] = {"class_labels": labels, "guidance_scale": guidance, "output_type": "pt"}
        return lambda: pipeline.generate(**settings).images
    write_codes = sample(lane, prior, layout, batch, guidance, False)

    def generate() -> Tensor:
        codes = write_codes().view(-1, *layout.grid)
        return vqgan.decode_codes(codes).float().clamp(-1, 1) / 2 + 0.5

    return torch.no_grad()(generate)


def monai(suite: str, name: str, batch: int, device: torch.device, dtype: torch.dtype) -> Prepared:
    """A function that generates images of the same size with MONAI."""
    from monai.inferers import VQVAETransformerInferer
    from monai.networks.nets import VQVAE, DecoderOnlyTransformer
    from monai.utils import OrderingType
    from monai.utils.ordering import Ordering

    layout, config = layout_of(name), tokenizer.configuration(suite)
    prior = make_prior(name, torch.device("meta"), dtype).config
    widths = config.widths[1:]
    torch.manual_seed(0)
    vqvae = VQVAE(
        spatial_dims=2,
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        channels=widths,
        num_res_channels=widths,
        num_res_layers=config.num_res_blocks,
        downsample_parameters=[(2, 4, 1, 1)] * len(widths),
        upsample_parameters=[(2, 4, 1, 1, 0)] * len(widths),
        num_embeddings=config.num_embeddings,
        embedding_dim=config.embed_dim,
    )
    transformer = DecoderOnlyTransformer(
        num_tokens=config.num_embeddings + 1,
        max_seq_len=layout.length + 1,
        attn_layers_dim=prior.hidden_size,
        attn_layers_depth=prior.num_hidden_layers,
        attn_layers_heads=prior.num_attention_heads,
        use_flash_attention=True,
    )
    ordering = Ordering(OrderingType.RASTER_SCAN.value, 2, (config.in_channels, *layout.grid))
    start = torch.full((batch, 1), config.num_embeddings, device=device)
    return partial(
        VQVAETransformerInferer().sample,
        layout.grid,
        start,
        vqvae.to(device, dtype).eval(),
        transformer.to(device, dtype).eval(),
        ordering,
        verbose=False,
    )


def prepared(lane: str, suite: str, setting: Setting, device: torch.device, dtype: torch.dtype) -> Prepared:
    """Prepares a lane with a new prior."""
    name, batch, guidance, decodes = setting
    if lane == MONAI:
        return monai(suite, name, batch, device, dtype)
    prior, layout = make_prior(name, device, dtype), layout_of(name)
    if decodes:
        return images(lane, prior, suite, layout, batch, guidance)
    return sample(lane, prior, layout, batch, guidance, False)


@cache
def agree(name: str, batch: int, guidance: float, device: torch.device) -> Mapping[str, Any]:
    """Fraction of images whose greedy codes all equal those of this project, by lane.

    Raises:
        AssertionError: the fraction is below 1, or on a GPU below 0.9. For a tiny prior the bound is 0.8: its sixteen
            images have ten classes, so one near-tie changes two images.
    """
    prior, layout = make_prior(name, device, torch.float32), layout_of(name)
    lanes = [OURS, DYNAMIC, *([STATIC] if device.type == "cpu" else [])]
    with torch.no_grad():
        codes = {lane: sample(lane, prior, layout, batch, guidance, True)() for lane in lanes}
    expected = codes.pop(OURS)
    found = {lane: (other == expected).all(1).float().mean().item() for lane, other in codes.items()}
    least = 0.8 if name.startswith("tiny") else 1.0 if device.type == "cpu" else 0.9
    assert min(found.values()) >= least, found
    return {"images with the same greedy codes": found}


def floor(suite: str, setting: Setting, dtype: torch.dtype, ceilings: Ceilings) -> float:
    """Shortest possible seconds of a call."""
    name, batch, guidance, decodes = setting
    config = make_prior(name, torch.device("meta"), dtype).config
    layout = layout_of(name)
    seconds = decode_floor(config, batch * (2 if guidance != 1 else 1), layout.length, layout.num_codes, dtype)(
        ceilings
    )
    return seconds + (ceilings.seconds(batch * decode_operations(tokenizer.configuration(suite))) if decodes else 0)


def cases(suite: str, device: torch.device, data: str | None) -> Iterator[Case]:
    """One case for each setting."""
    dtype = torch.float32 if suite == "cpu" else torch.bfloat16
    missing = absent({MONAI: "monai.inferers"})
    for setting in SETTINGS[suite]:
        name, batch, guidance, decodes = setting
        # on a GPU, the slow default (dynamic) cache is measured at one batch only
        timed = [lane for lane in (OURS, DYNAMIC, STATIC) if lane != DYNAMIC or suite == "cpu" or batch == 64]
        if suite != "cpu":
            timed[1:1] = [COMPILED] if decodes else [COMPILED, EAGER, WINDOWS]
        if decodes and guidance != 1 and not missing:
            timed.append(MONAI)
        lanes: dict[str, Callable[[], Prepared]] = {
            lane: partial(prepared, lane, suite, setting, device, dtype) for lane in timed
        }
        of_guidance = "no guidance" if guidance == 1 else f"guidance {guidance:g}"
        yield Case(
            row="sampling",
            setting=f"{name}, batch {batch}, {of_guidance}" + (", images" if decodes else ", codes"),
            lanes=lanes,
            agree=partial(agree, name, batch if suite == "cpu" else 16, guidance, device),
            unit="images/s",
            count=batch,
            floor=partial(floor, suite, setting, dtype),
            dtype=dtype,
            absent=missing if decodes else {},
        )
