"""Larger images than those of the training: windows over the grid of codes."""

import numpy as np
import pytest
import torch

from pipelines.windows import corners, sample_windows
from tests.devices import DEVICE
from tests.random_pipelines import coarse_noise, random_pipeline
from tests.slow import few


@pytest.fixture(scope="module")
def pipe(random_prior):
    return random_pipeline(random_prior)


def test_windows_cover_the_grid_and_overlap_by_half():
    assert list(corners((4, 4), (4, 4))) == [(0, 0)]
    assert list(corners((4, 9), (4, 4))) == [(0, 0), (0, 2), (0, 4), (0, 5)]
    assert list(corners((7, 5), (5, 5))) == [(0, 0), (2, 0)]
    assert list(corners((2, 3), (1, 1))) == [(top, left) for top in range(2) for left in range(3)]


@pytest.mark.parametrize("depth", [(), (2,)])
def test_each_window_gets_the_codes_of_its_place(depth):
    """A window's sampler that counts codes: each new one is sampled once, and known ones stay."""
    generator = torch.Generator().manual_seed(0)
    known = torch.randint(100, (3, 7, 9, *depth), generator=generator)
    known[torch.rand(known.shape, generator=generator) < 0.7] = -1
    sampled, seen = 0, []

    def sample(seeds, window):
        nonlocal sampled
        assert window.shape == (3, 4 * 3 * (depth or (1,))[0])
        sampled += int((window < 0).sum())
        seen.append(tuple(seeds.tolist()))
        new = window.where(window >= 0, 1000)
        return new.split(2)

    seeds = torch.tensor([0, 1, 2**63 - 1])
    codes = sample_windows(sample, seeds, known, (4, 3))
    assert torch.equal(codes, known.where(known >= 0, 1000)) and sampled == int((known < 0).sum())
    assert seen[0] == tuple(seeds.tolist()) and len({seed for some in seen for seed in some}) == 3 * len(seen)
    assert all(0 <= seed < 2**63 for some in seen for seed in some)


@torch.no_grad()
def test_a_window_is_sampled_after_the_codes_that_it_shares(pipe):
    """The most likely codes, with full forwards of the prior; the second window starts two codes further right."""
    out = pipe.generate("bee", temperature=0.0, image_size=(16, 24), output_type="codes").codes[0].cpu()
    first = pipe.generate("bee", temperature=0.0, output_type="codes").codes[0].cpu()
    assert out.shape == (4, 6) and torch.equal(out[:, :4], first)
    tokens = [32 + 1]
    for place, code in enumerate(out[:, 2:].flatten().tolist()):
        if place % 4 >= 2:
            logits = pipe.prior(torch.tensor([tokens], device=DEVICE)).logits[0, -1, :32]
            assert code == int(logits.argmax())
        tokens.append(code)


def test_images_of_the_trained_size_are_those_without_windows(pipe):
    options = {"guidance_scale": 2.0, "seed": 5, "output_type": "np"}
    plain = pipe.generate(["ant", "cat"], **options)
    for size in (16, (16, 16), [16, 16]):
        out = pipe.generate(["ant", "cat"], image_size=size, **options)
        assert torch.equal(out.codes, plain.codes) and np.allclose(out.images, plain.images, atol=1e-4)


@pytest.mark.parametrize("kind", few(["one code", "residual"], "residual"))
def test_a_larger_image_depends_on_its_seed_alone(kind, random_prior):
    pipe = random_pipeline(random_prior, kind)
    options = {"image_size": (20, 36), "guidance_scale": 1.5}
    together = pipe.generate(["ant"] * 3, seed=5, batch_size=2, **options)
    alone = pipe.generate("ant", seed=7, **options)
    assert together.codes.shape == (3, 5, 9, *pipe.layout.codes_shape[2:]) and together.seeds == [5, 6, 7]
    assert torch.equal(alone.codes[0], together.codes[2]) and not torch.equal(alone.codes[0], together.codes[1])
    assert [image.size for image in together.images] == [(36, 20)] * 3
    codes = together.codes
    assert not torch.equal(codes[:, 1:, 2:6], codes[:, :4, :4])  # other random numbers


@pytest.mark.parametrize("size", [12, (16, 18), (16,), "16", (16, 20.0), True, (16, -16), None.__class__])
def test_sizes_without_a_whole_window_are_refused(pipe, size):
    with pytest.raises(ValueError, match=r"image_size: received .* at least 16 and 16, and multiples of 4"):
        pipe.generate("ant", image_size=size)


def test_sizes_beyond_the_memory_are_refused(pipe):
    with pytest.raises(ValueError, match="image_size: received 4000000000; "):
        pipe.generate("ant", image_size=4 * 10**9)


def test_several_grids_are_refused(random_prior):
    pipe = random_pipeline(random_prior, "pyramid")
    with pytest.raises(ValueError, match="image_size: this tokenizer has 2×2 and 4×4 codes"):
        pipe.generate("ant", image_size=32)


# ---------------------------------------------------------------------- outpainting


@pytest.mark.parametrize("kind", few(["one code", "residual"], "residual"))
def test_images_stay_in_the_middle_of_what_is_added(kind, random_prior):
    images = list(coarse_noise(3, 16, 16))
    pipe = random_pipeline(random_prior, kind)
    out = pipe.outpaint(images, left=8, top=4, bottom=12, class_labels="ant", seed=5)
    assert torch.equal(out.codes[:, 1:5, 2:6], pipe.encode(images)) and out.codes.shape[1:3] == (8, 6)
    for image, original in zip(out.images, images, strict=True):
        pixels = np.array(image)
        assert pixels.shape == (32, 24) and np.array_equal(pixels[4:20, 8:24], original)
    alone = pipe.outpaint(images[1], left=8, top=4, bottom=12, class_labels="ant", seed=6)
    assert torch.equal(alone.codes[0], out.codes[1]) and not torch.equal(out.codes[0, :, :2], out.codes[1, :, :2])


def test_a_seam_fades_around_the_image(pipe):
    images = list(coarse_noise(3, 16, 16))
    hard, soft = (pipe.outpaint(images, right=4, seed=5, seam=seam, output_type="np").images for seam in (0, 4))
    original = np.stack(images)[..., None] / 255
    steps = [np.abs(image[:, :, 16] - original[:, :, 15]).mean() for image in (hard, soft)]
    assert steps[1] < steps[0] / 2
