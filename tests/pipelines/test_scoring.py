"""Scores, class posteriors and heat maps, compared with loops over images, codes and classes."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from pipelines import VQGANPipeline
from pipelines.heat_maps import overlays, surprise_maps
from stage1_vqgan import VQGANConfig, VQGANImageProcessor, VQGANModel
from stage2_prior import CodeStore, TokenLayout, code_nats
from stage2_prior.data import CodeDataset
from stage2_prior.prior import build_prior
from tests import tiny
from tests.devices import DEVICE

GRIDS = {
    "residual": ({"depth": 2}, ((4, 4, 2),)),
    "pyramid": ({"hidden_channels": 8, "num_res_blocks": 1}, ((2, 2, 1), (4, 4, 1))),
}


@pytest.fixture(scope="module")
def digits():
    return [Image.fromarray(np.round(digit * (255 / 16)).astype(np.uint8)) for digit in load_digits().images[:6]]


def with_layout(pipeline, **changes):
    """The same models, with another layout."""
    other = copy.copy(pipeline)
    other.layout = dataclasses.replace(pipeline.layout, **changes)
    return other


@torch.no_grad()
def naive_nats(pipeline, condition, codes):
    """-ln p of each code of one image, by a forward for each."""
    tokens, nats = [condition], []
    for code in codes.flatten().tolist():
        logits = pipeline.prior(torch.tensor([tokens], device=DEVICE)).logits[0, -1].double()
        nats.append(-logits.log_softmax(-1)[code].item())
        tokens.append(code)
    return nats


@pytest.mark.parametrize("model_type", sorted(tiny.RANDOM_PRIORS))
def test_nats_do_not_depend_on_the_batch(random_prior, layout, model_type):
    prior = random_prior(model_type, layout)
    codes = torch.randint(layout.num_codes, (5, layout.length), generator=torch.Generator().manual_seed(0))
    prompts = layout.class_tokens(torch.arange(5))[:, None]
    together, sizes = code_nats(prior, prompts, codes), []
    by_two = code_nats(prior, prompts, codes, 2, sizes.append)
    assert sizes == [2, 2, 1] and torch.allclose(by_two, together, atol=1e-5)
    with torch.no_grad():
        logits = prior(torch.cat([prompts, codes], 1)[:, :-1].to(DEVICE)).logits.double().log_softmax(-1).cpu()
    assert torch.allclose(together.double(), -logits.gather(-1, codes[..., None])[..., 0], atol=1e-5)


def test_a_score_is_the_sum_of_a_loop(tiny_pipeline, digits):
    labels = [0, "1", 2, 3, 4, 5]
    out = tiny_pipeline.score(digits, labels)
    codes, layout = tiny_pipeline.encode(digits).cpu(), tiny_pipeline.layout
    expected = torch.tensor([naive_nats(tiny_pipeline, layout.num_codes + n, codes[n]) for n in range(6)])
    assert torch.allclose(out.code_nats.flatten(1), expected.double(), atol=1e-5) and len(out) == 6
    assert torch.allclose(out.nats, expected.sum(1).double(), atol=1e-4) and out.likelihood == "class"
    assert torch.allclose(out.bits_per_pixel, out.nats / np.log(2) / 256) and torch.equal(out.codes, codes)
    one = tiny_pipeline.score(digits[2], 2)
    assert torch.allclose(one.nats, out.nats[2:3], atol=1e-4)

    free = tiny_pipeline.score(codes=codes[:1])
    assert free.likelihood == "unconditional"
    assert free.nats.item() == pytest.approx(sum(naive_nats(tiny_pipeline, layout.null_token, codes[0])), abs=1e-4)


def test_the_mean_score_is_the_loss_of_training(tiny_runs, tiny_pipeline):
    store = CodeStore(tiny_runs.codes)
    split = store.split("validation")
    batch = CodeDataset(split, store.layout).__getitems__(range(len(split)))
    with torch.no_grad():
        loss = tiny_pipeline.prior(**{name: value.to(DEVICE) for name, value in batch.items()}).loss
    rows = split.read(np.arange(len(split)))
    codes = torch.from_numpy(rows.codes.astype(np.int64)).view(-1, *store.layout.codes_shape)
    out = tiny_pipeline.score(codes=codes, class_labels=rows.labels)
    assert out.nats.mean().item() == pytest.approx(loss.item() * store.layout.length, rel=1e-5)


def test_without_the_null_token_the_score_is_the_marginal(tiny_pipeline, digits):
    pipeline = with_layout(tiny_pipeline, has_null=False)
    out = pipeline.score(digits[:2])
    by_class = torch.stack([tiny_pipeline.score(digits[:2], number).code_nats.flatten(1) for number in range(10)])
    for image in range(2):
        for length in (1, 7, 16):  # p(the first codes) is the mean over the classes
            expected = -by_class[:, image, :length].sum(1).neg().exp().mean().log()
            assert out.code_nats.flatten(1)[image, :length].sum().item() == pytest.approx(expected.item(), abs=1e-5)
    assert out.likelihood == "marginal" and torch.allclose(out.nats, out.code_nats.sum((1, 2)))


def test_the_posterior_is_that_of_bayes(tiny_pipeline, digits):
    nats = torch.stack([tiny_pipeline.score(digits, number).nats for number in range(10)], 1)
    weights = torch.arange(10)
    found = tiny_pipeline.class_posterior(digits, class_prior=weights, batch_size=4)
    joint = weights / 45 * (-nats + nats.min()).exp()
    assert torch.allclose(found, joint / joint.sum(1, keepdim=True), atol=1e-5) and not found[:, 0].any()
    counted = with_layout(tiny_pipeline, class_counts=tuple(range(10)))
    assert torch.allclose(counted.class_posterior(digits, class_prior="counts"), found, atol=1e-5)
    assert torch.allclose(tiny_pipeline.class_posterior(digits), (-nats).softmax(1), atol=1e-5)


@pytest.fixture(scope="module", params=GRIDS)
def several(request):
    """A random pipeline with several codes at each position, or with two grids."""
    options, grids = GRIDS[request.param]
    torch.manual_seed(0)
    vqgan = VQGANModel(VQGANConfig(**tiny.VQGAN, quantizer=request.param, quantizer_options=options))
    layout = TokenLayout(32, ("a", "b"), (4, 4), 4, vqgan.compute_fingerprint(), grids=grids)
    pipeline = VQGANPipeline(
        vqgan, build_prior(tiny.RANDOM_PRIORS["llama"], layout), VQGANImageProcessor(16, 1), layout
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(DEVICE)


def test_several_codes_are_one_sequence(several, digits):
    codes = several.encode(digits[:2]).cpu()
    out = several.score(digits[:2], ["a", "b"])
    expected = torch.tensor([naive_nats(several, 32 + n, codes[n]) for n in range(2)])
    assert out.code_nats.shape == codes.shape and torch.allclose(out.nats, expected.sum(1).double(), atol=1e-4)
    maps = surprise_maps(torch.ones_like(out.code_nats), several.layout)
    assert torch.allclose(maps.sum((1, 2)), torch.tensor(several.layout.length / np.log(2)).float())
    assert [image.size for image in several.heat_maps(digits[:2], out.code_nats)] == [(16, 16)] * 2


def test_a_heat_map_shows_where_the_nats_are(layout):
    nats = torch.zeros(1, 4, 4)
    nats[0, 1, 2] = 3.0
    (values,) = surprise_maps(nats, layout)
    assert divmod(int(values.argmax()), 16) in {(row, column) for row in range(4, 8) for column in range(8, 12)}
    assert not values[12:].any() and not values[:, :4].any()
    gray = Image.fromarray(np.full((16, 16), 100, np.uint8))
    (picture,) = overlays([gray], values[None], (0.0, 0.2))
    pixels = np.asarray(picture).astype(int)
    assert (pixels[12:] == 100).all() and pixels[5, 9].tolist() != [100, 100, 100]  # nothing covers what is expected
    (clear,) = overlays([Image.new("LA", (16, 16), (0, 0))], torch.zeros(1, 16, 16), (0.0, 1.0))
    assert np.asarray(clear).min() == 255  # transparent images lie on white


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "images: received None; give either images or codes"),
        ({"images": 3, "codes": 4}, "images: received 3; give either"),
        (
            {"codes": torch.zeros(1, 4, 8, dtype=torch.int64)},
            r"codes: received shape \(1, 4, 8\); the prior has learnt",
        ),
        ({"codes": torch.full((1, 4, 4), 32)}, "codes: received values from 32 to 32"),
        (
            {"codes": torch.zeros(3, 4, 4, dtype=torch.int64), "class_labels": [1, 2]},
            "class_labels: received 2 values for 3 images",
        ),
        ({"codes": torch.zeros(1, 4, 4, dtype=torch.int64), "class_labels": "x"}, "class_labels: received 'x'"),
        ({"codes": torch.zeros(1, 4, 4, dtype=torch.int64), "batch_size": 0}, "batch_size: received 0"),
    ],
    ids=str,
)
def test_wrong_arguments_of_score_are_refused(tiny_pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline.score(**arguments)


@pytest.mark.parametrize(
    "prior", ["count", "counts", [1] * 9, [0] * 10, [-1] + [1] * 9, [np.nan] * 10, [1j] * 10, None]
)
def test_wrong_priors_over_classes_are_refused(tiny_pipeline, digits, prior):
    pipeline = with_layout(tiny_pipeline, class_counts=())
    with pytest.raises(ValueError, match="class_prior: received"):
        pipeline.class_posterior(digits[:1], class_prior=prior)


def test_what_has_no_likelihood_is_refused(tiny_pipeline, digits):
    unconditional = with_layout(tiny_pipeline, class_names=(), class_counts=())
    with pytest.raises(ValueError, match="this prior has no classes"):
        unconditional.class_posterior(digits)
    masked = with_layout(tiny_pipeline, family="masked")
    for call in (masked.score, masked.class_posterior, masked.compress):
        with pytest.raises(
            ValueError, match=r"this pipeline has a masked prior: .* no likelihood; use a pipeline with"
        ):
            call(digits)
    with pytest.raises(ValueError, match=r"code_nats: received Tensor torch.float32 \(1, 4, 4\); must have shape"):
        tiny_pipeline.heat_maps(digits, torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="span: received"):
        tiny_pipeline.heat_maps(digits[0], torch.zeros(1, 4, 4), (1.0, 0.0))


def test_infinite_logits_are_an_error(tiny_pipeline, digits):
    broken = copy.copy(tiny_pipeline)
    broken.prior = copy.deepcopy(tiny_pipeline.prior)
    with torch.no_grad():
        broken.prior.lm_head.weight[3] = torch.inf
    with pytest.raises(FloatingPointError, match="the logits of 1 of 1 images were NaN or infinite"):
        broken.score(digits[0])
