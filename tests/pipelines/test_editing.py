"""Edits of images: hidden pixels have no influence, visible ones stay, the prior samples the rest."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.chunks import encode_in_chunks
from pipelines.masks import MaskedImages, joined, known_codes, masked_images
from tests.devices import DEVICE
from tests.random_pipelines import PRIORS, QUANTIZERS, coarse_noise, random_pipeline
from tests.slow import few


@pytest.fixture(scope="module", params=PRIORS)
def pipe(request, random_prior):
    return random_pipeline(random_prior, family=request.param)


@pytest.fixture(scope="module")
def images():
    return list(coarse_noise(3, 16, 16))


@pytest.fixture(scope="module")
def mask():
    """Cuts through codes: of the 4×4 codes, 2×3 are not wholly visible."""
    mask = np.zeros((16, 16), bool)
    mask[5:11, 6:14] = True
    return mask


LABELS = ["cat", "ant", "cat"]


# ---------------------------------------------------------------------- what is hidden, and what stays


def test_hidden_pixels_have_no_influence(pipe, images, mask):
    others = [np.where(mask, 255 - image, image) for image in images]
    assert not np.array_equal(pipe.encode(images).cpu(), pipe.encode(others).cpu())
    first, second = (pipe.inpaint(some, mask, LABELS, seed=5, output_type="np") for some in (images, others))
    assert torch.equal(first.codes, second.codes) and np.array_equal(first.images, second.images)


def test_hidden_pixels_of_images_of_another_size_have_no_influence(pipe):
    pictures, mask = coarse_noise(2, 50, 37), np.zeros((50, 37), bool)
    mask[20:31, 11:25] = True
    others = np.where(mask, 255 - pictures, pictures)
    first, second = (pipe.inpaint(list(some), mask, seed=5, output_type="np") for some in (pictures, others))
    assert torch.equal(first.codes, second.codes) and np.array_equal(first.images, second.images)
    given = masked_images(pipe.image_processor, list(pictures), mask)
    visible = ~given.hidden
    expected = pipe.image_processor(list(pictures))["pixel_values"]
    assert torch.equal(given.pixel_values[visible], expected[visible]) and 0.2 < visible.float().mean() < 0.9


def test_single_hidden_pixels_of_a_large_image_have_no_influence(pipe):
    """Each is less than a level of a pixel of the reduced image, so no pixel of it counts as hidden."""
    pictures, mask = coarse_noise(1, 640, 640), np.zeros((640, 640), bool)
    mask[20::40, 20::40] = True
    given, other = (
        masked_images(pipe.image_processor, list(some), mask) for some in (pictures, np.where(mask, 255, pictures))
    )
    assert torch.equal(given.pixel_values, other.pixel_values) and not given.hidden.any()


@pytest.mark.parametrize("kept", [{"rows": 7}, {"box": (3, 2, 12, 9)}])
def test_what_is_not_kept_has_no_influence(pipe, images, kept):
    left, top, right, bottom = kept.get("box", (0, 0, 16, 7))
    others = [255 - image for image in images]
    for image, other in zip(images, others, strict=True):
        other[top:bottom, left:right] = image[top:bottom, left:right]
    first, second = (pipe.complete(some, class_labels="bee", seed=5, **kept) for some in (images, others))
    assert torch.equal(first.codes, second.codes)
    for one, other, image in zip(first.images, second.images, images, strict=True):
        assert one.tobytes() == other.tobytes() and one.tobytes() != image.tobytes()
        assert np.array_equal(np.array(one)[top:bottom, left:right], image[top:bottom, left:right])


@pytest.mark.parametrize("seam", [None, 0, 20])
def test_visible_pixels_are_those_of_the_original(pipe, images, mask, seam):
    out = pipe.inpaint(images, mask, LABELS, seed=5, seam=seam)
    tensors = pipe.inpaint(images, mask, LABELS, seed=5, seam=seam, output_type="pt").images
    assert out.labels == LABELS and out.seeds == [5, 6, 7] and len(out) == 3
    for image, original, tensor in zip(out.images, images, tensors.cpu(), strict=True):
        assert np.array_equal(np.array(image)[~mask], original[~mask])
        assert not np.array_equal(np.array(image)[mask], original[mask])
        assert np.array_equal(np.round(tensor[0].numpy() * 255).astype(np.uint8), np.array(image))


def test_codes_with_a_hidden_pixel_are_not_known():
    hidden = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    hidden[..., 7, 4:9] = True
    expected = torch.arange(16).view(1, 4, 4)
    known = known_codes(expected, hidden)
    assert (known < 0).nonzero()[:, 1:].tolist() == [[1, 1], [1, 2]]
    assert torch.equal(known[known >= 0], expected[known >= 0])


def test_the_seam_fades_on_the_hidden_side():
    hidden = torch.zeros(1, 1, 1, 8, dtype=torch.bool)
    hidden[..., 3:] = True
    originals = MaskedImages.of(torch.tensor([0.0, 0.2, 0.4, 9, 9, 9, 9, 9]).view(1, 1, 1, 8), hidden)
    assert originals.pixel_values.flatten().tolist() == pytest.approx([0.0, 0.2, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4])
    out = joined(torch.zeros(1, 1, 1, 8), originals, seam=3).flatten().tolist()
    assert out == pytest.approx([0.0, 0.2, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0])
    assert joined(torch.zeros(1, 1, 1, 8), originals, seam=0).flatten().tolist()[3:] == [0.0] * 5


# ---------------------------------------------------------------------- what is sampled


@torch.no_grad()
def greedy(pipe, prompt, known):
    """The most likely codes after a prompt, where `known` `(L,)` has -1: a full forward for each code."""
    tokens = [prompt]
    for code in known.flatten().tolist():
        if code < 0:
            logits = pipe.prior(torch.tensor([tokens], device=DEVICE)).logits[0, -1, : pipe.layout.num_codes]
            code = int(logits.argmax())
        tokens.append(code)
    return torch.tensor(tokens[1:])


@pytest.mark.parametrize("kind", ["one code", "residual"])
def test_new_codes_are_the_most_likely_after_the_known_ones(kind, random_prior, images, mask):
    pipe = random_pipeline(random_prior, kind)
    out = pipe.inpaint(images, mask, "bee", temperature=0.0, output_type="codes")
    given = masked_images(pipe.image_processor, images, mask)
    known = known_codes(encode_in_chunks(pipe.vqgan, given.pixel_values).cpu(), given.hidden)
    assert out.images is None and out.codes.shape == (3, *pipe.layout.codes_shape)
    assert (known < 0).float().mean() == 6 / 16
    for codes, some in zip(out.codes.cpu(), known, strict=True):
        assert torch.equal(codes.flatten(), greedy(pipe, 32 + 1, some))


def test_an_image_without_visible_pixels_is_a_generated_one(pipe, images):
    options = {"guidance_scale": 2.0, "top_k": 20, "seed": 5, "output_type": "np"}
    out = pipe.inpaint(images, np.ones((16, 16), bool), LABELS, **options)
    generated = pipe.generate(LABELS, **options)
    assert torch.equal(out.codes, generated.codes) and out.seeds == generated.seeds
    np.testing.assert_allclose(out.images, generated.images, atol=1e-4)
    assert torch.equal(pipe.vary(images, 1.0, LABELS, **options).codes, generated.codes)


def test_an_image_without_hidden_pixels_stays(pipe, images):
    out = pipe.inpaint(images, np.zeros((16, 16), bool), seed=5)
    assert torch.equal(out.codes, pipe.encode(images)) and out.labels is None
    assert all(np.array_equal(np.array(image), original) for image, original in zip(out.images, images, strict=True))


def test_an_image_does_not_depend_on_the_others(pipe, images, mask):
    masks = [mask, mask.T, ~mask]
    options = {"guidance_scale": 2.0, "output_type": "np"}
    together = pipe.inpaint(images, masks, LABELS, seed=5, batch_size=2, **options)
    for number in range(3):
        alone = pipe.inpaint(images[number], masks[number], LABELS[number], seed=5 + number, **options)
        assert torch.equal(alone.codes[0], together.codes[number])
        np.testing.assert_allclose(alone.images[0], together.images[number], atol=1e-4)


@pytest.mark.parametrize("kind", few(QUANTIZERS, "one code", "pyramid"))
def test_variants_keep_the_first_codes(kind, random_prior, images):
    pipe = random_pipeline(random_prior, kind)
    length, codes = pipe.layout.length, pipe.encode(images).flatten(1)
    out = pipe.vary(images, 0.3, LABELS, seed=5, output_type="pt")
    kept = length - round(0.3 * length)
    new = out.codes.flatten(1)
    assert torch.equal(new[:, :kept], codes[:, :kept])
    assert (new[:, kept:] != codes[:, kept:]).float().mean() > 0.5
    assert out.images.shape == (3, 1, 16, 16) and out.codes.shape == (3, *pipe.layout.codes_shape)
    assert (pipe.vary(images, 1e-9, "ant").codes.flatten(1) == codes).sum(1).min() >= length - 1


def test_variants_by_a_masked_prior_keep_codes_at_random(random_prior):
    seeds = torch.arange(200)
    pipe = random_pipeline(random_prior)
    assert pipe._changed(seeds, 5).sum(1).tolist() == [5] * 200
    pipe.layout = replace(pipe.layout, family="masked")
    changed = pipe._changed(seeds, 5)
    assert changed.sum(1).tolist() == [5] * 200 and torch.equal(changed[:7], pipe._changed(seeds[:7], 5))
    shares = changed.float().mean(0)
    assert shares.min() > 0.15 and shares.max() < 0.5  # 5 of 16: 0.31


# ---------------------------------------------------------------------- arguments


def test_masks_of_all_types_are_read_alike(pipe, images, mask):
    picture = Image.fromarray(np.where(mask, 200, 100).astype(np.uint8))
    expected = pipe.inpaint(images, mask, seed=5, output_type="codes").codes
    for masks in (
        picture,
        torch.from_numpy(mask),
        [mask] * 3,
        np.stack([mask] * 3),
        picture.convert("RGB"),
        [picture] * 3,
    ):
        assert torch.equal(pipe.inpaint(images, masks, seed=5, output_type="codes").codes, expected)


BLACK = np.zeros((16, 16), bool)
# method and arguments, words of the message
REFUSED = {
    "masks of other numbers": ("inpaint", {"masks": [BLACK] * 2}, "masks: received a list of 2 for 3 images"),
    "a stack of other masks": ("inpaint", {"masks": np.stack([BLACK] * 2)}, "masks: received ndarray bool (2, 16, 16)"),
    "a mask of another size": (
        "inpaint",
        {"masks": BLACK[:8]},
        "masks: received 8 × 16 pixels (height × width) for images[0], which has 16 × 16; needs a mask of the same",
    ),
    "a mask of numbers": ("inpaint", {"masks": BLACK * 1.0}, "masks: received ndarray float64 (16, 16); needs a PIL"),
    "a mask with channels": ("inpaint", {"masks": [BLACK[None]] * 3}, "masks[0]: received ndarray bool (1, 16, 16)"),
    "a transparent mask": ("inpaint", {"masks": Image.new("RGBA", (16, 16))}, "masks: received a picture with transp"),
    "a mask of numbers without a range": (
        "inpaint",
        {"masks": Image.new("F", (16, 16))},
        "masks: received float32 from",
    ),
    "no mask": ("inpaint", {"masks": None}, "masks: received None for 3 images; needs one mask for each, or one"),
    "labels of other numbers": ("inpaint", {"masks": BLACK, "class_labels": [1, 2]}, "class_labels: received 2 values"),
    "unknown label": ("inpaint", {"masks": BLACK, "class_labels": "dog"}, "class_labels: received 'dog'"),
    "guidance of nothing": ("inpaint", {"masks": BLACK, "guidance_scale": 2.0}, "guidance needs class_labels"),
    "a seam of text": ("inpaint", {"masks": BLACK, "seam": "2"}, "seam: received '2'; must be a whole number"),
    "seeds of other numbers": ("inpaint", {"masks": BLACK, "seed": [1]}, "seed: received a list of 1 for 3 images"),
    "output type": ("inpaint", {"masks": BLACK, "output_type": "png"}, "output_type: received 'png'; allowed are"),
    "nothing kept": ("complete", {}, "rows: received neither rows nor box; give one of them"),
    "two things kept": (
        "complete",
        {"rows": 2, "box": (0, 0, 4, 4)},
        "rows: received rows, and a box; give one of them",
    ),
    "all rows": ("complete", {"rows": 16}, "rows: received 16; must be a whole number from 1 to 15"),
    "a box of three": ("complete", {"box": (0, 0, 4)}, "box: received (0, 0, 4); needs left, top, right, bottom"),
    "a box upside down": ("complete", {"box": (0, 5, 4, 4)}, "box: received (0, 5, 4, 4); needs left < right <= 16"),
    "a box outside": ("complete", {"box": (0, 0, 17, 4)}, "box: received (0, 0, 17, 4); needs left < right <= 16"),
    "no variation": ("vary", {"strength": 0}, "strength: received 0; allowed is a number above 0, up to 1"),
    "too much variation": ("vary", {"strength": 1.5}, "strength: received 1.5; allowed is a number above 0, up to 1"),
    "no side": ("outpaint", {}, "left: received 0, as for all sides; give the pixels to add"),
    "half a code": ("outpaint", {"left": 6}, "left: received 6; must be a multiple of 4, the pixels of a code"),
    "a negative side": ("outpaint", {"top": -4}, "top: received -4; must be a whole number from 0 to"),
    "too many pixels": ("outpaint", {"top": 4 * 10**9}, "top: received 4000000000; must be a whole number from 0 to"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_arguments_are_refused(case, pipe, images):
    method, arguments, message = REFUSED[case]
    with pytest.raises(ValueError) as refusal:
        getattr(pipe, method)(images, **arguments)
    assert message in str(refusal.value)


def test_unknown_arguments_are_refused(pipe, images):
    with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
        pipe.complete(images, rows=4, temprature=1.0)


@pytest.mark.parametrize("name", ["num_images", "num_images_per_label", "image_size", "best_of", "best_by"])
def test_arguments_of_generate_without_a_meaning_for_edits_are_refused(pipe, images, name):
    with pytest.raises(ValueError, match=f"{name}: received 2; an edit makes one image of each image; leave it out"):
        pipe.vary(images, **{name: 2})


def test_codes_of_several_grids_belong_to_no_part_of_an_image(random_prior, images):
    pipe = random_pipeline(random_prior, "pyramid")
    for edit in (
        lambda: pipe.inpaint(images, BLACK),
        lambda: pipe.complete(images, rows=8),
        lambda: pipe.outpaint(images, left=4),
    ):
        with pytest.raises(ValueError, match="images: this tokenizer has 2×2 and 4×4 codes, and"):
            edit()
