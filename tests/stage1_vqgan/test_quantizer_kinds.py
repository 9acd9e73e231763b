"""Every kind of quantizer, compared with direct implementations of its formulas."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from stage1_vqgan import VQGANConfig, VQGANModel, quantizer_base, quantizer_softmax
from stage1_vqgan.quantizers import QUANTIZERS, CodebookQuantizer, build_quantizer, codes_shape
from tests.devices import DEVICE, cpu_only, on_device
from tests.slow import few

pytestmark = on_device

KINDS = {
    "vq": ("vq", 16, 4, {}),
    "vq, unit sphere": ("vq", 16, 4, {"l2_normalize": True, "legacy_codebook_loss": True}),
    "vq, entropy": ("vq", 16, 4, {"entropy_weight": 0.1, "entropy_temperature": 0.5}),
    "vq, rotation": ("vq", 16, 4, {"rotation_trick": True}),
    "ema": ("ema", 16, 4, {}),
    "ema, unit sphere": ("ema", 16, 4, {"l2_normalize": True}),
    "ema, entropy and rotation": ("ema", 16, 4, {"entropy_weight": 0.1, "rotation_trick": True}),
    "simvq": ("simvq", 16, 4, {}),
    "simvq, unit sphere": ("simvq", 16, 4, {"l2_normalize": True, "rotation_trick": True}),
    "ibq": ("ibq", 16, 4, {}),
    "gumbel": ("gumbel", 16, 4, {}),
    "gumbel, soft": ("gumbel", 16, 4, {"straight_through": False}),
    "fsq": ("fsq", 60, 3, {"levels": [5, 4, 3]}),
    "lfq": ("lfq", 16, 4, {}),
    "bsq": ("bsq", 16, 4, {}),
    "residual": ("residual", 16, 4, {"depth": 3}),
    "product": ("product", 16, 4, {"groups": 2}),
    "pyramid": ("pyramid", 16, 4, {"hidden_channels": 8, "num_res_blocks": 1}),
}
SHAPES = {"residual": (3, 5, 3), "product": (3, 5, 2), "pyramid": (2 * 3 + 3 * 5,)}  # of codes; (3, 5) of other kinds

SMALL = {
    "image_size": 16,
    "base_channels": 8,
    "channel_multiplier": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "norm_num_groups": 4,
    "latent_channels": 8,
}


def make(kind, seed=0, **options):
    name, codes, width, defaults = KINDS[kind]
    torch.manual_seed(seed)
    quantizer = build_quantizer(name, codes, width, {**defaults, **options})
    for parameter in quantizer.parameters():
        torch.nn.init.normal_(parameter, std=0.1 if parameter.shape[2:] == (3, 3) else 1.0)
    return quantizer


def latents(kind, batch=2, seed=1):
    shape = (batch, KINDS[kind][2], 3, 5)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def as_rows(grid):
    return grid.permute(0, 2, 3, 1).flatten(0, 2)


def test_every_kind_is_here():
    assert {name for name, *_ in KINDS.values()} == set(QUANTIZERS)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_interface(kind, training):
    quantizer, z = make(kind).train(training), latents(kind)
    out = quantizer(z)
    assert out.quantized.shape == z.shape and out.quantized.dtype == torch.float32
    assert out.codes.shape == (2, *SHAPES.get(kind, (3, 5))) == (2, *codes_shape(quantizer.grids(3, 5)))
    assert out.codes.dtype == torch.int64 and out.loss.shape == ()
    entries = quantizer.entry_numbers(out.codes, (3, 5))
    assert torch.equal(entries % KINDS[kind][1], out.codes) and entries.max() < quantizer.num_entries
    assert out.codes.min() >= 0 and out.codes.max() < KINDS[kind][1] and len(out.codes.unique()) > 3
    if kind != "gumbel, soft" or not training:
        torch.testing.assert_close(quantizer.lookup(out.codes, (3, 5)), out.quantized)
    if training:
        (gradient,) = torch.autograd.grad((out.quantized * torch.randn_like(z)).sum() + out.loss, z)
        assert gradient.isfinite().all() and gradient.abs().sum() > 0
    else:
        again = quantizer(z)
        assert torch.equal(again.codes, out.codes) and torch.equal(again.quantized, out.quantized)
        single = quantizer(z[1:])
        assert torch.equal(single.codes, out.codes[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_float32_under_autocast(kind):
    quantizer, z = make(kind).eval(), latents(kind, batch=16)
    plain = quantizer(z)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        mixed = quantizer(z)
    assert mixed.quantized.dtype == mixed.loss.dtype == torch.float32
    assert torch.equal(mixed.codes, plain.codes) and torch.equal(mixed.quantized, plain.quantized)
    assert torch.equal(mixed.loss, plain.loss)


@pytest.mark.parametrize("kind", few(["vq, unit sphere", *QUANTIZERS], "ema", "lfq", "residual", "pyramid"))
def test_a_tokenizer_of_every_kind_is_saved_and_loaded(kind, tmp_path):
    name, codes, width, options = KINDS[kind]
    torch.manual_seed(0)
    shape = {"embed_dim": width, "num_embeddings": codes}
    model = VQGANModel(VQGANConfig(**SMALL, **shape, quantizer=name, quantizer_options=options)).eval()
    model.save_pretrained(tmp_path)
    loaded, images = VQGANModel.from_pretrained(tmp_path), torch.rand(2, 3, 16, 16) * 2 - 1
    assert loaded.config.quantizer == name and loaded.config.quantizer_options == options
    before, after = model(images), loaded(images)
    assert torch.equal(before.codes, after.codes) and torch.equal(before.reconstruction, after.reconstruction)
    assert loaded.compute_fingerprint() == model.config.fingerprint
    torch.testing.assert_close(loaded.decode_codes(after.codes), after.reconstruction, atol=2e-5, rtol=0)


# ---------------------------------------------------------------- vq


def naive_entropies(z, codebook, temperature):
    """Mean of the entropies of softmax(-distance / temperature), and the entropy of its mean."""
    distances = ((z[:, None] - codebook[None]) ** 2).sum(-1)
    p = torch.softmax(-distances / temperature, 1)
    mean = p.mean(0)
    return torch.special.entr(p).sum(1).mean(), torch.special.entr(mean).sum()


@pytest.mark.parametrize("rows", [7, 16, 19])
def test_entropy_term_of_vq(rows, monkeypatch):
    monkeypatch.setattr(quantizer_softmax, "SOFTMAX_SCORES", 8 * 16)
    quantizer = make("vq, entropy")
    weight = quantizer.embedding.weight
    z = torch.randn(rows, 4, requires_grad=True)
    of_latents, of_mean = naive_entropies(z, weight, 0.5)
    found, expected = quantizer.entropy_loss(z, quantizer.codebook), of_latents - of_mean
    torch.testing.assert_close(found, expected)
    pairs = zip(torch.autograd.grad(found, (z, weight)), torch.autograd.grad(expected, (z, weight)), strict=True)
    for gradient, reference in pairs:
        torch.testing.assert_close(gradient, reference)
    grid = z.detach().T.reshape(1, 4, rows, 1)
    plain = make("vq")(grid).loss
    torch.testing.assert_close(quantizer(grid).loss - plain, 0.1 * expected.detach())
    assert torch.equal(quantizer.eval()(grid).loss, plain)


def test_entropy_term_of_sharp_distributions():
    """With large logits, in float32 the entropies are those in float64."""
    quantizer = make("vq, entropy", entropy_temperature=1e-3)
    z = quantizer.codebook.detach().repeat(4, 1) + 0.02 * torch.randn(64, 4)
    of_latents, of_mean = naive_entropies(z.double(), quantizer.codebook.double(), 1e-3)
    torch.testing.assert_close(
        quantizer.entropy_loss(z, quantizer.codebook).double(), of_latents - of_mean, rtol=1e-4, atol=1e-4
    )


def test_rotation_trick():
    """The gradient of a latent passes through the matrix that rotates and scales the latent onto its entry."""
    quantizer, z = make("vq, rotation"), latents("vq, rotation")
    out = quantizer(z)
    gradient = torch.randn_like(z)
    out.quantized.backward(gradient)
    for row, entry, above, below in zip(
        *map(as_rows, (z.detach(), out.quantized.detach(), gradient, z.grad)), strict=True
    ):
        u, v = row / row.norm(), entry / entry.norm()
        # Rodrigues: the rotation in the plane of u and v
        plane = torch.outer(v, u) - torch.outer(u, v)
        rotation = torch.eye(4) + plane + plane @ plane / (1 + u @ v)
        torch.testing.assert_close(rotation @ u, v, atol=1e-5, rtol=1e-4)
        stretch = entry.norm() / row.norm()
        torch.testing.assert_close(below, stretch * rotation.T @ above, atol=1e-4, rtol=1e-3)


# ---------------------------------------------------------------- ema


@pytest.mark.parametrize("kind", ["ema", "ema, unit sphere"])
def test_ema_is_a_moving_average_of_counts_and_sums(kind):
    quantizer = make(kind, decay=0.8, epsilon=1e-3)
    assert [name for name, p in quantizer.named_parameters() if p.requires_grad] == []
    entries = quantizer.embedding.weight.clone()
    sizes, sums, averages = torch.ones(16), entries.clone(), entries.clone()
    for step in range(6):
        batches = [latents(kind, seed=10 * step + part).detach() for part in range(2)]  # two micro-batches
        counts, totals = torch.zeros(16), torch.zeros(16, 4)
        for z in batches:
            codes = quantizer(z).codes
            quantizer.observe(z, codes)
            for row, code in zip(as_rows(z), codes.flatten(), strict=True):
                counts[code] += 1
                totals[code] += row / row.norm() if "sphere" in kind else row
        quantizer.update(lambda value: value)
        sizes, sums = 0.8 * sizes + 0.2 * counts, 0.8 * sums + 0.2 * totals
        smoothed = (sizes + 1e-3) / (sizes.sum() + 16 * 1e-3) * sizes.sum()
        for code in range(16):
            if counts[code]:
                averages[code] = sums[code] / smoothed[code]
            else:  # stays; the sum that belongs to it is not stored, but follows from it
                sums[code] = averages[code] * smoothed[code]
        torch.testing.assert_close(quantizer.embedding.weight, averages, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(quantizer.cluster_size, sizes)
    assert not torch.allclose(quantizer.embedding.weight, entries, atol=0.1)


def test_ema_loss_is_the_commitment_alone():
    quantizer, z = make("ema", commitment_cost=0.3), latents("ema")
    out = quantizer(z)
    torch.testing.assert_close(out.loss, 0.3 * F.mse_loss(z, out.quantized.detach()))


def test_ema_entries_that_nobody_chooses_stay_and_moved_ones_start_anew():
    quantizer = make("ema", decay=0.9)
    with torch.no_grad():
        quantizer.embedding.weight[3] = 1000.0
    for step in range(100):
        z = latents("ema", seed=step)
        quantizer.observe(z, quantizer(z).codes)
        quantizer.update(lambda value: value)
    assert quantizer.embedding.weight[3].eq(1000).all()
    assert quantizer.cluster_size[3].item() == pytest.approx(0.9**100, rel=1e-4)  # and far below ε
    with torch.no_grad():
        quantizer.move_entries(torch.tensor([3]), torch.zeros(1, 4))
    assert quantizer.embedding.weight[3].eq(0).all() and quantizer.cluster_size[3] == 1


def test_rotation_and_entropy_of_ema_are_those_of_vq():
    ema, vq = make("ema, entropy and rotation"), make("vq", entropy_weight=0.1, rotation_trick=True)
    vq.load_state_dict(ema.state_dict(), strict=False)
    z, above = latents("ema"), torch.randn(2, 4, 3, 5)
    found, expected = ema(z), vq(z)
    assert torch.equal(found.quantized, expected.quantized)
    # vq's loss also has the codebook term, which has the value of the commitment term over β
    torch.testing.assert_close(found.loss, expected.loss - F.mse_loss(z, found.quantized))
    pairs = [torch.autograd.grad((out.quantized * above).sum() + out.loss, z) for out in (found, expected)]
    torch.testing.assert_close(*pairs)


# ---------------------------------------------------------------- simvq, ibq


@pytest.mark.parametrize("kind", ["simvq", "simvq, unit sphere"])
def test_simvq_is_vq_with_a_codebook_that_one_layer_makes(kind):
    quantizer, z = make(kind, rotation_trick=False), latents(kind)
    frozen, (weight, bias) = quantizer.embedding.weight, quantizer.embedding_proj.parameters()
    out = quantizer(z)
    rows, codebook = as_rows(z), torch.stack([weight @ row + bias for row in frozen])
    if "sphere" in kind:
        rows, codebook = (x / x.norm(dim=1, keepdim=True) for x in (rows, codebook))
    codes = ((rows[:, None] - codebook) ** 2).sum(-1).argmin(1)
    assert torch.equal(out.codes.flatten(), codes)
    torch.testing.assert_close(as_rows(out.quantized), codebook[codes])
    expected = ((codebook[codes] - rows.detach()) ** 2).mean() + 0.25 * ((codebook[codes].detach() - rows) ** 2).mean()
    torch.testing.assert_close(out.loss, expected)
    trained = (z, weight, bias)
    for pair in zip(torch.autograd.grad(out.loss, trained), torch.autograd.grad(expected, trained), strict=True):
        torch.testing.assert_close(*pair)


@pytest.mark.parametrize("kind, trained", [("ema", []), ("simvq", ["embedding_proj.weight", "embedding_proj.bias"])])
def test_frozen_entries_stay_frozen_in_fine_tuning(kind, trained, tmp_path):
    model = VQGANModel(VQGANConfig(**SMALL, embed_dim=64, num_embeddings=500, quantizer=kind))
    model.save_pretrained(tmp_path)
    for tokenizer in (model, VQGANModel.from_pretrained(tmp_path)):
        assert [name for name, weight in tokenizer.quantize.named_parameters() if weight.requires_grad] == trained
    if kind == "simvq":
        assert model.quantize.embedding.weight.std().item() == pytest.approx(1 / 8, rel=0.02)


@pytest.mark.parametrize("rows_at_once", [1, 7, 100])
def test_index_backpropagation(monkeypatch, rows_at_once):
    """The paper's one-hot: hard in its value, soft in its gradient, with all N × K numbers at once."""
    monkeypatch.setattr(quantizer_softmax, "SOFTMAX_SCORES", 16 * rows_at_once)
    quantizer, z = make("ibq", codebook_cost=0.3, entropy_weight=0.2, entropy_temperature=0.5), latents("ibq")
    weight, rows = quantizer.embedding.weight, as_rows(z)
    similarities = rows @ weight.T
    soft, codes = similarities.softmax(1), similarities.argmax(1)
    hard = F.one_hot(codes, 16).float()
    one_hot = hard - soft.detach() + soft
    zq, entries = one_hot @ weight, hard @ weight
    p = (similarities / 0.5).softmax(1)
    entropies = -(p * p.log()).sum(1).mean() + (p.mean(0) * p.mean(0).log()).sum()
    loss = ((zq - rows) ** 2).mean() + ((entries.detach() - rows) ** 2).mean()
    loss = loss + 0.3 * ((entries - rows.detach()) ** 2).mean() + 0.2 * entropies

    out = quantizer(z)
    assert torch.equal(out.codes.flatten(), codes)
    torch.testing.assert_close(as_rows(out.quantized), entries)
    torch.testing.assert_close(out.loss, loss)
    above = torch.randn_like(rows)
    found = torch.autograd.grad((as_rows(out.quantized) * above).sum() + out.loss, (z, weight))
    for pair in zip(found, torch.autograd.grad((zq * above).sum() + loss, (z, weight)), strict=True):
        torch.testing.assert_close(*pair, atol=2e-5, rtol=1e-4)
    assert found[1].ne(0).all()  # every entry learns from every latent


@cpu_only
def test_index_backpropagation_makes_no_matrix_of_all_latents_and_codes(monkeypatch):
    monkeypatch.setattr(quantizer_softmax, "SOFTMAX_SCORES", 8 * 2048)
    monkeypatch.setattr(quantizer_base, "CPU_SCORES", 8 * 2048)
    quantizer, z = build_quantizer("ibq", 2048, 4, {}), torch.randn(512, 4, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        quantized, _, loss = quantizer.quantize(z)
        (quantized.sum() + loss).backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= 4 * 8 * 2048 * 4 < 512 * 2048


# ---------------------------------------------------------------- gumbel


def gumbel_logits(quantizer, z):
    return as_rows(z) @ quantizer.proj.weight[:, :, 0, 0].T + quantizer.proj.bias


@pytest.mark.parametrize("kind", ["gumbel", "gumbel, soft"])
def test_gumbel_softmax(kind):
    quantizer, z, seeds = make(kind), latents(kind), [5, 9]
    quantizer.prepare(0.0, seeds)
    out = quantizer(z)
    logits = gumbel_logits(quantizer, z)
    noise = torch.cat(
        [torch.empty(15, 16).exponential_(generator=torch.Generator(DEVICE).manual_seed(s)).log().neg() for s in seeds]
    )
    soft = torch.softmax((logits + noise) / 1.0, 1)
    assert torch.equal(out.codes.flatten(), (logits + noise).argmax(1))
    entries = quantizer.embed.weight
    expected = entries[out.codes.flatten()] if kind == "gumbel" else soft @ entries
    torch.testing.assert_close(as_rows(out.quantized), expected)
    above = torch.randn_like(expected)
    found = torch.autograd.grad((as_rows(out.quantized) * above).sum(), (z, quantizer.proj.weight))
    wanted = torch.autograd.grad(((soft @ entries) * above).sum(), (z, quantizer.proj.weight))
    for gradient, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, reference)


def test_gumbel_divergence_from_the_uniform_distribution():
    quantizer, z = make("gumbel", kl_weight=2.0), latents("gumbel")
    q = torch.softmax(gumbel_logits(quantizer, z), 1)
    divergence = (q * (q * 16).log()).sum(1).mean()
    torch.testing.assert_close(quantizer(z).loss, 2 * divergence)
    with torch.no_grad():
        quantizer.proj.weight.zero_()
        quantizer.proj.bias.zero_()
    assert quantizer(z).loss.item() == pytest.approx(0, abs=1e-6)


def test_gumbel_noise_is_standard_and_belongs_to_the_image():
    quantizer, z = make("gumbel"), latents("gumbel", batch=4)
    quantizer.prepare(0.3, [1, 2, 3, 4])
    whole = quantizer(z)
    for part in (slice(0, 1), slice(1, 4)):
        quantizer.prepare(0.3, [1, 2, 3, 4][part])
        assert torch.equal(quantizer(z[part]).codes, whole.codes[part])
    quantizer.prepare(0.3, [1, 2, 3, 5])
    assert not torch.equal(quantizer(z).codes[3], whole.codes[3])
    quantizer.prepare(0.0, range(200))
    noise = quantizer._gumbel_noise(torch.empty(200 * 15, 16))
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)  # Euler's constant
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.05)


def test_gumbel_temperature_falls_along_half_a_cosine():
    quantizer = make("gumbel", temperature_start=2.0, temperature_end=0.5)
    found = []
    for progress in (0, 0.25, 0.5, 1):
        quantizer.prepare(progress, [])
        found.append(quantizer.temperature)
    assert found == pytest.approx([2.0, 0.5 + 0.75 * (1 + 0.5**0.5), 1.25, 0.5])


def test_gumbel_restarts_attract_before_the_logits_have_learnt_to():
    """Random logits may fall where a latent lies near its entry. A moved entry must not take this scale."""
    quantizer = make("gumbel").eval()
    with torch.no_grad():
        quantizer.proj.weight.copy_(-quantizer.embed.weight[:, :, None, None])
    rows = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    quantizer.move_entries(torch.tensor([5, 11]), rows)
    assert quantizer(rows[:, :, None, None]).codes.flatten().tolist() == [5, 11]


def test_gumbel_in_evaluation_takes_the_likeliest_code():
    quantizer, z = make("gumbel").eval(), latents("gumbel")
    quantizer.prepare(0.0, [1, 2])
    assert torch.equal(quantizer(z).codes.flatten(), gumbel_logits(quantizer, z).argmax(1))


def test_gumbel_starts_as_a_soft_nearest_neighbour():
    """After k-means, the choice is a softmax over -½ s ‖z - c‖², whose spread over the centres is the sharpness."""
    quantizer, z = make("gumbel", sharpness=12), latents("gumbel")
    centres = torch.randn(16, 4) * torch.tensor([3.0, 1.0, 0.3, 0.1]) + 2
    scale = 2 * 12 / (2 * ((centres - centres.mean(0)) ** 2).sum(1).mean())

    def assert_soft_nearest(entries):
        assert torch.equal(quantizer.codebook, entries)
        distances = ((as_rows(z)[:, None] - entries) ** 2).sum(-1)
        found, expected = gumbel_logits(quantizer, z).softmax(1), (-0.5 * scale * distances).softmax(1)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)
        assert torch.equal(quantizer.eval()(z).codes.flatten(), distances.argmin(1))

    quantizer.place_entries(centres)
    assert_soft_nearest(centres)
    between = ((centres[:, None] - centres) ** 2).sum(-1)
    torch.testing.assert_close((0.5 * scale * between).mean(), torch.tensor(12.0))
    moved = centres.clone()
    moved[[3, 9]] = torch.randn(2, 4)
    quantizer.move_entries(torch.tensor([3, 9]), moved[[3, 9]])  # a restart keeps the scale
    assert_soft_nearest(moved)


def test_gumbel_starts_from_equal_centres():
    quantizer, z = make("gumbel"), latents("gumbel")
    quantizer.place_entries(torch.ones(16, 4))
    out = quantizer(z)
    assert out.loss.item() == pytest.approx(0, abs=1e-4) and out.quantized.eq(1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_entries_have_a_row_for_each(kind):
    quantizer = make(kind)
    if isinstance(quantizer, CodebookQuantizer):
        rows = torch.randn(2, KINDS[kind][2])
        before, kept = [weight.clone() for weight in quantizer.entry_weights()], [0, *range(3, 16)]
        quantizer.move_entries(torch.tensor([1, 2]), rows)
        expected = rows / rows.norm(dim=1, keepdim=True) if quantizer.l2_normalize else rows
        torch.testing.assert_close(quantizer.codebook[1:3], expected)
        for old, new in zip(before, quantizer.entry_weights(), strict=True):
            assert torch.equal(new[kept], old[kept]) and not torch.equal(new[1:3], old[1:3])


# ---------------------------------------------------------------- fsq, lfq, bsq


@pytest.mark.parametrize("levels", [[3], [4], [5, 4, 3], [8, 5, 5]])
def test_fsq_codes_and_entries_are_one_to_one(levels):
    quantizer = build_quantizer("fsq", math.prod(levels), len(levels), {"levels": levels})
    entries = quantizer.entries(torch.arange(math.prod(levels)))
    values = [[(digit - count // 2) / (count // 2) for digit in range(count)] for count in levels]
    # the first channel is the least significant; itertools.product varies its last one fastest
    expected = [list(reversed(combination)) for combination in itertools.product(*reversed(values))]
    torch.testing.assert_close(entries, torch.tensor(expected))
    z = 2 * torch.randn(20_000, len(levels), generator=torch.Generator().manual_seed(0))
    quantized, codes, loss = quantizer.quantize(z)
    assert len(codes.unique()) == math.prod(levels) and loss == 0
    torch.testing.assert_close(quantizer.entries(codes), quantized)


def test_fsq_rounds_a_bounded_latent():
    quantizer, z = make("fsq"), latents("fsq")
    out = quantizer(z)
    for channel, count in enumerate([5, 4, 3]):
        half = (count - 1) * 1.001 / 2
        offset = 0.0 if count % 2 else 0.5
        for value, found in zip(z[:, channel].flatten(), out.quantized[:, channel].flatten(), strict=True):
            bounded = math.tanh(value.item() + math.atanh(offset / half)) * half - offset
            assert found.item() == pytest.approx(round(bounded) / (count // 2), abs=1e-6)
    zero = quantizer(torch.zeros_like(z)).quantized
    torch.testing.assert_close(zero, torch.zeros_like(zero), atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad(out.quantized[:, 0].sum(), z)
    torch.testing.assert_close(gradient[:, 0], (1 - torch.tanh(z[:, 0]) ** 2) * 2 * 1.001 / 2)


def corners(width):
    return torch.tensor(list(itertools.product([-1.0, 1.0], repeat=width)))


def test_lfq_codes_are_the_nearest_corners_of_the_cube():
    quantizer, z = make("lfq"), latents("lfq")
    torch.testing.assert_close(quantizer.entries(torch.arange(16)), corners(4))
    out = quantizer(z)
    assert torch.equal(out.codes.flatten(), torch.cdist(as_rows(z), corners(4)).argmin(1))
    above = torch.randn_like(z)
    (gradient,) = torch.autograd.grad((out.quantized * above).sum(), z)
    assert torch.equal(gradient, above)


@pytest.mark.parametrize("width", [1, 4, 5])
def test_lfq_entropy_is_that_of_the_softmax_over_all_codes(width):
    options = {"diversity_weight": 0.7, "entropy_temperature": 2.0, "commitment_cost": 0.3, "entropy_weight": 0.2}
    quantizer = build_quantizer("lfq", 2**width, width, options)
    z = torch.randn(50, width, generator=torch.Generator().manual_seed(0)).requires_grad_()
    of_latents, of_mean = naive_entropies(z, corners(width), 2.0)
    expected = 0.3 * ((z - z.sign()) ** 2).mean() + 0.2 * (of_latents - 0.7 * of_mean)
    _, _, found = quantizer.quantize(z)
    torch.testing.assert_close(found, expected)
    (gradient,), (reference,) = torch.autograd.grad(found, z), torch.autograd.grad(expected, z)
    torch.testing.assert_close(gradient, reference)


def test_bsq_codes_are_the_nearest_corners_on_the_sphere():
    quantizer, z = make("bsq"), latents("bsq")
    torch.testing.assert_close(quantizer.entries(torch.arange(16)), corners(4) / 2)
    out, (lfq_codes, above) = quantizer(z), (make("lfq")(z).codes, torch.randn_like(z))
    assert torch.equal(out.codes, lfq_codes)
    (gradient,) = torch.autograd.grad((out.quantized * above).sum(), z)
    u = z / z.norm(dim=1, keepdim=True)
    (reference,) = torch.autograd.grad((u / 2 * above).sum(), z)  # sign(u) / √D, straight through the sign
    torch.testing.assert_close(gradient, reference)


@pytest.mark.parametrize("width", [1, 4, 5])
def test_bsq_entropy_of_the_softmax_over_all_codes_and_of_independent_bits(width):
    options = {"diversity_weight": 0.7, "entropy_temperature": 0.3, "commitment_cost": 0.3, "entropy_weight": 0.2}
    quantizer = build_quantizer("bsq", 2**width, width, options)
    z = torch.randn(50, width, generator=torch.Generator().manual_seed(0)).requires_grad_()
    u, codes = z / z.norm(dim=1, keepdim=True), corners(width) / width**0.5
    q = torch.softmax(-((u[:, None] - codes) ** 2).sum(-1) / 0.3, 1)
    on = [q.mean(0)[codes[:, bit] > 0].sum() for bit in range(width)]  # mean probability that a bit is set
    product = torch.stack(
        [math.prod(p if sign > 0 else 1 - p for p, sign in zip(on, code, strict=True)) for code in codes]
    )
    entropies = -(q * q.log()).sum(1).mean() + 0.7 * (product * product.log()).sum()
    error = ((u - codes[((u[:, None] - codes) ** 2).sum(-1).argmin(1)]) ** 2).sum(1).mean()
    expected = 0.3 * error + 0.2 * entropies
    _, _, found = quantizer.quantize(z)
    torch.testing.assert_close(found, expected)
    (gradient,), (reference,) = torch.autograd.grad(found, z), torch.autograd.grad(expected, z)
    torch.testing.assert_close(gradient, reference, atol=1e-6, rtol=1e-4)


@cpu_only
def test_lfq_entropy_makes_no_matrix_of_all_codes():
    quantizer = build_quantizer("lfq", 2**18, 18, {})
    with torch.profiler.profile(profile_memory=True) as profile:
        quantizer.quantize(torch.randn(512, 18))
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= 4 * 2**18 * 4 < 512 * 2**18
