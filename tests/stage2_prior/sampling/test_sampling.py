"""The sampler, compared with transformers' `generate`, with a loop without a cache, and with other batch sizes."""

import gc
import itertools
import re
import subprocess
import sys
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from configs.randomness import exponential
from stage2_prior import sample, sample_codes
from stage2_prior.compat import cache_argument
from stage2_prior.sampling import loop
from stage2_prior.sampling.decoder import EagerDecoder
from stage2_prior.sampling.decoders import make_decoder
from stage2_prior.sampling.guidance import Guidance
from stage2_prior.sampling.loop import filter_logits, pick
from stage2_prior.sampling.options import SamplingOptions
from tests.devices import DEVICE, EXACT_ON_CPU, on_device
from tests.slow import few

pytestmark = on_device

MODEL_TYPES = ["llama", "gpt2", "qwen3"]
OPTIONS = [
    {},
    {"guidance_scale": 2.5},
    {"guidance_scale": 0.0},
    {"temperature": 0.0},
    {"temperature": 0.0, "guidance_scale": 3.0},
    {"guidance_scale": 3.0, "guidance_schedule": "linear"},
    {"guidance_scale": 3.0, "guidance_schedule": "cosine", "guidance_power": 2.0, "temperature": 0.0},
    {"guidance_scale": 3.0, "guidance_interval": (0.25, 0.7)},
    {"guidance_scale": 3.0, "guidance_interval": (0.0, 0.5)},
    {"temperature": 0.7, "top_k": 12, "top_p": 0.9, "min_p": 0.02, "guidance_scale": 1.5},
]
PAIRS = list(itertools.product(MODEL_TYPES, OPTIONS))
# of every model type, without and with guidance, its schedule and interval, and the filters
QUICK_PAIRS = [("llama", OPTIONS[6]), ("llama", OPTIONS[7]), ("gpt2", OPTIONS[9]), ("qwen3", OPTIONS[1])]


def draw(prior, layout, labels, seeds, **options):
    prompts = layout.class_tokens(labels)[:, None]
    nulls = torch.full_like(prompts, layout.null_token)
    return sample_codes(prior, prompts, nulls, seeds, layout.length, layout.num_codes, SamplingOptions(**options))


def draw_with(decoder, layout, labels, seeds, **options):
    prompts = layout.class_tokens(labels)[:, None]
    nulls = torch.full_like(prompts, layout.null_token)
    return sample(decoder, prompts, nulls, seeds, layout.length, layout.num_codes, SamplingOptions(**options))


def noise(seeds, position, num_codes):
    return exponential(seeds[:, None], torch.tensor(position), torch.arange(num_codes))


@torch.no_grad()
def draw_naively(prior, layout, labels, seeds, **options):
    """Samples without a cache, with two forwards for guidance."""
    options = SamplingOptions(**options)
    scales = options.scales(layout.length)[:, 0, 0].tolist()
    conditional = layout.class_tokens(labels)[:, None]
    unconditional = torch.full_like(conditional, layout.null_token)
    for position in range(layout.length):
        logits = prior(input_ids=conditional, use_cache=False).logits[:, -1, : layout.num_codes]
        if scales[position] != 1:
            free = prior(input_ids=unconditional, use_cache=False).logits[:, -1, : layout.num_codes]
            logits = free + scales[position] * (logits - free)
        code = pick(logits, noise(seeds, position, layout.num_codes), options)[:, None]
        conditional, unconditional = torch.cat([conditional, code], 1), torch.cat([unconditional, code], 1)
    return conditional[:, 1:]


# Some images without guidance, some with the same scale, and a scale of 0.
SCALES_OF_IMAGES = (2.5, 1.0, 3.0, 1.0, 0.0, 2.5, 8.0)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"guidance_schedule": "linear", "temperature": 0.0}, marks=pytest.mark.slow),
        {"guidance_schedule": "cosine", "guidance_power": 0.5, "guidance_interval": (0.25, 0.7), "top_k": 12},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "make", [make_decoder, lambda prior, rows, length, num_codes: EagerDecoder(prior, rows, length)]
)
def test_each_image_has_the_codes_of_its_own_guidance_scale(random_prior, layout, make, options):
    prior, labels, seeds = random_prior("llama", layout), torch.arange(7) % 5, torch.arange(100, 107)
    decoder = make(prior, 14, layout.length, layout.num_codes)
    codes = draw_with(decoder, layout, labels, seeds, guidance_scale=(SCALES_OF_IMAGES,), **options)
    expected = [
        draw_with(decoder, layout, labels[n : n + 1], seeds[n : n + 1], guidance_scale=scale, **options)[0]
        for n, scale in enumerate(SCALES_OF_IMAGES)
    ]
    assert torch.equal(codes, torch.stack(expected))
    unguided = draw_with(decoder, layout, labels, seeds, **options)
    assert [torch.equal(*rows) for rows in zip(codes, unguided, strict=True)] == [s == 1 for s in SCALES_OF_IMAGES]


def test_guided_logits_of_images_are_bitwise_those_of_their_own_scales():
    """Codes would not show how the formulas round."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 100, generator=generator)
    table = ((1.3, 1.0, 2.7, 1.0), (1.0, 1.0, 0.2, 1.9))  # image 0 has one group, 1 none, 2 both, 3 the other one
    settings = {"guidance_schedule": "linear"}
    together = Guidance(SamplingOptions(guidance_scale=table, **settings), 5, DEVICE)
    for step in together.steps:
        guided = together(logits.flatten(0, 1), step)
        for image in range(4):
            c, *without = logits[:, image]
            own = [(table[group][image], u) for group, u in enumerate(without) if table[group][image] != 1]
            expected = c[None]
            if own:
                alone = Guidance(SamplingOptions(guidance_scale=tuple(s for s, _ in own), **settings), 5, DEVICE)
                expected = alone(torch.stack([c, *(u for _, u in own)]), step)
            assert torch.equal(guided[image], expected[0])


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_greedy_codes_are_those_of_generate(random_prior, layout, model_type):
    prior, labels = random_prior(model_type, layout), torch.arange(5)
    prompts = layout.class_tokens(labels)[:, None]
    expected = prior.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False)[:, 1:]
    codes = draw(prior, layout, labels, torch.arange(5), temperature=0.0)
    assert len(expected.unique()) > 5  # the prior does not repeat one code
    assert torch.equal(codes, expected)


@pytest.mark.parametrize(("model_type", "options"), few(PAIRS, *QUICK_PAIRS, ("llama", OPTIONS[0])), ids=str)
def test_codes_are_those_of_a_loop_without_cache(random_prior, layout, model_type, options):
    prior, labels, seeds = random_prior(model_type, layout), torch.arange(5).repeat(3), torch.arange(100, 115)
    codes = draw(prior, layout, labels, seeds, **options)
    assert torch.equal(codes, draw_naively(prior, layout, labels, seeds, **options))


@pytest.mark.parametrize(("model_type", "options"), few(PAIRS, *QUICK_PAIRS), ids=str)
def test_the_fastest_decoder_chooses_the_codes_of_the_eager_one(random_prior, layout, model_type, options, monkeypatch):
    prior, labels, seeds = random_prior(model_type, layout), torch.arange(5).repeat(3), torch.arange(100, 115)
    expected = draw_with(EagerDecoder(prior, 30, layout.length), layout, labels, seeds, **options)
    decoder = make_decoder(prior, 30, layout.length, layout.num_codes)
    assert type(decoder) is not EagerDecoder
    assert torch.equal(draw_with(decoder, layout, labels, seeds, **options), expected)
    monkeypatch.setattr(loop, "LARGEST_TABLE", 0)  # noise position by position
    assert torch.equal(draw_with(decoder, layout, labels, seeds, **options), expected)  # reuses memory of the last call


def test_a_decoder_frees_its_memory_at_once(random_prior, layout):
    """Keys and values of a batch may fill a GPU: they must not wait for the garbage collector."""
    decoder = make_decoder(random_prior("llama", layout), 6, layout.length, layout.num_codes)
    gc.disable()
    try:
        draw_with(decoder, layout, torch.arange(3), torch.arange(3), guidance_scale=2.0)
        buffer = weakref.ref(decoder.cache.layers[0].buffers[0])
        assert buffer() is not None
        del decoder
        assert buffer() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("model_type", "options"),
    few(
        itertools.product(MODEL_TYPES, [{}, {"guidance_scale": 2.0, "top_p": 0.95}]),
        ("llama", {"guidance_scale": 2.0, "top_p": 0.95}),
    ),
    ids=str,
)
def test_an_image_does_not_depend_on_its_batch(random_prior, layout, model_type, options):
    prior, labels = random_prior(model_type, layout), torch.arange(64) % 5
    seeds = torch.randint(2**62, (64,), generator=torch.Generator().manual_seed(0))

    def in_batches(size, rows):
        decoder = make_decoder(prior, 2 * size, layout.length, layout.num_codes)
        parts = rows.split(size)
        return torch.cat([draw_with(decoder, layout, labels[part], seeds[part], **options) for part in parts])

    together = in_batches(64, torch.arange(64))
    for size, rows in [(7, torch.arange(63)), (1, torch.arange(0, 64, 8))]:
        assert torch.equal(in_batches(size, rows), together[rows])
    assert torch.equal(in_batches(64, torch.arange(64).flip(0)).flip(0), together)


@pytest.mark.parametrize("temperature", few([0.0, 1.0, 5.0], 5.0))
def test_only_codes_are_ever_chosen(random_prior, layout, temperature):
    prior = random_prior("llama", layout)
    with torch.no_grad():
        prior.lm_head.weight[layout.num_codes :] *= 100  # without a filter, it would nearly always sample other tokens
    favourites = prior(input_ids=torch.tensor([[layout.null_token]])).logits[0, -1].topk(10).indices
    assert (favourites >= layout.num_codes).all()
    codes = draw(prior, layout, torch.arange(50) % 5, torch.arange(50), temperature=temperature, guidance_scale=2.0)
    assert codes.min() >= 0 and codes.max() < layout.num_codes


def test_seeds_decide_samples_but_not_greedy_codes(random_prior, layout):
    prior, labels, seeds = random_prior("llama", layout), torch.zeros(4, dtype=torch.int64), torch.arange(4)
    sampled = draw(prior, layout, labels, seeds)
    assert len(sampled.unique(dim=0)) == 4
    greedy = draw(prior, layout, labels, seeds, temperature=0.0, top_k=3, top_p=0.5, min_p=0.5)
    assert len(greedy.unique(dim=0)) == 1


def test_on_step_sees_every_position(random_prior, layout):
    steps = []
    prompts = torch.full((3, 1), layout.null_token)
    codes = sample_codes(
        random_prior("gpt2", layout),
        prompts,
        prompts,
        torch.arange(3),
        layout.length,
        layout.num_codes,
        SamplingOptions(),
        lambda position, chosen: steps.append((position, chosen.clone())),
    )
    assert [position for position, _ in steps] == list(range(16))
    assert torch.equal(torch.stack([chosen for _, chosen in steps], 1), codes)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.3},
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 49},
        {"top_k": 50},
        {"top_k": 1000},
        {"top_p": 0.9},
        {"top_p": 0.3},
        {"top_p": 1e-6},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"temperature": 2.0, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
        {"temperature": 0.5, "top_k": 30, "top_p": 0.95, "min_p": 0.3},
    ],
    ids=str,
)
def test_filters_are_those_of_transformers(options):
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)) * 3
    warpers = {
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    reference = LogitsProcessorList([warpers[name](value) for name, value in options.items()])(None, logits)
    filtered = filter_logits(logits, SamplingOptions(**options))
    assert torch.equal(filtered.isfinite(), reference.isfinite())
    torch.testing.assert_close(filtered.softmax(-1), reference.softmax(-1))


def test_filters_always_keep_the_most_likely_code():
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(1)) * 3
    for options in ({"top_p": 1e-9}, {"top_k": 1}, {"min_p": 1.0}):
        filtered = filter_logits(logits, SamplingOptions(**options))
        assert (filtered.isfinite().sum(1) == 1).all() and torch.equal(filtered.argmax(1), logits.argmax(1))


@pytest.mark.parametrize("position", [0, 3])
def test_picks_follow_the_probabilities(position):
    probabilities = np.array([0.5, 0.25, 0.15, 0.07, 0.03])
    logits = torch.tensor(probabilities).log().float().expand(20_000, 5)
    numbers = noise(torch.arange(20_000), position, 5)
    codes = pick(logits, numbers, SamplingOptions()).cpu()
    assert stats.chisquare(np.bincount(codes, minlength=5), probabilities * 20_000).pvalue > 1e-3
    kept = pick(logits, numbers, SamplingOptions(top_k=3)).cpu()
    assert stats.chisquare(np.bincount(kept), probabilities[:3] / 0.9 * 20_000).pvalue > 1e-3


def filtered_naively(probabilities, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """One filter after another over a sorted list; returns the probabilities of the codes, 0 for excluded codes."""
    scaled = probabilities ** (1 / temperature)
    left = [(p, code) for code, p in enumerate(scaled / scaled.sum())]
    left.sort(reverse=True)
    if top_k:
        left = left[:top_k]
    if top_p < 1:
        total, kept, so_far = sum(p for p, _ in left), [], 0.0
        for p, code in left:
            if so_far < top_p:
                kept.append((p, code))
            so_far += p / total
        left = kept
    left = [(p, code) for p, code in left if p >= min_p * left[0][0]]
    result = np.zeros(len(probabilities))
    for p, code in left:
        result[code] = p
    return result / result.sum()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 4},
        {"top_p": 0.8},
        {"min_p": 0.15},
        {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "min_p": 0.1},
    ],
    ids=str,
)
def test_draws_have_the_distribution_of_a_naive_filter(options):
    probabilities = np.random.default_rng(0).dirichlet(np.full(12, 0.8))
    logits = torch.tensor(probabilities).log().float().expand(50_000, 12)
    codes = pick(logits, noise(torch.arange(50_000), 3, 12), SamplingOptions(**options)).cpu()
    expected, counts = filtered_naively(probabilities, **options), np.bincount(codes, minlength=12)
    assert counts[expected == 0].sum() == 0
    assert stats.chisquare(counts[expected > 0], expected[expected > 0] * 50_000).pvalue > 1e-3


def test_guided_draws_have_the_distribution_of_the_guided_logits(random_prior, layout):
    """Samples the first code of many images, with all steps from the prompt to the code."""
    prior = random_prior("llama", layout)
    with torch.no_grad():
        tokens = torch.tensor([[layout.num_codes + 1], [layout.null_token]])
        logits = prior(input_ids=tokens).logits[:, -1, : layout.num_codes].double()
    expected = (logits[1] + 1.7 * (logits[0] - logits[1])).softmax(-1).cpu().numpy()
    labels = torch.ones(20_000, dtype=torch.int64)
    layout = replace(layout, grid=(1, 1))
    codes = draw_with(EagerDecoder(prior, 40_000, 1), layout, labels, torch.arange(20_000), guidance_scale=1.7).cpu()
    often = expected * 20_000 > 5
    counts = np.bincount(codes[:, 0], minlength=layout.num_codes)
    pooled = [[*values[often], values[~often].sum()] for values in (counts, expected * 20_000)]
    assert stats.chisquare(*pooled).pvalue > 1e-3


TWO_PROCESSES = """
import sys, torch
from pipelines import VQGANPipeline
folder, rank, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
pipeline = VQGANPipeline.from_pretrained(folder)
numbers = range(rank, 64, 2)
generators = [torch.Generator().manual_seed(n) for n in numbers]
labels = [n % 10 for n in numbers]
torch.save(pipeline.generate(labels, guidance_scale=2.0, generator=generators, output_type="codes").codes, out)
"""


@pytest.mark.slow
def test_two_processes_make_the_images_of_one(tiny_runs, tiny_pipeline, tmp_path):
    files = [tmp_path / f"{rank}.pt" for rank in range(2)]
    started = [
        subprocess.Popen([sys.executable, "-c", TWO_PROCESSES, str(tiny_runs.pipeline), str(rank), str(file)])
        for rank, file in enumerate(files)
    ]
    generators = [torch.Generator().manual_seed(n) for n in range(64)]
    labels = [n % 10 for n in range(64)]
    expected = tiny_pipeline.generate(labels, guidance_scale=2.0, generator=generators, output_type="codes").codes.cpu()
    assert [process.wait() for process in started] == [0, 0]
    for rank, file in enumerate(files):
        assert torch.equal(torch.load(file, weights_only=True), expected[rank::2])


def test_picks_at_two_positions_are_independent():
    logits, seeds = torch.zeros(20_000, 4), torch.arange(20_000)
    first, second = (pick(logits, noise(seeds, position, 4), SamplingOptions()).cpu() for position in (0, 1))
    table = np.bincount(first * 4 + second, minlength=16).reshape(4, 4)
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_a_pick_is_the_winner_of_its_noise():
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    codes = pick(logits, noise(torch.arange(6), 2, 9), SamplingOptions(temperature=0.5))
    for row in range(6):
        times = [exponential(torch.tensor(row), torch.tensor(2), torch.tensor(code)) for code in range(9)]
        rates = (logits[row] / 0.5).exp()
        assert codes[row] == int(np.argmin([(time / rate).item() for time, rate in zip(times, rates, strict=True)]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, value) for name in ("guidance_scale", "temperature", "top_k", "top_p", "min_p")
          for value in (-1, float("nan"), float("inf"), float("-inf"))],
        ("top_k", 1.5),
        ("top_p", 0),
        ("top_p", 1.01),
        ("min_p", 1.01),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name}: received {value!r}; allowed is"):
        SamplingOptions(**{name: value})


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (((2.0, True),), "guidance_scale: received True; allowed is"),
        (((2.0, float("nan")),), "guidance_scale: received nan; allowed is"),
        ((((2.0,),),), "guidance_scale: received (2.0,); allowed is"),
        (((2.0, 3.0), (1.0, 2.0, 3.0)), "guidance_scale: received scales for [2, 3] images; give lists of one length"),
    ],
)
def test_wrong_scales_of_images_are_refused(scale, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SamplingOptions(guidance_scale=scale)


def test_a_whole_number_as_float_is_a_top_k(random_prior, layout):
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        filter_logits(logits, SamplingOptions(top_k=2.0)), filter_logits(logits, SamplingOptions(top_k=2))
    )


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@torch.inference_mode()
def test_the_eager_decoder_reads_as_with_transformers_own_cache(random_prior, layout, model_type):
    prior = random_prior(model_type, layout)
    tokens = torch.randint(layout.num_codes, (3, 16), generator=torch.Generator().manual_seed(0))
    decoder, dynamic = EagerDecoder(prior, 3, 16), DynamicCache()
    for start, stop in [(0, 5), *((n, n + 1) for n in range(5, 16))]:
        settings = {"use_cache": True, "logits_to_keep": 1, cache_argument(prior): dynamic}
        expected = prior(input_ids=tokens[:, start:stop], **settings).logits
        read = decoder.read(slice(0, 3), tokens[:, start:stop], start)
        torch.testing.assert_close(read, expected[:, -1], **EXACT_ON_CPU)
    for mine, theirs in zip(decoder.cache.layers, dynamic.layers, strict=True):
        torch.testing.assert_close((mine.keys, mine.values), (theirs.keys, theirs.values), **EXACT_ON_CPU)


@pytest.mark.parametrize("rows", few([slice(0, 2), slice(2, 4), slice(0, 4)], slice(2, 4)))
@torch.inference_mode()
def test_a_decoder_may_read_from_an_earlier_place_again(random_prior, layout, rows):
    prior = random_prior("llama", layout)
    tokens = torch.randint(layout.num_codes, (4, 16), generator=torch.Generator().manual_seed(1))
    decoder = make_decoder(prior, 4, 16, layout.num_codes)
    decoder.read(slice(0, 4), tokens.flip(0), 0)
    decoder.read(rows, tokens[rows, :9], 0)
    expected = prior(input_ids=tokens[rows, :10], use_cache=False).logits[:, -1]
    torch.testing.assert_close(decoder.read(rows, tokens[rows, 9:10], 9), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("temperature", "fault"),
    few(
        itertools.product(
            [0.0, 1.0], ["a NaN in the output layer", "an infinity in the embedding", {"guidance_scale": 3e38}]
        ),
        (0.0, "a NaN in the output layer"),
        (1.0, "an infinity in the embedding"),
        (1.0, {"guidance_scale": 3e38}),
    ),
    ids=str,
)
def test_logits_that_are_not_finite_are_an_error(random_prior, layout, fault, temperature):
    prior, options = random_prior("llama", layout), {"temperature": temperature}
    with torch.no_grad():
        if fault == "a NaN in the output layer":
            prior.lm_head.weight[3, 0] = float("nan")
        elif fault == "an infinity in the embedding":
            prior.get_input_embeddings().weight[layout.num_codes :] = float("inf")
        else:
            options |= fault
            prior.lm_head.weight.mul_(100)
    with pytest.raises(FloatingPointError, match=r"the logits of \d+ of 5 images were NaN or infinite"):
        draw(prior, layout, torch.arange(5), torch.arange(5), **options)


@pytest.mark.parametrize(("name", "value"), [("temperature", 1e-50), ("top_p", 1e-300), ("guidance_scale", 1e300)])
def test_options_that_float32_cannot_hold_are_refused(name, value):
    with pytest.raises(ValueError, match=re.escape(f"{name}: received {value}; allowed is")):
        SamplingOptions(**{name: value})


def test_the_smallest_options_take_the_most_likely_code(random_prior, layout):
    prior, seeds = random_prior("llama", layout), torch.arange(5)
    greedy = draw(prior, layout, torch.arange(5), seeds, temperature=0.0)
    for options in ({"temperature": 2e-38}, {"top_p": 2e-38}):
        assert torch.equal(draw(prior, layout, torch.arange(5), seeds, **options), greedy)


def test_nothing_waits_for_the_device_between_codes(random_prior, layout):
    """Each read of a number on the host makes a GPU wait; the loop has one, after the last code."""
    decoder = EagerDecoder(random_prior("llama", layout), 6, layout.length)

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Reads.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)
            return function(*args, **(kwargs or {}))

    with Reads():
        draw_with(decoder, layout, torch.arange(3), torch.arange(3), guidance_scale=2.0, top_p=0.9, top_k=9, min_p=0.1)
    assert Reads.count == 1
