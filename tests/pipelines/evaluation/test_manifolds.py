"""Precision, recall, density and coverage, compared with torch-fidelity, with prdc, and with a loop."""

import numpy as np
import pytest
import torch

from pipelines.evaluation import manifolds
from pipelines.evaluation.manifolds import overlap

# Of the features of `two_sets()`: precision and recall of torch-fidelity 0.4.0, density and coverage of prdc 0.2.
STORED = {"precision": 0.985714, "recall": 0.611111, "density": 1.271429, "coverage": 0.866667}


def two_sets(real=90, made=70, width=6):
    rng = np.random.default_rng(0)
    generated = 0.7 * rng.normal(size=(made, width)) + 0.3
    return tuple(torch.from_numpy(part).float() for part in (rng.normal(size=(real, width)), generated))


def on_a_grid():
    """Whole numbers: many images lie exactly on the border of a ball."""
    return tuple((features * 2).round() for features in two_sets(width=3))


def by_a_loop(real, made):
    real, made = real.double().numpy(), made.double().numpy()

    def radius(rows, k):
        return [np.sort([np.linalg.norm(row - other) for other in rows])[k] for row in rows]

    distances = np.array([[np.linalg.norm(a - b) for b in made] for a in real])
    return {
        "precision": np.mean([(distances[:, m] <= radius(real, 3)).any() for m in range(len(made))]),
        "recall": np.mean([(distances[n] <= radius(made, 3)).any() for n in range(len(real))]),
        "density": np.mean([(distances[:, m] < radius(real, 5)).sum() / 5 for m in range(len(made))]),
        "coverage": np.mean([distances[n].min() < radius(real, 5)[n] for n in range(len(real))]),
    }


@pytest.fixture(params=[7, 4096])
def block(request, monkeypatch):
    """Blocks of seven rows, which divide neither set; or a single block."""
    monkeypatch.setattr(manifolds, "BLOCK", request.param)


both = pytest.mark.parametrize("sets", [two_sets, on_a_grid])


@both
def test_a_loop_gives_the_same(block, sets):
    real, made = (features[:25] for features in sets())
    assert overlap(real, made[:19]) == pytest.approx(by_a_loop(real, made[:19]))


@both
def test_torch_fidelity_gives_the_same_precision_and_recall(block, sets):
    torch_fidelity = pytest.importorskip("torch_fidelity.metric_prc")
    real, made = sets()
    expected = torch_fidelity.prc_features_to_metric(made, real, verbose=False)
    found = overlap(real, made)
    assert 0 < expected["precision"] <= 1 and 0 < expected["recall"] < 1
    assert {name: found[name] for name in ("precision", "recall")} == pytest.approx(
        {name: expected[name] for name in ("precision", "recall")}, abs=1e-4
    )


@both
def test_prdc_gives_the_same_density_and_coverage(block, sets):
    prdc = pytest.importorskip("prdc")
    real, made = sets()
    expected = prdc.compute_prdc(real.numpy(), made.numpy(), nearest_k=5)
    found = overlap(real, made)
    assert {name: found[name] for name in ("density", "coverage")} == pytest.approx(
        {name: expected[name] for name in ("density", "coverage")}, abs=1e-4
    )


def test_stored_numbers_of_the_libraries(block):
    assert overlap(*two_sets()) == pytest.approx(STORED, abs=1e-4)


def test_a_set_covers_itself_and_a_distant_one_does_not():
    real, made = two_sets()
    same, distant = overlap(real, real), overlap(real, made + 100)
    assert same["precision"] == same["recall"] == same["coverage"] == 1
    assert set(distant.values()) == {0}


def test_copies_of_few_images_have_precision_without_recall():
    real, _ = two_sets()
    collapsed = overlap(real, real[:2].repeat(40, 1))
    assert collapsed["precision"] == 1 and collapsed["recall"] < 0.05 and collapsed["coverage"] < 0.3
