"""The sampler of masked priors, compared with a loop over single codes, and with other batch sizes."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats

from configs.randomness import exponential
from stage2_prior import SamplingOptions, UnmaskingOptions, unmask
from stage2_prior.sampling.halton import halton_cells, halton_ranks
from stage2_prior.sampling.loop import pick
from stage2_prior.sampling.unmasking import schedule
from tests.devices import DEVICE, on_device
from tests.slow import few

pytestmark = on_device

MODEL_TYPES = ["bert", "modernbert"]
OPTIONS = [
    ({}, {}),
    ({"guidance_scale": 2.5}, {"num_steps": 5}),
    ({"guidance_scale": 0.0}, {"order_temperature": 0.0}),
    ({"temperature": 0.0, "guidance_scale": 3.0}, {"num_steps": 16}),
    ({"guidance_scale": 3.0, "guidance_schedule": "linear"}, {"num_steps": 8, "order_temperature": 20.0}),
    ({"guidance_scale": 3.0, "guidance_interval": (0.25, 0.7)}, {"num_steps": 7, "order": "halton"}),
    ({"temperature": 0.7, "top_k": 12, "top_p": 0.9, "min_p": 0.02, "guidance_scale": 1.5}, {"num_steps": 1}),
]


def draw(prior, layout, labels, seeds, options=None, known=None, on_step=None, **unmasking):
    prompts = layout.class_tokens(labels)[:, None]
    nulls = torch.full_like(prompts, layout.null_token)
    request = (prior, prompts, nulls, seeds, layout.length, layout.num_codes, SamplingOptions(**options or {}))
    return unmask(*request, UnmaskingOptions(**unmasking), on_step, known, mask_token=layout.mask_token)


@torch.no_grad()
def logits_of(prior, layout, condition, codes):
    """float64 logits of all codes, an array `(L, K)`, for one condition token and codes, -1 where hidden."""
    tokens = [condition, *(layout.mask_token if code < 0 else code for code in codes)]
    logits = prior(input_ids=torch.tensor([tokens], device=DEVICE)).logits[0, 1:, : layout.num_codes]
    return logits.double().cpu().numpy()


def draw_naively(prior, layout, label, seed, options=None, known=None, **unmasking):
    """The codes of one image: place by place, with a forward for each condition, in numpy."""
    options, unmasking = SamplingOptions(**options or {}), UnmaskingOptions(**unmasking)
    steps, length = unmasking.num_steps or 12, layout.length
    codes = [-1] * length if known is None else list(known)
    at_first, left = codes.count(-1), codes.count(-1)

    def hashed(step, position, number):
        counters = (torch.tensor([seed]), torch.tensor([step * length + position]), torch.as_tensor(number))
        return exponential(*counters).double().numpy()

    for step in range(steps):
        logits = logits_of(prior, layout, layout.num_codes + label, codes)
        if (scale := options.scales(steps)[step, 0, 0]) != 1:
            free = logits_of(prior, layout, layout.null_token, codes)
            logits = free + scale * (logits - free)
        found = {}
        for place in (place for place in range(length) if codes[place] < 0):
            noise = torch.from_numpy(hashed(step, place, range(layout.num_codes)))[None]
            code = int(pick(torch.from_numpy(logits[place])[None], noise, options))
            confidence = logits[place, code] - logits[place].max() - math.log(
                np.exp(logits[place] - logits[place].max()).sum()
            )  # fmt: skip
            weight = 4.5 if unmasking.order_temperature is None else unmasking.order_temperature
            if options.temperature > 0:
                gumbel = -math.log(hashed(step, place, [layout.num_codes])[0])
                confidence += weight * (1 - (step + 1) / steps) * gumbel
            if unmasking.order == "halton":
                confidence = -halton_ranks(layout.all_grids)[place]
            found[place] = (confidence, code)
        left = max(0, min(left - 1, math.floor(at_first * math.cos(math.pi / 2 * (step + 1) / steps))))
        best_first = sorted(found, key=lambda place: found[place][0], reverse=True)
        for place in best_first[: len(found) - left]:
            codes[place] = found[place][1]
    return codes


@pytest.mark.parametrize(
    ("model_type", "options", "unmasking"),
    few(
        [(model_type, *options) for model_type in MODEL_TYPES for options in OPTIONS],
        ("bert", *OPTIONS[3]),
        ("bert", *OPTIONS[4]),
        ("bert", *OPTIONS[5]),
        ("bert", *OPTIONS[6]),
        ("modernbert", *OPTIONS[1]),
    ),
    ids=str,
)
def test_codes_are_those_of_a_loop_over_places(random_prior, masked_layout, model_type, options, unmasking):
    prior, labels, seeds = random_prior(model_type, masked_layout), torch.arange(3), torch.arange(100, 103)
    codes = draw(prior, masked_layout, labels, seeds, options, **unmasking)
    expected = [
        draw_naively(prior, masked_layout, label, seed, options, **unmasking)
        for label, seed in zip(labels.tolist(), seeds.tolist(), strict=True)
    ]
    assert codes.dtype == torch.int64 and codes.tolist() == expected


def test_known_codes_stay_and_the_others_are_those_of_the_loop(random_prior, masked_layout):
    """The images have 0, 1, 8 and all 16 codes to find, so that each has a schedule of its own."""
    prior, labels, seeds = random_prior("bert", masked_layout), torch.arange(4), torch.arange(4)
    known = torch.arange(64).view(4, 16) % masked_layout.num_codes
    for row, places in enumerate(([], [5], range(0, 16, 2), range(16))):
        known[row, list(places)] = -1
    before = known.clone()
    codes = draw(prior, masked_layout, labels, seeds, {"guidance_scale": 2.0}, known, num_steps=6)
    assert torch.equal(known, before) and torch.equal(codes[known >= 0], known[known >= 0])
    for row in range(4):
        options = {"guidance_scale": 2.0}
        expected = draw_naively(prior, masked_layout, row, row, options, known[row].tolist(), num_steps=6)
        assert codes[row].tolist() == expected


@pytest.mark.parametrize(
    "settings",
    [pytest.param({}, marks=pytest.mark.slow), {"guidance_schedule": "linear", "guidance_interval": (0.2, 0.8)}],
    ids=str,
)
@pytest.mark.parametrize("order", ["confidence", "halton"])
def test_each_image_has_the_codes_of_its_own_guidance_scale(random_prior, masked_layout, order, settings):
    prior, labels, seeds = random_prior("bert", masked_layout), torch.arange(5), torch.arange(5)
    known = torch.where(torch.arange(16) < torch.tensor([[0], [3], [0], [9], [0]]), 3, -1)
    scales = (2.5, 1.0, 1.0, 4.0, 0.0)
    codes = draw(prior, masked_layout, labels, seeds, settings | {"guidance_scale": (scales,)}, known, order=order)
    for n, scale in enumerate(scales):
        part, options = slice(n, n + 1), settings | {"guidance_scale": scale}
        alone = draw(prior, masked_layout, labels[part], seeds[part], options, known[part], order=order)
        assert torch.equal(codes[part], alone)
    with pytest.raises(ValueError, match="options: received guidance scales for 5 images; prompts has 4"):
        draw(prior, masked_layout, labels[:4], seeds[:4], {"guidance_scale": (scales,)})


@pytest.mark.parametrize(("model_type", "order"), [("bert", "confidence"), ("modernbert", "halton")])
def test_an_image_does_not_depend_on_its_batch(random_prior, masked_layout, model_type, order):
    prior, labels = random_prior(model_type, masked_layout), torch.arange(32) % 5
    seeds = torch.randint(2**62, (32,), generator=torch.Generator().manual_seed(0))
    known = torch.where(torch.arange(16) < torch.arange(32)[:, None] % 16, 3, -1)

    def in_batches(size, rows):
        return torch.cat(
            [
                draw(prior, masked_layout, labels[part], seeds[part], {"guidance_scale": 2.0}, known[part], order=order)
                for part in rows.split(size)
            ]
        )

    together = in_batches(32, torch.arange(32))
    for size, rows in [(7, torch.arange(32)), (1, torch.arange(0, 32, 8))]:
        assert torch.equal(in_batches(size, rows), together[rows])
    assert torch.equal(in_batches(32, torch.arange(32).flip(0)).flip(0), together)


@pytest.mark.parametrize(
    ("options", "steps", "rows"),
    [
        ({}, 8, [3] * 8),
        ({"guidance_scale": 2.0}, 5, [6] * 5),
        ({"guidance_scale": 2.0, "guidance_interval": (0.5, 1.0)}, 4, [3, 3, 6, 6]),
    ],
    ids=str,
)
def test_a_step_is_one_forward(random_prior, masked_layout, options, steps, rows):
    prior, seen = random_prior("bert", masked_layout), []
    hook = prior.register_forward_hook(lambda module, args, kwargs, out: seen.append(len(out.logits)), with_kwargs=True)
    draw(prior, masked_layout, torch.arange(3), torch.arange(3), options, num_steps=steps)
    hook.remove()
    assert seen == rows


def test_no_forward_without_a_hidden_code(random_prior, masked_layout):
    prior, seen = random_prior("bert", masked_layout), []
    known = torch.full((2, 16), 7)
    known[0, :2], known[1, 3] = -1, -1
    hook = prior.register_forward_hook(lambda *args: seen.append(1))
    draw(prior, masked_layout, torch.arange(2), torch.arange(2), known=known, num_steps=9)
    hook.remove()
    assert len(seen) == 2


@pytest.mark.parametrize("count", [1, 2, 16, 64, 1000])
@pytest.mark.parametrize("steps", [1, 2, 12, 64])
def test_the_schedule_is_a_cosine_and_ends_with_all_codes(count, steps):
    left = [count, *schedule(steps, count)]
    assert left[-1] == 0 and all(after < before or before == 0 for before, after in pairwise(left))
    if steps <= count:
        assert all(
            number == math.floor(count * math.cos(math.pi / 2 * step / steps) + 1e-9)
            for step, number in enumerate(left)
            if count >= 4 * steps**2
        )
    assert schedule(4, 16) == [14, 11, 6, 0]
    assert schedule(16, 16) == list(range(15, -1, -1))


def test_steps_show_codes_that_stay(random_prior, masked_layout):
    shown = []
    codes = draw(
        random_prior("bert", masked_layout),
        masked_layout,
        torch.arange(3),
        torch.arange(3),
        on_step=lambda step, codes: shown.append((step, codes.clone(), codes.fill_(0))),  # a callback may write to it
        num_steps=5,
    )
    assert [step for step, *_ in shown] == [0, 1, 2, 3, 4]
    tables = [table for _, table, _ in shown]
    assert torch.equal(tables[-1], codes)
    for before, after in pairwise(tables):
        assert torch.equal(after[before >= 0], before[before >= 0]) and ((after < 0).sum(1) < (before < 0).sum(1)).all()


def test_seeds_decide_samples_but_not_greedy_codes(random_prior, masked_layout):
    prior, labels, seeds = random_prior("bert", masked_layout), torch.zeros(4, dtype=torch.int64), torch.arange(4)
    assert len(draw(prior, masked_layout, labels, seeds).unique(dim=0)) == 4
    greedy = draw(prior, masked_layout, labels, seeds, {"temperature": 0.0})
    assert len(greedy.unique(dim=0)) == 1
    assert (
        len(draw(prior, masked_layout, torch.arange(5), torch.zeros(5).long(), {"temperature": 0.0}).unique(dim=0)) > 1
    )


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_only_codes_are_ever_chosen(random_prior, masked_layout, temperature):
    prior = random_prior("bert", masked_layout)
    prior.get_output_embeddings().bias[masked_layout.num_codes :] += 100
    options = {"temperature": temperature, "guidance_scale": 2.0}
    codes = draw(prior, masked_layout, torch.arange(50) % 5, torch.arange(50), options)
    assert codes.min() >= 0 and codes.max() < masked_layout.num_codes


def test_in_one_step_codes_have_the_probabilities_of_the_prior(random_prior, masked_layout):
    count, prior = 4000, random_prior("bert", masked_layout)
    codes = draw(prior, masked_layout, torch.ones(count).long(), torch.arange(count), num_steps=1)[:, 5].cpu()
    logits = logits_of(prior, masked_layout, masked_layout.num_codes + 1, [-1] * 16)[5]
    expected = np.exp(logits) / np.exp(logits).sum() * count
    observed = np.bincount(codes, minlength=masked_layout.num_codes)
    rare = expected < 5
    observed, expected = ([*values[~rare], values[rare].sum()] for values in (observed, expected))
    assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_noise_changes_the_order(random_prior, masked_layout):
    """Without noise, the surest codes come first; with much of it, any."""
    prior, firsts = random_prior("bert", masked_layout), []
    labels, seeds = torch.zeros(200).long(), torch.arange(200)
    for weight in (0.0, 1000.0):
        tables = []
        show = {"on_step": lambda step, codes, tables=tables: tables.append(codes)}
        draw(prior, masked_layout, labels, seeds, **show, num_steps=16, order_temperature=weight)
        firsts.append(np.bincount((tables[0] >= 0).int().argmax(1).cpu(), minlength=16))
    assert stats.chisquare(firsts[1]).pvalue > 1e-3 > stats.chisquare(firsts[0]).pvalue


@torch.no_grad()
def test_logits_that_are_no_numbers_are_an_error(random_prior, masked_layout):
    prior = random_prior("bert", masked_layout)
    prior.get_input_embeddings().weight[masked_layout.num_codes + 2] = math.nan
    with pytest.raises(FloatingPointError, match="the logits of 1 of 4 images were NaN or infinite"):
        draw(prior, masked_layout, torch.arange(4), torch.arange(4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 17}, "num_steps: received 17; must be a whole number from 1 to 16"),
        ({"num_steps": 0}, "num_steps: received 0"),
        ({"num_steps": 2.5}, "num_steps: received 2.5"),
        ({"order": "random"}, "order: received 'random'; allowed are 'confidence', 'halton'"),
        ({"order_temperature": -1.0}, "order_temperature: received -1.0"),
        ({"order_temperature": math.nan}, "order_temperature: received nan"),
        ({"order": "halton", "order_temperature": 1.0}, "order_temperature: received 1.0; the order 'halton' has no"),
        (
            {"known": torch.zeros(3, 15).long()},
            r"known: received .*\(3, 15\); needs an int64 tensor of shape \(3, 16\)",
        ),
        ({"known": torch.full((3, 16), 40)}, "known: received 40; must be codes below 40, or -1"),
        ({"known": torch.full((3, 16), -2)}, "known: received -2"),
        ({"on_step": 3}, "on_step: received 3"),
    ],
    ids=str,
)
def test_arguments_that_cannot_work(random_prior, masked_layout, changes, message):
    with pytest.raises(ValueError, match=message):
        draw(random_prior("bert", masked_layout), masked_layout, torch.arange(3), torch.arange(3), **changes)


# ---------------------------------------------------------------------- the order of Halton


def test_the_halton_order_is_the_published_one():
    """Of a 4×4 grid: the points (1/2, 1/3), (1/4, 2/3), (3/4, 1/9), (1/8, 4/9), … in cells."""

    def inverse(number, base):
        value, place = 0, 1
        while number:
            place *= base
            value = value * base + number % base
            number //= base
        return value, place

    cells = []
    for number in range(1, 1000):
        (y, ys), (x, xs) = inverse(number, 2), inverse(number, 3)
        cell = y * 4 // ys * 4 + x * 4 // xs
        cells += [] if cell in cells else [cell]
    assert halton_cells(4, 4).tolist() == cells
    assert cells[:4] == [9, 6, 12, 1]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (8, 8), (3, 5), (32, 16)])
def test_the_halton_order_has_every_cell_once(height, width):
    assert sorted(halton_cells(height, width).tolist()) == list(range(height * width))


def test_grids_come_one_after_another_and_depths_too():
    ranks = halton_ranks(((2, 2, 1), (2, 3, 2)))
    assert sorted(ranks) == list(range(16)) and set(ranks[:4]) == set(range(4))
    first, second = ranks[4::2], ranks[5::2]  # the two codes of each position
    assert set(first) == set(range(4, 10)) and [rank + 6 for rank in first] == list(second)
    assert [rank - 4 for rank in first] == halton_cells(2, 3).argsort().tolist()


def test_halton_needs_grids_unless_the_codes_are_a_square(random_prior, masked_layout):
    wide = replace(masked_layout, grid=(2, 6))
    prior = random_prior("bert", wide)
    with pytest.raises(ValueError, match="length: received 12, which is no square; the order 'halton' needs grids"):
        draw(prior, wide, torch.arange(2), torch.arange(2), order="halton")
