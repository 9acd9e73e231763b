"""Counter-based random numbers: the mixing function, the distribution, and independence of keys."""

import numpy as np
import pytest
import torch
from scipy import stats

from configs.randomness import draw_seeds, exponential, mix, uniform, uniform_rows
from tests.devices import on_device

pytestmark = on_device

MASK = 2**64 - 1
STEP, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def splitmix64(x: int) -> int:
    """The reference implementation, in Python integers."""
    x = (x + STEP) & MASK
    x = ((x ^ (x >> 30)) * FIRST) & MASK
    x = ((x ^ (x >> 27)) * SECOND) & MASK
    return x ^ (x >> 31)


def inverse_splitmix64(y: int) -> int:
    def undo_shift(x: int, bits: int) -> int:
        return x ^ (x >> bits) ^ (x >> 2 * bits)

    y = undo_shift(y, 31) * pow(SECOND, -1, 2**64) & MASK
    y = undo_shift(y, 27) * pow(FIRST, -1, 2**64) & MASK
    return (undo_shift(y, 30) - STEP) & MASK


def signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


def test_mix_is_splitmix64():
    rng = np.random.default_rng(0)
    edges = [0, 1, -1, 2**31, -(2**31), 2**62, 2**63 - 1, -(2**63)]
    values = [*edges, *range(-50, 50), *rng.integers(-(2**63), 2**63 - 1, 2000).tolist()]
    expected = [signed(splitmix64(value & MASK)) for value in values]
    assert mix(torch.tensor(values)).tolist() == expected


def test_mix_yields_the_published_sequence():
    states = [signed((1234567 + n * STEP) & MASK) for n in range(5)]
    assert [value & MASK for value in mix(torch.tensor(states)).tolist()] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_neither_zero_nor_one_is_ever_drawn():
    keys = torch.tensor([signed(inverse_splitmix64(y)) for y in (0, MASK)])
    assert mix(keys).tolist() == [0, -1]
    assert uniform(keys).tolist() == [2.0**-53, 1 - 2.0**-53]
    extremes = exponential(keys)
    assert (extremes > 0).all() and extremes.isfinite().all()


@pytest.mark.parametrize("order", ["seeds", "positions", "codes"])
def test_each_key_alone_draws_uniformly(order):
    counter = torch.arange(200_000)
    fixed = torch.tensor([7])
    keys = {"seeds": (counter, fixed, fixed), "positions": (fixed, counter, fixed), "codes": (fixed, fixed, counter)}
    draws = uniform(*keys[order]).double().cpu().numpy()
    assert draws.shape == (200_000,) and draws.min() > 0 and draws.max() < 1
    assert abs(draws.mean() - 1 / 2) < 4 * (1 / 12 / 200_000) ** 0.5
    assert abs(draws.var() - 1 / 12) < 4 * (1 / 180 / 200_000) ** 0.5
    assert stats.chisquare(np.histogram(draws, 1000, (0, 1))[0]).pvalue > 1e-3


def test_exponential_distribution():
    draws = exponential(torch.arange(50_000)).cpu().numpy()
    assert stats.kstest(draws, "expon").pvalue > 1e-3


def test_neighbouring_keys_are_independent():
    seeds, positions, codes = torch.arange(20)[:, None, None], torch.arange(64)[:, None], torch.arange(64)
    draws = uniform(seeds, positions, codes).cpu()
    for dim in range(3):
        ahead, behind = draws.narrow(dim, 1, draws.shape[dim] - 1), draws.narrow(dim, 0, draws.shape[dim] - 1)
        assert abs(np.corrcoef(ahead.flatten(), behind.flatten())[0, 1]) < 4 / ahead.numel() ** 0.5
    swapped = draws.transpose(1, 2)[:, ~np.eye(64, dtype=bool)]
    straight = draws[:, ~np.eye(64, dtype=bool)]
    assert abs(np.corrcoef(swapped.flatten(), straight.flatten())[0, 1]) < 4 / straight.numel() ** 0.5


def test_keys_broadcast_and_a_number_depends_on_its_key_only():
    seeds, codes = torch.tensor([3, -8, 2**62]), torch.arange(5)
    together = uniform(seeds[:, None], torch.tensor(2), codes)
    assert together.shape == (3, 5) and together.dtype == torch.float64
    for row, seed in enumerate(seeds):
        for column, code in enumerate(codes):
            assert uniform(seed, torch.tensor(2), code) == together[row, column]


def test_arrays_give_the_numbers_of_tensors():
    seed, epoch, row = torch.tensor([2**32 - 1]), torch.arange(3)[:, None], torch.arange(100)
    expected = uniform(seed, epoch, row).cpu().numpy()
    found = uniform(*(keys.cpu().numpy() for keys in (seed, epoch, row)))
    assert found.dtype == np.float64 and found.shape == (3, 100) and (found == expected).all()


def test_one_generator_draws_a_seed_for_each_image():
    seeds = draw_seeds(1000, torch.Generator().manual_seed(1))
    assert seeds.shape == (1000,) and seeds.dtype == torch.int64
    assert len(seeds.unique()) == 1000 and (seeds >= 0).all()
    assert torch.equal(seeds, draw_seeds(1000, torch.Generator().manual_seed(1)))
    assert not torch.equal(seeds, draw_seeds(1000, torch.Generator().manual_seed(2)))


def test_a_list_holds_a_generator_for_each_image():
    generators = [torch.Generator().manual_seed(n) for n in (5, 6, 5)]
    seeds = draw_seeds(3, generators)
    assert seeds.tolist() == [draw_seeds(1, torch.Generator().manual_seed(n)).item() for n in (5, 6, 5)]
    with pytest.raises(ValueError, match="list of 3 for 4 images"):
        draw_seeds(4, generators)


def test_without_a_generator_the_global_one_draws():
    torch.manual_seed(3)
    first, second = draw_seeds(4, None), draw_seeds(4, None)
    torch.manual_seed(3)
    assert torch.equal(draw_seeds(4, None), first) and not torch.equal(first, second)


def test_rows_are_uniform_and_independent():
    keys = np.stack(np.meshgrid(range(3), range(2000), range(2), indexing="ij"), -1).reshape(-1, 3)
    draws = uniform_rows(7, keys, 8)
    assert draws.shape == (12000, 8) and draws.min() >= 0 and draws.max() < 1
    assert np.abs(np.quantile(draws, np.linspace(0, 1, 11), axis=0) - np.linspace(0, 1, 11)[:, None]).max() < 0.02
    beside = np.concatenate([draws[:-1], draws[1:]], axis=1)  # within an image, and from one to the next
    assert np.abs(np.corrcoef(beside.T) - np.eye(2 * 8)).max() < 0.05
    assert np.array_equal(uniform_rows(7, keys[5:6], 8), draws[5:6])
    assert len(np.unique(np.concatenate([draws, uniform_rows(8, keys, 8)]))) == 2 * draws.size
