"""The benchmark of the copying check: the changes of known copies, and both tables of a tiny pipeline."""

import json

import pytest
import torch
from PIL import Image

from benchmarks import copying
from benchmarks.copying import BRIGHTER, NOISE, augmented, changed, main
from stage1_vqgan import AugmentationConfig
from tests import image_sets, tiny


@pytest.fixture
def images():
    return image_sets.random_images(12, size=16)


def test_copies_are_changed_as_their_names_say(images):
    kinds = changed(images, AugmentationConfig())
    assert all(kind.shape == images.shape and kind.abs().max() <= 1 for kind in kinds.values())
    unchanged, brighter, noisy, shifted, square, half = kinds.values()
    others = images.roll(6, 0)
    assert torch.equal(unchanged, images)
    assert torch.equal(shifted[..., 1:], images[..., :-1]) and torch.equal(shifted[..., 0], images[..., 0])
    assert torch.equal(half[:, :, :8], others[:, :, :8]) and torch.equal(half[:, :, 8:], images[:, :, 8:])
    inside = images.abs() < 1 - 2 * BRIGHTER
    torch.testing.assert_close((brighter - images)[inside], torch.full((int(inside.sum()),), 2 * BRIGHTER))
    assert (noisy - images)[inside].std().item() == pytest.approx(2 * NOISE, rel=0.1)
    assert torch.equal(square[..., 6:10, 6:10], others[..., 6:10, 6:10])
    assert (square != images).any(1).sum() <= 12 * 16 and torch.equal(square[..., :6, :], images[..., :6, :])


def test_views_are_those_of_the_augmentation(images):
    name = "augmented as in the training of the prior"
    assert name not in changed(images, AugmentationConfig())
    mirrored = changed(images, AugmentationConfig(horizontal_flip=True))[name]
    flips = [torch.allclose(one, other.flip(2), atol=1e-6) for one, other in zip(mirrored, images, strict=True)]
    same = [torch.allclose(one, other, atol=1e-6) for one, other in zip(mirrored, images, strict=True)]
    assert 0 < sum(flips) < 12 and sum(flips) + sum(same) == 12
    assert not torch.equal(augmented(images, AugmentationConfig(rotate=10)), images)


@pytest.mark.slow
def test_a_prior_that_copies_is_exposed(tiny_runs, tmp_path, datasets_cache, capsys):
    """Tiny priors that repeat 20 images or their views, and the prior of a tiny pipeline; copies of known images."""
    sizes = [f"model.{name}={value}" for name, value in tiny.LLAMA.items()]
    stage2 = [*sizes, "learning_rate=1e-2", "num_sample_images=0", "per_device_train_batch_size=20", "num_views=2"]
    inputs = [f"pipeline={tiny_runs.pipeline}", f"code_store={tiny_runs.codes}"]
    evaluation = [*inputs, "samples_per_class=8", "max_real_images=150", "guidance_scale=1"]
    command = ["digits", "--images=20", "--steps=100", "--view_steps=300", "--copies=40", f"--output_dir={tmp_path}"]
    main([*command, "--stage2", *stage2, "--evaluate", *evaluation])
    found = json.loads((tmp_path / "copying.json").read_text())
    exposed, _, _, of_views, *usual = found["priors"]
    counts = [(row["train"], row["views"]) for row in found["priors"]]
    assert counts == [(20, 1), (150, 1), (20, 1), (20, 2), (20, 1), (150, 1), (150, 2)] and exposed["generated"] == 80
    shares = [float(row["suspected copies"].split()[0]) for row in (exposed, of_views, *usual)]
    assert min(shares[:2]) > 0.6 and max(shares[2:]) < 0.2, shares
    rows = {row["change"]: row for row in found["known copies"]}
    columns = ("pixels", "pixels, through the tokenizer")
    assert [rows["unchanged"][column] for column in columns] == [1, 1]
    assert max(rows["no copies: validation images"][column] for column in columns) < 0.2
    assert rows["as the tokenizer gives it back"]["pixels"] < 0.9
    assert Image.open(tmp_path / "copies.png").width > copying.COLUMNS * 48
    assert "noise of 5% of the range" in capsys.readouterr().out
