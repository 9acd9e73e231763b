"""Quantizers with several codes at each position, or with two grids, compared with loops over latents and codebooks."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from stage1_vqgan import VQGANConfig, VQGANModel, codes_shape, grids_text, num_codes
from stage1_vqgan.quantizers import build_quantizer, option_problems
from stage1_vqgan.reconstruction import codebook_perplexity, codebook_usage
from stage1_vqgan.training.codebook import CodebookMonitor, initialise_codebook, kmeans
from tests import tiny
from tests.devices import DEVICE, on_device

pytestmark = on_device

K, D = 11, 6
BETA = 0.3
PYRAMID = {"hidden_channels": 5, "num_res_blocks": 2}
KINDS = {
    "residual": ("residual", {"depth": 3}),
    "shared": ("residual", {"depth": 3, "shared_codebook": True}),
    "product": ("product", {"groups": 3}),
    "pyramid": ("pyramid", PYRAMID),
}


def make(kind, **options):
    name, own = KINDS[kind]
    torch.manual_seed(0)
    quantizer = build_quantizer(name, K, D, {"commitment_cost": BETA, **own, **options})
    for part in quantizer.codebooks:
        torch.nn.init.normal_(part.embedding.weight)
    latents = torch.randn(2, D, 3, 5, generator=torch.Generator().manual_seed(1)).to(DEVICE).requires_grad_()
    return quantizer, latents


def nearest(row, codebook):
    row = row.detach().double()
    distances = [float(((row - entry) ** 2).sum()) for entry in codebook.detach().double()]
    return distances.index(min(distances))


def as_rows(grid):
    return grid.permute(0, 2, 3, 1).flatten(0, 2)


def naive_loss(rows, entries):
    return ((entries - rows.detach()) ** 2).mean() + BETA * ((rows - entries.detach()) ** 2).mean()


def naive_vq(rows, weight):
    """Codes, entries and loss of rows `(N, D)`, row by row."""
    codes = torch.tensor([nearest(row, weight) for row in rows])
    entries = torch.stack([weight[code] for code in codes])
    return codes, entries, naive_loss(rows, entries)


def assert_same_gradients(found, expected, inputs):
    pairs = zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True)
    for gradient, reference in pairs:
        assert reference.abs().sum() > 0
        torch.testing.assert_close(gradient, reference, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- residual


@pytest.mark.parametrize("kind", ["residual", "shared"])
def test_each_code_is_the_entry_nearest_to_what_is_left(kind):
    quantizer, z = make(kind)
    weights = [part.embedding.weight for part in quantizer.codebooks]
    assert len(weights) == (1 if kind == "shared" else 3)
    rest, codes, total, loss = as_rows(z), [], 0.0, 0.0
    for depth in range(3):
        chosen, entries, term = naive_vq(rest, weights[min(depth, len(weights) - 1)])
        codes.append(chosen)
        rest, total, loss = rest - entries.detach(), total + entries.detach(), loss + term
    out = quantizer(z)
    assert torch.equal(out.codes, torch.stack(codes, 1).view(2, 3, 5, 3)) and len(out.codes.unique()) > 5
    torch.testing.assert_close(as_rows(out.quantized), total)
    torch.testing.assert_close(out.loss, loss)
    above = torch.randn_like(z)
    straight = (z * above).sum()  # the gradient of the output is that of the latents
    assert_same_gradients((out.quantized * above).sum() + out.loss, straight + loss, [z, *weights])


def test_more_depth_leaves_less():
    """Each further entry is chosen to come closer. 0 is an entry, so that no choice can lead away."""
    quantizer, z = make("residual", depth=6)
    with torch.no_grad():
        for part in quantizer.codebooks:
            part.embedding.weight[0] = 0
    codes = quantizer(z).codes.flatten(0, 2)
    entries = torch.stack([p.embedding.weight[c] for p, c in zip(quantizer.codebooks, codes.T, strict=True)])
    left = [(as_rows(z) - entries[:depth].sum(0)).norm(dim=1) for depth in range(7)]
    assert all((after <= before + 1e-6).all() for before, after in itertools.pairwise(left))
    assert left[6].mean() < 0.75 * left[1].mean()


def test_the_rotation_trick_turns_the_latent_onto_the_sum():
    from stage1_vqgan.quantizer_vq import rotate

    quantizer, z = make("residual", rotation_trick=True)
    out, above = quantizer(z), torch.randn_like(z)
    turned = rotate(as_rows(z), as_rows(out.quantized.detach()))
    assert_same_gradients((out.quantized * above).sum(), (turned * as_rows(above)).sum(), [z])


# ---------------------------------------------------------------- product


@pytest.mark.parametrize("options", [{}, {"l2_normalize": True}, {"rotation_trick": True}], ids=str)
def test_each_group_of_channels_is_quantized_alone(options):
    quantizer, z = make("product", **options)
    weights = [part.embedding.weight for part in quantizer.codebooks]
    assert [weight.shape for weight in weights] == [(K, 2)] * 3
    alone = []
    for part, group in zip(quantizer.codebooks, z.split(2, dim=1), strict=True):
        single = build_quantizer("vq", K, 2, {"commitment_cost": BETA, **options})
        single.load_state_dict(part.state_dict())
        single.embedding = part.embedding
        alone.append(single(group))
    out, above = quantizer(z), torch.randn_like(z)
    assert torch.equal(out.codes, torch.stack([each.codes for each in alone], -1))
    expected = torch.cat([each.quantized for each in alone], 1)
    torch.testing.assert_close(out.quantized, expected)
    loss = sum(each.loss for each in alone) / 3
    torch.testing.assert_close(out.loss, loss)
    assert_same_gradients((out.quantized * above).sum() + out.loss, (expected * above).sum() + loss, [z, *weights])


# ---------------------------------------------------------------- pyramid


def naive_blocks(x, modules):
    """Layers in order. A residual block is ReLU, 3×3 convolution, ReLU, 1×1 convolution, plus its input."""
    for layer in modules:
        if isinstance(layer, torch.nn.Conv2d):
            x = F.conv2d(x, layer.weight, layer.bias, stride=layer.stride, padding=layer.padding)
        elif isinstance(layer, torch.nn.Upsample):
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        elif isinstance(layer, torch.nn.ReLU):
            x = x.clamp(min=0)
        else:
            inner, outer = layer[1], layer[3]
            h = F.conv2d(x.clamp(min=0), inner.weight, inner.bias, padding=1).clamp(min=0)
            x = x + F.conv2d(h, outer.weight, outer.bias)
    return x


def as_grid(rows, like):
    return rows.view(len(like), *like.shape[2:], -1).permute(0, 3, 1, 2)


def through(z, entries):
    return z + (entries - z).detach()


def one_by_one(pair, layer):
    return torch.einsum("oc,bchw->bohw", layer.weight[:, :, 0, 0], torch.cat(pair, 1)) + layer.bias[:, None, None]


def test_the_fine_grid_knows_the_coarse_one():
    quantizer, z = make("pyramid")
    with torch.no_grad():
        quantizer.top.embedding.weight *= 0.2  # so that several of them are used
    for blend in (quantizer.join, quantizer.fuse):
        torch.nn.init.normal_(blend.weight, std=0.5)
        torch.nn.init.normal_(blend.bias, std=0.5)
    coarse = naive_blocks(z, quantizer.shrink)
    assert coarse.shape == (2, D, 2, 3)  # of 3×5: odd sides are rounded up
    top_codes, top_entries, top_loss = naive_vq(as_rows(coarse), quantizer.top.embedding.weight)
    top = through(coarse, as_grid(top_entries, coarse))
    grown = naive_blocks(top, quantizer.grow)[:, :, :3, :5]
    fine = one_by_one((z, grown), quantizer.join)
    bottom_codes, bottom_entries, bottom_loss = naive_vq(as_rows(fine), quantizer.bottom.embedding.weight)
    expected = one_by_one((grown, through(fine, as_grid(bottom_entries, fine))), quantizer.fuse)
    out = quantizer(z)
    assert torch.equal(out.codes, torch.cat([top_codes.view(2, -1), bottom_codes.view(2, -1)], 1))
    assert len(out.codes[:, :6].unique()) > 2 and len(out.codes[:, 6:].unique()) > 2
    torch.testing.assert_close(out.quantized, expected)
    torch.testing.assert_close(out.loss, top_loss + bottom_loss)
    above = torch.randn_like(z)
    inputs = [z, *quantizer.parameters()]
    loss = top_loss + bottom_loss
    assert_same_gradients((out.quantized * above).sum() + out.loss, (expected * above).sum() + loss, inputs)


def test_the_fine_grid_starts_with_what_the_coarse_one_leaves():
    quantizer, z = make("pyramid")
    entries = quantizer.top(quantizer.shrink(z)).quantized
    predicted = quantizer.grow(entries)[:, :, :3, :5]
    left = quantizer.bottom(z - predicted)
    torch.testing.assert_close(quantizer(z).quantized, predicted + left.quantized)


def test_another_code_of_the_coarse_grid_changes_its_surroundings_only():
    quantizer, _ = make("pyramid", num_res_blocks=0)
    codes = torch.zeros(1, 4 * 4 + 8 * 8, dtype=torch.int64)
    before = quantizer.lookup(codes, (8, 8))
    codes[0, 0] = 1  # the upper left one
    changed = (quantizer.lookup(codes, (8, 8)) != before).any(1)[0]
    assert changed[:2, :2].all() and not changed[6:].any() and not changed[:, 6:].any()


# ---------------------------------------------------------------- the order of codes, and the whole model


def test_one_order_of_the_codes_of_all_shapes():
    assert codes_shape(((3, 5, 1),)) == (3, 5) and codes_shape(((3, 5, 4),)) == (3, 5, 4)
    assert codes_shape(((2, 3, 1), (3, 5, 1))) == (21,) and num_codes(((2, 3, 2), (3, 5, 1))) == 27
    assert grids_text(((3, 5, 1),)) == "3×5" and grids_text(((2, 3, 2), (3, 5, 1))) == "2×3×2 and 3×5"
    quantizer, z = make("residual")
    flat = quantizer(z).codes.flatten(1)
    numbers = quantizer.entry_numbers(flat.view(2, 3, 5, 3), (3, 5)).flatten(1)
    for position in range(15):
        for depth in range(3):
            place = position * 3 + depth
            assert (numbers[:, place] == flat[:, place] + depth * K).all()
    pyramid, z = make("pyramid")
    codes = pyramid(z).codes
    assert torch.equal(pyramid.entry_numbers(codes, (3, 5)) - codes, torch.tensor([[0] * 6 + [K] * 15] * 2))


def tokenizer(kind, **changes):
    name, options = KINDS[kind]
    torch.manual_seed(0)
    values = {**tiny.VQGAN, "embed_dim": 6, "quantizer": name, "quantizer_options": options, **changes}
    model = VQGANModel(VQGANConfig(**values)).eval()
    for part in model.quantize.codebooks:
        torch.nn.init.normal_(part.embedding.weight)
    return model


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_tokenizer_decodes_its_own_codes_at_every_size(kind):
    model = tokenizer(kind)
    for height, width in ((16, 16), (12, 20)):
        images = torch.rand(3, 1, height, width) * 2 - 1
        out, grid = model(images), (height // 4, width // 4)
        assert out.codes.shape[1:] == codes_shape(model.quantize.grids(*grid))
        torch.testing.assert_close(model.decode_codes(out.codes, grid), out.reconstruction, atol=2e-5, rtol=0)
        assert torch.equal(model.encode(images[1:2]).codes, out.codes[1:2])  # does not depend on the batch
    assert num_codes(model.config.grids) == model.config.num_codes_per_image


@pytest.mark.parametrize(
    ("kind", "shape", "needed"),
    [
        ("residual", (2, 4, 4), r"\(B, h, w, 3\)"),
        ("residual", (2, 4, 4, 2), r"\(B, h, w, 3\)"),
        ("product", (2, 48), r"\(B, h, w, 3\)"),
        ("pyramid", (2, 4, 4), r"\(B, 20\)"),
        ("pyramid", (2, 16), r"\(B, 20\)"),
    ],
)
def test_codes_of_another_shape_are_refused(kind, shape, needed):
    model = tokenizer(kind)
    with pytest.raises(ValueError, match=rf"codes: received torch.int64 .*; needs int64 {needed}"):
        model.decode_codes(torch.zeros(shape, dtype=torch.int64))


def test_the_fingerprint_depends_on_how_codes_are_made():
    a, b = tokenizer("residual"), tokenizer("residual")
    assert a.compute_fingerprint() == b.compute_fingerprint()
    shared = tokenizer("shared")
    for model, changes in (
        (shared, {"depth": 4, "shared_codebook": True}),
        (tokenizer("product"), {"groups": 2}),
        (tokenizer("pyramid"), {**PYRAMID, "l2_normalize": True}),
    ):
        other = copy.deepcopy(model.config)
        other.quantizer_options = changes
        assert model.compute_fingerprint(other) != model.compute_fingerprint()


@pytest.mark.parametrize(
    ("name", "options", "field"),
    [
        ("residual", {"depth": 1}, "depth"),
        ("residual", {"depth": 65}, "depth"),
        ("residual", {"depth": 2.0}, "depth"),
        ("residual", {"l2_normalize": True}, "l2_normalize"),
        ("product", {"groups": 4}, "groups"),
        ("product", {"groups": 1}, "groups"),
        ("pyramid", {"hidden_channels": 0}, "hidden_channels"),
        ("pyramid", {"num_res_blocks": -1}, "num_res_blocks"),
        ("pyramid", {"commitment_cost": -1}, "commitment_cost"),
    ],
)
def test_options_that_cannot_be(name, options, field):
    assert [found for found, *_ in option_problems(name, options, K, D)] == [f"quantizer_options.{field}"]


# ---------------------------------------------------------------- upkeep of several codebooks


def test_kmeans_places_the_second_codebook_on_what_the_first_leaves():
    model = tokenizer("residual", num_embeddings=5)
    average = copy.deepcopy(model)
    images = [torch.rand(8, 1, 16, 16) * 2 - 1 for _ in range(2)]
    initialise_codebook(model, average, images, Accelerator(), seed=3)
    rest = torch.cat([as_rows(average.encode(batch).latents.detach()) for batch in images])
    left = [rest.square().mean()]
    for part in model.quantize.codebooks:
        centres = kmeans(rest, 5, spherical=False, seed=3)
        torch.testing.assert_close(part.codebook.detach(), centres)
        rest = rest - centres[[nearest(row, centres) for row in rest]]
        left.append(rest.square().mean())
    assert left[3] < left[2] < left[1] < 0.5 * left[0]
    for own, averaged in zip(model.quantize.codebooks, average.quantize.codebooks, strict=True):
        assert torch.equal(own.codebook, averaged.codebook)


@pytest.mark.parametrize("kind", KINDS)
def test_each_codebook_restarts_its_own_unused_entries(kind):
    quantizer, z = make(kind)
    books = quantizer.codebooks
    for book in books:
        book.move_entries(torch.tensor([2]), torch.full((1, book.embed_dim), 100.0))  # which no latent uses
    average = copy.deepcopy(quantizer)
    optimizer = torch.optim.AdamW(quantizer.parameters())
    monitor = CodebookMonitor(K, DEVICE, len(books))
    entries = quantizer.entry_numbers(quantizer(z).codes, (3, 5))
    used = [{code - book * K for code in entries.flatten().tolist() if code // K == book} for book in range(len(books))]
    monitor.update(entries)
    statistics = monitor.statistics(torch.clone)
    assert statistics["codebook/usage"].item() == pytest.approx(sum(map(len, used)) / (len(books) * K))
    candidates = [rows.flip(0) for rows in quantizer.inputs(z)]
    before = [book.codebook.detach().clone() for book in books]
    moved = monitor.restart(quantizer, average, optimizer, candidates, lambda value: value)
    assert moved.item() == sum(K - len(each) for each in used) > 0
    for book, averaged, old, each, rows in zip(books, average.codebooks, before, used, candidates, strict=True):
        dead = [code for code in range(K) if code not in each]
        torch.testing.assert_close(book.codebook[dead].detach(), rows[: len(dead)])
        assert torch.equal(book.codebook[list(each)], old[list(each)]) and torch.equal(book.codebook, averaged.codebook)


def test_usage_and_perplexity_of_several_codebooks():
    counts = torch.tensor([[5, 5, 0, 0], [1, 1, 1, 1]])
    assert codebook_usage(counts).item() == 0.75
    assert codebook_perplexity(counts).item() == pytest.approx(3, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "shape", "grid", "message"),
    [
        ("pyramid", (1, 20), (4,), r"grid: received \(4,\); needs h and w, two whole numbers from 1 up"),
        ("pyramid", (1, 20), 4, "grid: received 4; needs"),
        ("pyramid", (1, 20), (0, 4), r"grid: received \(0, 4\); needs"),
        ("pyramid", (1, 20), ("4", 4), "grid: received .*; needs"),
        ("pyramid", (1, 2, 10), None, r"codes: received torch.int64 \(1, 2, 10\); needs int64 \(B, 20\)"),
    ],
)
def test_a_wrong_grid_is_refused(kind, shape, grid, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        tokenizer(kind).decode_codes(torch.zeros(shape, dtype=torch.int64), grid)
