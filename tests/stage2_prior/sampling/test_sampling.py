"""The sampler against transformers' own generation, against a loop without a cache, and against itself in other
batches."""

import gc
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from configs.randomness import exponential
from stage2_prior import sample_codes
from stage2_prior.sampling import loop as sampling
from stage2_prior.sampling.cache import PreallocatedCache
from stage2_prior.sampling.captured_steps import CapturedSteps
from stage2_prior.sampling.loop import CodeSampler, filter_logits, pick
from stage2_prior.sampling.options import SamplingOptions
from tests.devices import EXACT_ON_CPU, on_device

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


def draw(prior, layout, labels, seeds, **options):
    prompts = layout.class_tokens(labels)[:, None]
    nulls = torch.full_like(prompts, layout.null_token)
    return sample_codes(prior, prompts, nulls, seeds, layout.length, layout.num_codes, SamplingOptions(**options))


def make_sampler(prior, layout, batch_size, compiled=False, **options):
    return CodeSampler(prior, batch_size, 1, layout.length, layout.num_codes, SamplingOptions(**options), compiled)


def race(seeds, position, num_codes):
    return exponential(seeds[:, None], torch.tensor(position), torch.arange(num_codes))


@torch.no_grad()
def draw_naively(prior, layout, labels, seeds, **options):
    """No cache, and guidance in two passes."""
    options = SamplingOptions(**options)
    scales = options.scales(layout.length)
    conditional = layout.class_tokens(labels)[:, None]
    unconditional = torch.full_like(conditional, layout.null_token)
    for position in range(layout.length):
        logits = prior(input_ids=conditional, use_cache=False).logits[:, -1, : layout.num_codes]
        if scales[position] != 1:
            free = prior(input_ids=unconditional, use_cache=False).logits[:, -1, : layout.num_codes]
            logits = free + scales[position] * (logits - free)
        code = pick(logits, race(seeds, position, layout.num_codes), options)[:, None]
        conditional, unconditional = torch.cat([conditional, code], 1), torch.cat([unconditional, code], 1)
    return conditional[:, 1:]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_greedy_codes_are_those_of_generate(random_prior, layout, model_type):
    prior, labels = random_prior(model_type, layout), torch.arange(5)
    prompts = layout.class_tokens(labels)[:, None]
    expected = prior.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False)[:, 1:]
    codes = draw(prior, layout, labels, torch.arange(5), temperature=0.0)
    assert len(expected.unique()) > 5  # the prior does not repeat one code
    assert torch.equal(codes, expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_codes_are_those_of_a_loop_without_cache(random_prior, layout, model_type, options):
    prior, labels, seeds = random_prior(model_type, layout), torch.arange(5).repeat(3), torch.arange(100, 115)
    codes = draw(prior, layout, labels, seeds, **options)
    assert torch.equal(codes, draw_naively(prior, layout, labels, seeds, **options))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_steps_in_windows_choose_the_same_codes(random_prior, layout, model_type, options, monkeypatch):
    """The steps that CUDA graphs record: what they see beyond what is written must not count."""
    monkeypatch.setattr(sampling, "BUCKET", 6)
    monkeypatch.setattr(sampling, "NUMBERS_AT_ONCE", 3 * 15 * 40)  # guidance sets in where others have been left out
    prior, labels, seeds = random_prior(model_type, layout), torch.arange(5).repeat(3), torch.arange(100, 115)
    sampler = make_sampler(prior, layout, 15, **options)
    sampler.captured = CapturedSteps(sampler.position, compiled=False)
    prompts = layout.class_tokens(labels)[:, None]
    nulls = torch.full_like(prompts, layout.null_token)
    first, again = (sampler.sample(prompts, nulls, seeds) for _ in range(2))
    assert torch.equal(first, draw(prior, layout, labels, seeds, **options))
    assert torch.equal(first, again)  # in memory that was used before


def test_a_sampler_frees_its_memory_at_once(random_prior, layout):
    """Keys and values of a batch may fill a GPU: they must not wait for the garbage collector."""
    sampler = make_sampler(random_prior("llama", layout), layout, 3, guidance_scale=2.0)
    prompts = torch.full((3, 1), layout.null_token)
    gc.disable()
    try:
        sampler.sample(prompts, prompts, torch.arange(3))
        buffer = weakref.ref(sampler.cache.layers[0].buffers[0])
        assert buffer() is not None
        del sampler
        assert buffer() is None
    finally:
        gc.enable()


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_compiled_step_chooses_the_same_codes(random_prior, layout, model_type):
    prior, labels, seeds = random_prior(model_type, layout), torch.arange(5).repeat(3), torch.arange(100, 115)
    sampler = make_sampler(prior, layout, 15, compiled=True, guidance_scale=2.0, top_p=0.9)
    prompts = layout.class_tokens(labels)[:, None]
    codes = sampler.sample(prompts, torch.full_like(prompts, layout.null_token), seeds)
    assert torch.equal(codes, draw(prior, layout, labels, seeds, guidance_scale=2.0, top_p=0.9))


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 2.0, "top_p": 0.95}], ids=str)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_image_does_not_depend_on_its_batch(random_prior, layout, model_type, options):
    prior, labels = random_prior(model_type, layout), torch.arange(64) % 5
    seeds = torch.randint(2**62, (64,), generator=torch.Generator().manual_seed(0))
    prompts = layout.class_tokens(labels)[:, None]
    nulls = torch.full_like(prompts, layout.null_token)

    def in_batches(size, rows):
        sampler = make_sampler(prior, layout, size, **options)
        return torch.cat([sampler.sample(prompts[part], nulls[part], seeds[part]) for part in rows.split(size)])

    together = in_batches(64, torch.arange(64))
    for size, rows in [(7, torch.arange(63)), (1, torch.arange(0, 64, 8))]:
        assert torch.equal(in_batches(size, rows), together[rows])
    assert torch.equal(in_batches(64, torch.arange(64).flip(0)).flip(0), together)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_only_codes_are_ever_chosen(random_prior, layout, temperature):
    prior = random_prior("llama", layout)
    with torch.no_grad():
        prior.lm_head.weight[layout.num_codes :] *= 100  # left alone, it would nearly always say something else
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
    numbers = race(torch.arange(20_000), position, 5)
    codes = pick(logits, numbers, SamplingOptions()).cpu()
    assert stats.chisquare(np.bincount(codes, minlength=5), probabilities * 20_000).pvalue > 1e-3
    kept = pick(logits, numbers, SamplingOptions(top_k=3)).cpu()
    assert stats.chisquare(np.bincount(kept), probabilities[:3] / 0.9 * 20_000).pvalue > 1e-3


def filtered_naively(probabilities, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """One filter after another over a sorted list; probabilities of the codes, those left out 0."""
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
    codes = pick(logits, race(torch.arange(50_000), 3, 12), SamplingOptions(**options)).cpu()
    expected, counts = filtered_naively(probabilities, **options), np.bincount(codes, minlength=12)
    assert counts[expected == 0].sum() == 0
    assert stats.chisquare(counts[expected > 0], expected[expected > 0] * 50_000).pvalue > 1e-3


def test_guided_draws_have_the_distribution_of_the_guided_logits(random_prior, layout):
    """The first code of many images, through everything that is between a prompt and a code."""
    prior = random_prior("llama", layout)
    with torch.no_grad():
        tokens = torch.tensor([[layout.num_codes + 1], [layout.null_token]])
        logits = prior(input_ids=tokens).logits[:, -1, : layout.num_codes].double()
    expected = (logits[1] + 1.7 * (logits[0] - logits[1])).softmax(-1).cpu().numpy()
    labels = torch.ones(20_000, dtype=torch.int64)
    prompts = layout.class_tokens(labels)[:, None]
    sampler = CodeSampler(prior, 20_000, 1, 1, layout.num_codes, SamplingOptions(guidance_scale=1.7))
    codes = sampler.sample(prompts, torch.full_like(prompts, layout.null_token), torch.arange(20_000)).cpu()
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
    first, second = (pick(logits, race(seeds, position, 4), SamplingOptions()).cpu() for position in (0, 1))
    table = np.bincount(first * 4 + second, minlength=16).reshape(4, 4)
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_a_pick_is_the_winner_of_its_race():
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    codes = pick(logits, race(torch.arange(6), 2, 9), SamplingOptions(temperature=0.5))
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


def test_a_whole_number_as_float_is_a_top_k(random_prior, layout):
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        filter_logits(logits, SamplingOptions(top_k=2.0)), filter_logits(logits, SamplingOptions(top_k=2))
    )


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@torch.no_grad()
def test_preallocated_cache_equals_dynamic_cache(random_prior, layout, model_type):
    prior = random_prior(model_type, layout)
    tokens = torch.randint(layout.num_codes, (3, 16), generator=torch.Generator().manual_seed(0))
    preallocated, dynamic = PreallocatedCache(prior, 3, 16), DynamicCache()
    for start, stop in [(0, 5), *((n, n + 1) for n in range(5, 16))]:
        preallocated.open(slice(0, 3), start, stop)
        logits = [prior(input_ids=tokens[:, start:stop], past_key_values=c).logits for c in (preallocated, dynamic)]
        torch.testing.assert_close(*logits, **EXACT_ON_CPU)
    for mine, theirs in zip(preallocated.layers, dynamic.layers, strict=True):
        torch.testing.assert_close((mine.keys, mine.values), (theirs.keys, theirs.values), **EXACT_ON_CPU)
