"""The copying check: against a naive loop, and on generators that copy, nearly copy, or do not."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits

from pipelines.evaluation import copying
from pipelines.evaluation.copying import Suspect, check_features, copying_check, figures, neighbours, suspect_rows
from pipelines.evaluation.image_set import Mirrored
from pipelines.evaluation.reconstructions import Reconstructions
from stage1_vqgan import VQGANConfig, VQGANImageProcessor, VQGANModel, labelled_grid
from stage1_vqgan.networks import load_network
from tests.devices import DEVICE
from tests.tiny import VQGAN

LEVEL = 0.05


class Pictures:
    """Images in memory, float32 `(N, C, H, W)` in [-1, 1]. It remembers how many were read at once."""

    labels = None

    def __init__(self, pixels):
        self.pixels, self.most = pixels, 0

    def __len__(self):
        return len(self.pixels)

    def read(self, rows):
        self.most = max(self.most, len(rows))
        return self.pixels[rows.start : rows.stop]


def naive(queries, train):
    """Score, nearest row and nearest view of each query, by loops in float64; train has views, images, features."""
    found = []
    for query in np.float64(queries):
        of_views = [[np.sqrt(((query - row) ** 2).sum()) for row in view] for view in np.float64(train)]
        distances = [min(of_image) for of_image in zip(*of_views, strict=True)]
        order = sorted(range(len(distances)), key=distances.__getitem__)
        near = [distances[row] for row in order[: copying.NEIGHBOURS]]
        nearest = [of_view[order[0]] for of_view in of_views]
        found.append((near[0] / np.mean(near), order[0], nearest.index(min(nearest))))
    return [np.array(column) for column in zip(*found, strict=True)]


def points(seed, count, width=6):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + 100  # far from 0


@pytest.mark.parametrize("part", [7, 2**24])
@pytest.mark.parametrize("views", [1, 3])
def test_neighbours_equal_those_of_a_loop(monkeypatch, part, views):
    monkeypatch.setattr(copying, "LARGEST_PART", part * 40)
    train, queries = points(0, 40 * views).unflatten(0, (views, 40)), points(1, 30)
    queries[:10] = train[0, :10]
    queries[10:20] = train[-1, 10:20] + 1e-4
    found, (scores, rows, nearest) = neighbours(queries, train), naive(queries, train)
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_array_equal(found.views, nearest)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-3, atol=1e-5)
    assert (found.scores[:10] < 1e-6).all() and (found.scores <= 1).all()


def test_fewer_training_images_than_neighbours():
    train, queries = points(0, 3)[None], points(1, 5)
    np.testing.assert_allclose(neighbours(queries, train).scores, naive(queries, train)[0], rtol=1e-3)
    assert neighbours(train[0], train[:, :1].repeat(1, 2, 1)).scores[0] == 0  # and not 0 / 0


def test_the_figures_equal_those_of_loops():
    rng = np.random.default_rng(0)
    generated, held_out = rng.integers(1, 50, 60) / 50, rng.integers(1, 50, 40) / 50  # with many ties
    suspected = [(1 + sum(held_out <= one)) / 41 <= LEVEL for one in generated]
    nearer = [np.mean((one < held_out) + 0.5 * (one == held_out)) for one in generated]
    found = figures(generated, held_out)
    assert 0 < found["suspected_copies"] == pytest.approx(np.mean(suspected))
    assert found["nearer_than_held_out"] == pytest.approx(np.mean(nearer))


@pytest.mark.parametrize("held_out", [19, 57, 200])
def test_an_honest_generator_has_a_share_of_five_percent(held_out):
    """Also with few held-out images: 400 sets of scores of one distribution. The chance is as wide as it says."""
    rng = np.random.default_rng(held_out)
    found = [figures(0.1 + rng.random(100), 0.1 + rng.random(held_out)) for _ in range(400)]
    shares = np.array([one["suspected_copies"] for one in found])
    chance = found[0]["suspected_copies_chance"]
    assert shares.mean() == pytest.approx(int(LEVEL * (held_out + 1)) / (held_out + 1), abs=4 * chance / 400**0.5)
    assert shares.std() == pytest.approx(chance, rel=0.25)
    assert np.mean([one["nearer_than_held_out"] for one in found]) == pytest.approx(0.5, abs=0.02)


KINDS = {
    "copies": (lambda train, fresh: train, 1.0, 1.0),
    "copies with noise": (lambda train, fresh: train + 0.2 * torch.randn(train.shape), 0.9, 1.0),
    "half copies": (lambda train, fresh: torch.cat([train[:200], fresh[200:]]), 0.45, 0.6),
    "other samples": (lambda train, fresh: fresh, 0.0, 0.1),
    "samples of poor quality": (lambda train, fresh: fresh + 3 * torch.randn(fresh.shape), 0.0, 0.1),
    "typical samples": (lambda train, fresh: 100 + (fresh - 100) * 0.5, 0.0, 0.1),  # nearer to all, and no copies
}


@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_told_from_samples(kind):
    torch.manual_seed(0)
    make, least, most = KINDS[kind]
    train, fresh, held_out = (points(seed, 400) for seed in range(3))
    found = check_features(make(train, fresh), train[None], held_out).figures
    assert least <= found["suspected_copies"] <= most, found
    assert (found["nearer_than_held_out"] > 0.65) == ("copies" in kind), found


@pytest.fixture(scope="module")
def digits():
    """Training images and held-out images of digits, 16×16 pixels."""
    pixels = torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1
    pixels = F.interpolate(pixels, scale_factor=2.0).round(decimals=3)
    return pixels[:600], pixels[600:900], pixels[900:1200]


PIXELS = load_network("pixels@8")


def views(images, mirrored):
    return [Pictures(images), Mirrored(Pictures(images))] if mirrored else [Pictures(images)]


def check(generated, digits, mirrored=False):
    return copying_check(Pictures(generated), views(digits[0], mirrored), Pictures(digits[1]), PIXELS.to(DEVICE))


def test_images_that_are_copied_mirrored_or_shifted(digits):
    train, _, other = digits
    copied = train[:200]
    changed = {
        "copied": copied,
        "brighter": copied + 0.1,
        "noisy": copied + 0.3 * torch.randn(copied.shape, generator=torch.Generator().manual_seed(0)),
        "shifted by a third of a pixel": torch.lerp(copied, copied.roll(1, 3), 1 / 3),
        "other": other,
    }
    shares = {name: check(images, digits).figures["suspected_copies"] for name, images in changed.items()}
    assert shares.pop("copied") == 1 and shares.pop("other") < 0.1 and min(shares.values()) > 0.8, shares
    mirrored = train[:200].flip(3)
    assert check(mirrored, digits).figures["suspected_copies"] < 0.2
    found = check(mirrored, digits, mirrored=True)
    assert found.figures["suspected_copies"] == 1
    assert {one.train for one in found.suspects if one.view} >= set(range(100))


def test_the_most_suspicious_come_first_and_are_shown_beside_their_nearest(digits):
    train, _, other = digits
    generated = torch.cat([other[:20], train[7:8].flip(3), train[3:4]])
    found = check(generated, digits, mirrored=True)
    first, second = found.suspects[:2]
    assert {(one.generated, one.train, one.view) for one in (first, second)} == {(20, 7, 1), (21, 3, 0)}
    assert sorted(one.generated for one in found.suspects) == list(range(22))
    scores = [one.score for one in found.suspects]
    assert scores == sorted(scores)
    images = VQGANImageProcessor(16, 1).postprocess
    again = [found.suspects[0], *found.suspects]  # another image with the same nearest one
    rows = suspect_rows(again, Pictures(generated), views(train, True), images, count=3, columns=2)
    assert [(label, len(shown)) for label, shown in rows] == [
        ("generated", 2),
        ("nearest in training", 2),
        ("generated", 1),
        ("nearest in training", 1),
    ]
    assert [image.tobytes() for image in rows[0][1]] == [image.tobytes() for image in rows[1][1]]
    assert labelled_grid(rows).height > 4 * 64


def test_of_many_equal_images_those_shown_are_spread(digits):
    """Generated images are sorted by class; the picture must not show the first classes alone."""
    train = Pictures(digits[0])
    suspects = [Suspect(row, row, 0, 0.0) for row in range(9)] + [Suspect(9, 9, 0, 0.5)]
    ((_, above), _) = suspect_rows(suspects, train, [train], VQGANImageProcessor(16, 1).postprocess, count=3)
    expected = VQGANImageProcessor(16, 1).postprocess(digits[0][[0, 4, 8]])
    assert [image.tobytes() for image in above] == [image.tobytes() for image in expected]


def test_images_are_read_in_parts(digits):
    sets = [Pictures(part) for part in digits]
    copying_check(sets[2], [sets[0]], sets[1], PIXELS)
    assert [one.most for one in sets] == [copying.BATCH_SIZE] * 3


@pytest.mark.parametrize(
    "counts, words",
    [
        ((0, 600, 300), "generated: received 0 images; .* at least 1"),
        ((5, 1, 300), "train: received 1 images; .* at least 2"),
        ((5, 600, 18), "validation: received 18 images; .* at least 19"),
    ],
)
def test_too_few_images_are_refused(digits, counts, words):
    generated, train, held_out = (
        Pictures(part[:count]) for part, count in zip((digits[2], *digits[:2]), counts, strict=True)
    )
    with pytest.raises(ValueError, match=words):
        copying_check(generated, [train], held_out, PIXELS)


def test_held_out_images_that_are_training_images_are_refused(digits):
    train, held_out, other = digits
    mixed = torch.cat([train[:20], held_out[20:]])
    with pytest.raises(ValueError, match="20 of 300 held-out images equal a training image"):
        check(other, (train, mixed))


def test_a_tokenizer_hides_copies_unless_all_images_pass_it(digits):
    """An untrained tokenizer, whose reconstructions are far from the images."""
    torch.manual_seed(0)
    model = VQGANModel(VQGANConfig(**VQGAN)).eval().to(DEVICE)
    train, held_out, _ = (Reconstructions(Pictures(part[:60]), model) for part in digits)
    copies = Pictures(train.read(range(40)))
    assert copies.pixels.shape == (40, 1, 16, 16) and train.labels is None
    levels = (copies.pixels + 1) * 127.5
    torch.testing.assert_close(levels, levels.round().clamp(0, 255), rtol=0, atol=1e-3)
    with torch.no_grad():
        expected = model(digits[0][:40].to(DEVICE)).reconstruction.cpu().clamp(-1, 1)
    torch.testing.assert_close(copies.pixels, expected, rtol=0, atol=1 / 255 + 1e-4)
    network = PIXELS.to(DEVICE)
    plain = copying_check(copies, [Pictures(digits[0][:60])], Pictures(digits[1][:60]), network)
    assert plain.figures["suspected_copies"] < 0.5
    assert copying_check(copies, [train], held_out, network).figures["suspected_copies"] > 0.95


def as_codes(images, patches):
    """Codes `(N, 64)` of digits: each patch of 2×2 pixels by its nearest of K."""
    return patches.predict(F.unfold(images, 2, stride=2).mT.reshape(-1, 4).numpy()).reshape(len(images), -1)


def ngram_samples(codes, order, count, rng):
    """Samples of a prior that counts: the next code is drawn from those that follow its last `order` codes."""
    following = {}
    for row in codes:
        for place, code in enumerate(row):
            following.setdefault((place, *row[max(0, place - order) : place]), []).append(code)
    drawn = []
    for _ in range(count):
        row = []
        for place in range(codes.shape[1]):
            row.append(rng.choice(following[(place, *row[max(0, place - order) : place])]))
        drawn.append(row)
    return np.array(drawn)


def test_an_overfitted_prior_is_exposed_and_a_good_one_is_not(digits):
    """A prior over codes of digits that looks at the last 12 codes repeats its images; one that looks at 2 does not."""
    blocks = F.unfold(digits[0], 2, stride=2).mT.reshape(-1, 4).numpy()
    patches = KMeans(8, n_init=1, random_state=0).fit(blocks)
    train, held_out = (as_codes(part, patches) for part in digits[:2])
    entries = torch.from_numpy(patches.cluster_centers_).float()

    def decoded(codes):
        return Pictures(F.fold(entries[torch.from_numpy(codes).long()].mT, 16, 2, stride=2))

    shares = {}
    for order in (2, 12):
        samples = decoded(ngram_samples(train[:100], order, 100, np.random.default_rng(0)))
        found = copying_check(samples, [decoded(train[:100])], decoded(held_out), PIXELS.to(DEVICE))
        shares[order] = found.figures["suspected_copies"]
    assert shares[12] > 0.5 and shares[2] < 0.1, shares
