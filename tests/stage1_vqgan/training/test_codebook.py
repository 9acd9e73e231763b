"""Codebook upkeep: k-means against scikit-learn, statistics by hand, restart of dead codes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans

from stage1_vqgan.quantizers import build_quantizer
from stage1_vqgan.training.codebook import Candidates, CodebookMonitor, kmeans
from tests.devices import DEVICE, on_device

pytestmark = on_device

K, D = 8, 4


def blobs(centres, points=40, noise=0.05):
    generator = torch.Generator().manual_seed(0)
    rows = centres.repeat(points, 1)
    return rows + noise * torch.randn(rows.shape, generator=generator)


def test_kmeans_is_lloyds_algorithm():
    latents = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    start = kmeans(latents, 6, spherical=False, seed=1, iterations=0)
    assert all((latents == centre).all(1).any() for centre in start) and len(start.unique(dim=0)) == 6
    reference = KMeans(6, init=start.cpu().numpy(), n_init=1, max_iter=10, tol=0, algorithm="lloyd")
    reference.fit(latents.cpu().numpy())
    centres = kmeans(latents, 6, spherical=False, seed=1, iterations=10)
    np.testing.assert_allclose(centres.cpu().numpy(), reference.cluster_centers_, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_kmeans_finds_separated_clusters(seed):
    truth = torch.tensor([[10.0, 0, 0], [0, 10, 0]])
    found = kmeans(blobs(truth), 2, spherical=False, seed=seed)
    torch.testing.assert_close(found[found[:, 0].argsort(descending=True)], truth, atol=0.05, rtol=0)


def test_spherical_kmeans_finds_directions():
    truth = F.normalize(torch.tensor([[1.0, 0.2, 0], [-0.5, 1, 1]]), dim=1)
    lengths = torch.rand(80, 1, generator=torch.Generator().manual_seed(3)) * 5 + 0.5
    found = kmeans(blobs(truth) * lengths, 2, spherical=True, seed=0)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(found[found[:, 0].argsort(descending=True)], truth, atol=0.03, rtol=0)


@pytest.mark.parametrize("spherical", [False, True])
def test_kmeans_with_fewer_latents_than_clusters(spherical):
    latents = F.normalize(torch.eye(3) + 0.1, dim=1)
    centres = kmeans(latents, 7, spherical, seed=0)
    assert centres.shape == (7, 3)
    distances = torch.cdist(centres, latents)
    assert distances.min(1).values.max() < 1e-3  # every centre is a latent,
    assert distances.min(0).values.max() < 1e-3  # and every latent has a centre


def test_kmeans_depends_on_its_seed_alone():
    latents = torch.randn(100, 3)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = kmeans(latents, 4, False, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert torch.equal(kmeans(latents, 4, False, seed=1), first)
    assert not torch.equal(kmeans(latents, 4, False, seed=2), first)


def same(x):
    return x


class Case:
    """A codebook in training: trained and averaged quantizer, an optimizer with moments, a monitor."""

    def __init__(self, l2_normalize=False):
        torch.manual_seed(0)
        options = {"l2_normalize": l2_normalize}
        self.quantizer, self.average = (build_quantizer("vq", K, D, options) for _ in range(2))
        self.weight = self.quantizer.embedding.weight
        self.optimizer = torch.optim.AdamW(self.quantizer.parameters(), fused=True)
        self.weight.grad = torch.randn(K, D)
        self.optimizer.step()
        self.monitor = CodebookMonitor(K, DEVICE)

    def restart(self, candidates, reduce=same):
        return int(self.monitor.restart(self.quantizer, self.average, self.optimizer, [candidates], reduce))


def test_restart_moves_dead_codes_and_nothing_else():
    case = Case()
    case.monitor.update(torch.tensor([[[0, 3], [3, 5]]]))
    used, dead = [0, 3, 5], [1, 2, 4, 6, 7]
    latents = torch.randn(20, D)
    before = {
        "weight": case.weight.detach().clone(),
        "average": case.average.embedding.weight.detach().clone(),
        **{name: case.optimizer.state[case.weight][name].clone() for name in ("exp_avg", "exp_avg_sq")},
    }
    assert case.restart(latents) == 5
    after = {
        "weight": case.weight.detach(),
        "average": case.average.embedding.weight.detach(),
        **{name: case.optimizer.state[case.weight][name] for name in ("exp_avg", "exp_avg_sq")},
    }
    for name, value in after.items():
        assert torch.equal(value[used], before[name][used]), name
    chosen = [[i for i, z in enumerate(latents) if torch.equal(z, e)] for e in after["weight"][dead]]
    assert len({i for (i,) in chosen}) == 5  # each onto another latent
    assert torch.equal(after["average"][dead], after["weight"][dead])
    for name in ("exp_avg", "exp_avg_sq"):
        assert before[name][dead].ne(0).all() and after[name][dead].eq(0).all()
    assert case.optimizer.state[case.weight]["step"].item() == 1


def test_restart_on_the_unit_sphere():
    case = Case(l2_normalize=True)
    latents = 7 * torch.randn(20, D)
    assert case.restart(latents) == K
    torch.testing.assert_close(case.weight.detach().norm(dim=1), torch.ones(K))
    similarity = F.normalize(case.weight.detach(), dim=1) @ F.normalize(latents, dim=1).T
    torch.testing.assert_close(similarity.max(1).values, torch.ones(K))


def test_restart_with_fewer_latents_than_dead_codes():
    case = Case()
    before = case.weight.detach().clone()
    assert case.restart(torch.randn(3, D)) == 3
    assert (case.weight.detach() != before).any(1).sum() == 3


def test_restart_is_the_same_on_every_process():
    """A code that any process used is not restarted."""
    candidates = torch.randn(8, D)
    counts = torch.zeros(K, dtype=torch.int64)
    counts[1] = 4
    weights = []
    for own in (0, 6):
        case = Case()
        case.monitor.update(torch.tensor([[[own]]]))

        def reduce(value, own=own):
            return value + counts + F.one_hot(torch.tensor(6 - own), K)

        assert case.restart(candidates, reduce) == 5
        weights.append(case.weight.detach())
    assert torch.equal(*weights)
    assert torch.equal(weights[0][[0, 1, 6]], Case().weight.detach()[[0, 1, 6]])


def test_candidates_come_from_all_batches_alike():
    """Every latent has the same chance to be among them, and each place in their order is a draw of its own."""
    chosen, first = torch.zeros(30), torch.zeros(30)
    for seed in range(2000):
        candidates = Candidates(K)
        for batch, rows in enumerate(torch.arange(30.0)[:, None].split([14, 10, 6])):
            candidates.add(rows, seed=3 * seed + batch)
        found = candidates.rows()[:, 0].long()
        assert len(found.unique()) == K
        chosen[found] += 1 / 2000
        first[found[0]] += 1 / 2000
    torch.testing.assert_close(chosen, torch.full((30,), K / 30), atol=0.05, rtol=0)  # 4.5 standard deviations
    torch.testing.assert_close(first, torch.full((30,), 1 / 30), atol=0.018, rtol=0)


def test_candidates_begin_anew_and_may_be_fewer():
    candidates, latents = Candidates(K), torch.randn(5, D)
    candidates.add(latents, seed=0)
    first = candidates.rows()
    assert not torch.equal(first, latents) and torch.equal(first.sort(0).values, latents.sort(0).values)
    candidates.add(torch.randn(50, D), seed=1)
    assert candidates.rows().shape == (K, D)


def test_the_two_counters_are_separate():
    case = Case()
    case.monitor.update(torch.tensor([[[0, 1, 2, 3]]]))
    statistics = case.monitor.statistics(torch.clone)
    assert statistics["codebook/usage"].item() == 0.5
    assert statistics["codebook/perplexity"].item() == pytest.approx(4, rel=1e-5)
    assert case.monitor.statistics(torch.clone)["codebook/usage"].item() == 0  # since the last call
    case.monitor.update(torch.tensor([[[4]]]))
    assert case.restart(torch.randn(20, D)) == 3  # logging did not clear this counter
    assert case.monitor.statistics(torch.clone)["codebook/usage"].item() == 1 / 8  # nor restarting the other
    assert case.restart(torch.randn(20, D)) == K  # no code was used since the last restart


def test_statistics_of_one_process_need_no_copy():
    case = Case()
    case.monitor.update(torch.tensor([[[0, 1]]]))
    assert case.monitor.statistics(same)["codebook/usage"].item() == 2 / 8
