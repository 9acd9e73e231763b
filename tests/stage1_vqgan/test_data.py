"""Images for training: every source, keyed augmentation, and batches that no interruption or process count changes."""

from itertools import pairwise

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from configs import ConfigError
from stage1_vqgan import (
    AugmentationConfig,
    ImageDataset,
    ImageSource,
    TrainingSampler,
    keyed_loader,
)
from stage1_vqgan.augmentation import affine, augment
from stage1_vqgan.data import training_loader
from stage1_vqgan.image_processing_vqgan import resize_and_crop


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def noise_images(count=12, size=(14, 10), mode="RGB"):
    rng = np.random.default_rng(0)
    shape = (size[1], size[0]) + ((3,) if mode == "RGB" else ())
    return [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for _ in range(count)]


STRONG = AugmentationConfig(max_zoom=1.5, random_crop=True, horizontal_flip=True, rotate=20, translate=0.1, scale=0.2)


def strong(**settings):
    return ImageDataset(ImageSource(noise_images(), None, None), 8, 3, STRONG, **settings)


def test_augmentation_is_a_function_of_the_key():
    first, second = strong(seed=3), strong(seed=3)
    keys = [(epoch, index, view) for epoch in (0, 1) for index in (2, 5) for view in (0, 1)]
    images = dict(zip(keys, first.__getitems__(keys), strict=True))
    np.random.seed(1)
    torch.manual_seed(1)
    for key in reversed(keys):  # another order, one at a time
        assert torch.equal(second[key], images[key])
    assert len({image.numpy().tobytes() for image in images.values()}) == len(keys)  # every part of the key counts
    assert not torch.equal(strong(seed=4)[keys[0]], images[keys[0]])


def test_without_augmentation_only_the_index_matters():
    images = noise_images()
    plain = ImageDataset(ImageSource(images, None, None), 8, 3)
    for index, image in enumerate(images):
        expected = torch.from_numpy(np.array(resize_and_crop(image, 8))).permute(2, 0, 1)
        assert torch.equal(plain[0, index, 0], expected) and torch.equal(plain[3, index, 1], expected)
        first_plain = strong(first_view_plain=True)
        assert torch.equal(first_plain[2, index, 0], expected)
        assert torch.equal(first_plain[2, index, 1], strong()[2, index, 1])


def test_batches_do_not_depend_on_workers():
    dataset = strong()
    batches = [list(training_loader(dataset, TrainingSampler(12, 4, 2, 9, 0), n, False)) for n in (0, 2)]
    assert len(batches[0]) == 7 and batches[0][0].dtype == torch.uint8 and batches[0][0].shape == (4, 3, 8, 8)
    assert torch.equal(torch.stack(batches[0]), torch.stack(batches[1]))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_keyed_loader_yields_each_key_once_in_order(num_workers):
    keys = [(0, index, view) for view in (1, 0) for index in (5, 0, 11, 7, 3)]
    batches = list(keyed_loader(strong(), keys, 4, num_workers))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert torch.equal(torch.cat(batches), torch.stack([strong()[key] for key in keys]))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_channels_and_type(channels, mode):
    source = ImageSource(noise_images(2, mode=mode), None, None)
    for augmentation in (None, STRONG):
        image = ImageDataset(source, 7, channels, augmentation)[0, 1, 0]
        assert image.shape == (channels, 7, 7) and image.dtype == torch.uint8


def test_flip_mirrors_half_of_the_images():
    config = AugmentationConfig(horizontal_flip=True)
    (image,) = noise_images(1, (8, 8))
    plain = np.asarray(image)
    found = [np.asarray(augment(image, 8, config, np.random.default_rng(n))) for n in range(300)]
    flipped = [np.array_equal(other, plain[:, ::-1]) for other in found]
    assert all(flip or np.array_equal(other, plain) for flip, other in zip(flipped, found, strict=True))
    assert 110 < sum(flipped) < 190


def test_random_crop_is_a_window_of_the_image():
    (image,) = noise_images(1, (13, 8))
    plain = np.asarray(image)
    windows = [plain[:, left : left + 8] for left in range(6)]
    seen = set()
    for n in range(100):
        crop = np.asarray(augment(image, 8, AugmentationConfig(random_crop=True), np.random.default_rng(n)))
        seen.add(next(left for left, window in enumerate(windows) if np.array_equal(window, crop)))
    assert seen == set(range(6))


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", [8, 9])
class TestAffine:
    """`affine` against slicing and `np.rot90`."""

    def test_nothing_to_do(self, mode, size):
        (image,) = noise_images(1, (size, size), mode)
        assert np.array_equal(affine(image, 0.0, 1.0, (0, 0)), image)

    def test_shift_goes_right_and_down_and_repeats_the_border(self, mode, size):
        (image,) = noise_images(1, (size, size), mode)
        pixels = np.asarray(image)
        for x, y in [(2, 0), (0, 3), (-1, 2), (1, -3)]:
            padded = np.pad(pixels, [(4, 4)] * 2 + [(0, 0)] * (pixels.ndim - 2), mode="edge")
            expected = padded[4 - y : 4 - y + size, 4 - x : 4 - x + size]
            assert np.array_equal(affine(image, 0.0, 1.0, (x, y)), expected)

    def test_rotation_is_about_the_centre(self, mode, size):
        (image,) = noise_images(1, (size, size), mode)
        pixels = np.asarray(image).astype(int)
        for turns in (1, 2, 3):
            found = np.asarray(affine(image, turns * np.pi / 2, 1.0, (0, 0))).astype(int)
            assert np.abs(found - np.rot90(pixels, -turns)).max() <= 1

    def test_scale_above_one_enlarges(self, mode, size):
        image = Image.new(mode, (size, size), "black")
        image.paste("white", (3, 3, size - 3, size - 3))
        areas = [float(np.asarray(affine(image, 0.0, scale, (0, 0))).mean()) for scale in (0.8, 1.0, 1.4)]
        assert areas[0] < areas[1] < areas[2]
        assert areas[2] / areas[1] == pytest.approx(1.4**2, rel=0.25)


@pytest.mark.parametrize(
    "angle, scale, shift", [(0.0, 1.0, 1.0), (180.0, 0.05, 0.0), (45.0, 0.6, 0.3), (30.0, 0.9, 0.1)]
)
def test_any_allowed_change_repeats_the_border(angle, scale, shift):
    AugmentationConfig(rotate=angle, translate=shift, scale=1 - scale)
    for sign in (1, -1):
        found = affine(Image.new("L", (16, 16), 200), np.radians(angle), scale, (sign * 16 * shift, 16 * shift))
        assert set(np.asarray(found).flatten()) == {200}


def batches(num_images=23, batch_size=4, start=0, stop=17, seed=5, **where):
    return list(TrainingSampler(num_images, batch_size, start, stop, seed, **where))


def test_an_epoch_has_no_image_twice_and_drops_less_than_a_batch():
    by_epoch = {}
    for batch in batches():
        assert len(batch) == 4 and all(view == 0 for _, _, view in batch)
        for epoch, index, _ in batch:
            by_epoch.setdefault(epoch, []).append(index)
    assert list(by_epoch) == [0, 1, 2, 3]
    for indices in list(by_epoch.values())[:3]:
        assert len(indices) == 20 and len(set(indices)) == 20 and set(indices) <= set(range(23))
    assert all(a != b for a, b in pairwise(by_epoch.values()))  # each epoch has its own order
    left_out = [set(range(23)) - set(indices) for indices in list(by_epoch.values())[:3]]
    assert len(set.union(*left_out)) > 3  # and drops other images


def test_ranks_together_are_one_process_with_a_larger_batch():
    whole = batches(batch_size=6)
    ranks = [batches(batch_size=2, rank=rank, world_size=3) for rank in range(3)]
    assert [a + b + c for a, b, c in zip(*ranks, strict=True)] == whole


@pytest.mark.parametrize("start", [0, 1, 5, 12, 17])
def test_a_later_start_is_the_tail_of_the_whole_run(start):
    assert batches(start=start) == batches()[start:]
    assert len(TrainingSampler(23, 4, start, 17, 5)) == 17 - start


def test_the_seed_decides_the_order():
    assert batches(seed=5) == batches(seed=5) != batches(seed=6)


def test_too_few_images_for_a_batch():
    assert len(batches(num_images=8, batch_size=4, world_size=2, stop=3)) == 3
    with pytest.raises(ConfigError, match=r"per_device_train_batch_size.* 7 training images"):
        batches(num_images=7, batch_size=4, world_size=2)
