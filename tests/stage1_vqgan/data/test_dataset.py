"""Training images: augmentation by keys, and batches that do not depend on workers or broken images."""

import itertools
import multiprocessing

import numpy as np
import pytest
import torch
from PIL import Image

from configs import ConfigError
from stage1_vqgan import (
    AugmentationConfig,
    EncodedImage,
    ImageDataset,
    ImageKey,
    ImageSource,
    TrainingSampler,
    VQGANImageProcessor,
    keyed_loader,
)
from stage1_vqgan.data.augmentation import NUM_DRAWS, affine, augment
from stage1_vqgan.data.decoding import UndecodableImage
from stage1_vqgan.data.loading import training_loader
from stage1_vqgan.image_processing_pixels import to_pixels
from stage1_vqgan.image_processing_shapes import to_shape
from tests.slow import few


def noise_images(count=12, size=(14, 10), mode="RGB"):
    rng = np.random.default_rng(0)
    shape = (size[1], size[0]) + ((3,) if mode == "RGB" else ())
    return [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for _ in range(count)]


STRONG = AugmentationConfig(max_zoom=1.5, random_crop=True, horizontal_flip=True, rotate=20, translate=0.1, scale=0.2)


def strong(**settings):
    return ImageDataset(ImageSource(noise_images(), None, None), (8, 8), 3, STRONG, **settings)


def pixels_of(batch):
    """uint8 `(B, C, H, W)`."""
    return (127.5 * (batch.images() + 1)).round().to(torch.uint8)


def one(dataset, *key):
    """The image of one key, `(C, H, W)`."""
    (image,) = pixels_of(dataset.__getitems__([ImageKey(*key)]))
    return image


def test_augmentation_is_a_function_of_the_key():
    first, second = strong(seed=3), strong(seed=3)
    keys = [ImageKey(epoch, index, view) for epoch in (0, 1) for index in (2, 5) for view in (0, 1)]
    images = dict(zip(keys, pixels_of(first.__getitems__(keys)), strict=True))
    np.random.seed(1)
    torch.manual_seed(1)
    for key in reversed(keys):  # another order, one at a time
        assert torch.equal(one(second, *key), images[key])
    assert len({image.numpy().tobytes() for image in images.values()}) == len(keys)  # every part of the key matters
    assert not torch.equal(one(strong(seed=4), *keys[0]), images[keys[0]])


def test_without_augmentation_only_the_index_matters():
    images = noise_images()
    plain = ImageDataset(ImageSource(images, None, None), (8, 8), 3)
    for index, image in enumerate(images):
        expected = to_shape(to_pixels(image), (8, 8)).permute(2, 0, 1)
        assert torch.equal(one(plain, 0, index), expected) and torch.equal(one(plain, 3, index, 1), expected)
        first_plain = strong(first_view_plain=True)
        assert torch.equal(one(first_plain, 2, index), expected)
        assert torch.equal(one(first_plain, 2, index, 1), one(strong(), 2, index, 1))


def test_training_and_the_processor_make_the_same_pixels():
    for aspect_ratio in ("crop", "pad"):
        dataset = ImageDataset(ImageSource(noise_images(), None, None), (8, 8), 3, aspect_ratio=aspect_ratio)
        batch = dataset.__getitems__([ImageKey(0, index) for index in range(12)])
        processor = VQGANImageProcessor(8, 3, aspect_ratio)
        assert torch.equal(batch.images(), processor(noise_images())["pixel_values"])


@pytest.mark.parametrize(
    ("shape", "aspect_ratio"),
    few(
        itertools.product([(8, 12), (14, 6), (4, 24)], ["crop", "pad"]),
        ((8, 12), "pad"),
        ((14, 6), "crop"),
        ((4, 24), "pad"),
    ),
)
def test_images_that_are_no_squares(shape, aspect_ratio):
    """Training and the processor make the same pixels of images of any size, reduced by workers or on the device."""
    images = [noise_images(1, size)[0] for size in [(12, 13), (20, 30), (5, 9), (12, 8), (6, 14), (30, 5), (18, 12)]]
    keys = [ImageKey(0, index) for index in range(len(images))]
    batch = ImageDataset(ImageSource(images, None, None), shape, 3, aspect_ratio=aspect_ratio).__getitems__(keys)
    processor = VQGANImageProcessor(shape, 3, aspect_ratio)
    assert torch.equal(batch.images(), processor(images)["pixel_values"])
    augmented = ImageDataset(ImageSource(images, None, None), shape, 3, STRONG, aspect_ratio=aspect_ratio)
    assert augmented.__getitems__(keys).images().shape == (7, 3, *shape)
    flipping = AugmentationConfig(horizontal_flip=True)
    mirrored = ImageDataset(ImageSource(images, None, None), shape, 3, flipping, 1, aspect_ratio=aspect_ratio)
    for loader in (training_loader(mirrored, TrainingSampler(7, 4, 0, 4, 0), workers, False) for workers in (0, 1)):
        for other in loader:
            for image, flips, index in zip(other.images(), other.flips, other.indices, strict=True):
                plain = batch.images()[index]
                assert torch.equal(image, plain.flip(2) if flips else plain)


def test_crops_of_every_size_become_the_same_pixels():
    images = [noise_images(1, size)[0] for size in [(12, 13), (20, 30), (5, 9), (12, 12), (8, 8), (11, 10), (13, 13)]]
    keys = [ImageKey(0, index) for index in range(len(images))]
    batch = ImageDataset(ImageSource(images, None, None), (8, 8), 3).__getitems__(keys)
    assert [side for side, _ in batch.shapes] == [12, 8, 8, 12, 8, 10, 8] and not any(
        batch.flips
    )  # `images` resizes sides up to 12
    expected = VQGANImageProcessor(8, 3)(images)["pixel_values"]
    assert torch.equal(batch.images(), expected)
    flipping = AugmentationConfig(horizontal_flip=True)
    mirrored = ImageDataset(ImageSource(images, None, None), (8, 8), 3, flipping, seed=1).__getitems__(keys)
    assert mirrored.shapes == batch.shapes and 0 < sum(mirrored.flips) < len(keys)
    for image, flips, plain in zip(mirrored.images(), mirrored.flips, expected, strict=True):
        assert torch.equal(image, plain.flip(2) if flips else plain)


def test_batches_do_not_depend_on_workers():
    dataset = strong()
    batches = [list(training_loader(dataset, TrainingSampler(12, 4, 2, 9, 0), n, False)) for n in (0, 2)]
    first = batches[0][0].images()
    assert len(batches[0]) == 7 and first.dtype == torch.float32 and first.shape == (4, 3, 8, 8)
    assert first.is_contiguous(memory_format=torch.channels_last)
    for alone, others in zip(*batches, strict=True):
        assert torch.equal(alone.images(), others.images()) and torch.equal(alone.indices, others.indices)


def test_passes_that_overlap_do_not_meet_in_memory():
    """Workers reuse shared memory, but no batch is overwritten before it is used."""
    dataset, sampler = strong(), TrainingSampler(12, 4, 0, 40, 0)
    expected = [batch.images() for batch in training_loader(dataset, sampler, 0, False)]
    loader = training_loader(dataset, sampler, 2, False)
    first = iter(loader)
    kept = [next(first).images() for _ in range(9)]
    second = [batch.images() for batch in loader]  # while the workers of the first pass are ahead of it
    kept += [batch.images() for batch in first]
    for found in (kept, second):
        assert len(found) == 40 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_keyed_loader_yields_each_key_once_in_order(num_workers):
    keys = [ImageKey(0, index, view) for view in (1, 0) for index in (5, 0, 11, 7, 3)]
    batches = list(keyed_loader(strong(), keys, 4, num_workers))
    assert [len(batch.indices) for batch in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([batch.images() for batch in batches]), strong().__getitems__(keys).images())
    assert torch.cat([batch.indices for batch in batches]).tolist() == [key.image for key in keys]


def test_a_stream_brings_its_images_in_the_keys():
    images = noise_images()
    keys = [ImageKey(1, index, 0, EncodedImage("here", images[index]) if index % 2 else None) for index in range(6)]
    source = ImageSource([image if n % 2 == 0 else None for n, image in enumerate(images)], None, None)
    found = ImageDataset(source, (8, 8), 3, STRONG).__getitems__(keys)
    expected = strong().__getitems__([ImageKey(1, index) for index in range(6)])
    assert torch.equal(found.images(), expected.images()) and not found.skipped


BAD = (1, 2, 7)


def with_bad_images(**settings):
    """12 images, three of which cannot be decoded."""
    images = [b"no image" if index in BAD else image for index, image in enumerate(noise_images())]

    class Source(ImageSource):
        def encoded(self, indices):
            return [EncodedImage(f"{index}.png", self.images[index]) for index in indices]

    return ImageDataset(Source(images, None, None), (8, 8), 3, STRONG, **settings)


def test_images_that_cannot_be_used_are_left_out():
    keys = [ImageKey(0, index) for index in (3, 1, 0, 2, 5)]
    batch = with_bad_images().__getitems__(keys)
    assert batch.indices.tolist() == [3, 0, 5]
    assert torch.equal(batch.images(), strong().__getitems__([keys[0], keys[2], keys[4]]).images())
    assert [(image.image, image.name) for image in batch.skipped] == [(1, "1.png"), (2, "2.png")]
    assert all("no image format" in image.reason for image in batch.skipped)
    empty = with_bad_images().__getitems__([ImageKey(0, index) for index in BAD])
    assert empty.images().shape == (0, 3, 8, 8) and not empty.shapes
    assert empty.indices.shape == (0,) and empty.indices.dtype == torch.int64 and len(empty.skipped) == 3


def test_a_batch_keeps_its_size_with_other_views_of_its_next_images():
    dataset = with_bad_images(keep_batch_size=True)
    batch = dataset.__getitems__([ImageKey(4, index) for index in (3, 1, 2, 0, 5, 7)])
    assert batch.indices.tolist() == [3, 0, 0, 0, 5, 3]  # the last place wraps around to the first image
    views = [(3, 0), (0, 1), (0, 2), (0, 0), (5, 0), (3, 1)]
    expected = strong().__getitems__([ImageKey(4, index, view) for index, view in views])
    assert torch.equal(batch.images(), expected.images())
    assert [image.image for image in batch.skipped] == [1, 2, 7]
    with pytest.raises(UndecodableImage, match=r"none of the 3 images[\s\S]*1\.png: .*\n.*2\.png: .*\n.*7\.png: "):
        dataset.__getitems__([ImageKey(0, index) for index in BAD])


def test_bad_images_do_not_depend_on_workers():
    dataset = with_bad_images(keep_batch_size=True)
    alone, others = (list(training_loader(dataset, TrainingSampler(12, 4, 0, 6, 0), n, False)) for n in (0, 2))
    for one_batch, other in zip(alone, others, strict=True):
        assert len(one_batch.images()) == 4 and torch.equal(one_batch.images(), other.images())
        assert torch.equal(one_batch.indices, other.indices) and one_batch.skipped == other.skipped
    assert sum(len(batch.skipped) for batch in alone) == 2 * len(BAD)  # two epochs


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_channels_and_type(channels, mode):
    source = ImageSource(noise_images(2, mode=mode), None, None)
    for augmentation in (None, STRONG):
        image = one(ImageDataset(source, (7, 7), channels, augmentation), 0, 1)
        assert image.shape == (channels, 7, 7) and image.dtype == torch.uint8


def augmented(image, config, number):
    pixels, flips = augment(to_pixels(image), (8, 8), config, np.random.default_rng(number).random(NUM_DRAWS))
    return (pixels.flip(1) if flips else pixels).numpy()


def test_flip_mirrors_half_of_the_images():
    config = AugmentationConfig(horizontal_flip=True)
    (image,) = noise_images(1, (8, 8))
    plain = np.asarray(image)
    found = [augmented(image, config, n) for n in range(300)]
    flipped = [np.array_equal(other, plain[:, ::-1]) for other in found]
    assert all(flip or np.array_equal(other, plain) for flip, other in zip(flipped, found, strict=True))
    assert 110 < sum(flipped) < 190


def test_random_crop_is_a_part_of_the_image():
    (image,) = noise_images(1, (13, 8))
    plain = np.asarray(image)
    crops = [plain[:, left : left + 8] for left in range(6)]
    seen = set()
    for n in range(100):
        crop = augmented(image, AugmentationConfig(random_crop=True), n)
        seen.add(next(left for left, other in enumerate(crops) if np.array_equal(other, crop)))
    assert seen == set(range(6))


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", [8, 9])
class TestAffine:
    """Compares `affine` with slicing and `np.rot90`."""

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
        (wide,) = noise_images(1, (size + 8, size), mode)
        pixels = np.asarray(wide).astype(int)
        found = np.asarray(affine(wide, np.pi, 1.0, (0, 0))).astype(int)
        assert np.abs(found - np.rot90(pixels, 2)).max() <= 1
        found = np.asarray(affine(wide, np.pi / 2, 1.0, (0, 0))).astype(int)
        assert np.abs(found[:, 4:-4] - np.rot90(pixels[:, 4:-4], -1)).max() <= 1  # the square in the centre

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
    for sign, (width, height) in ((1, (16, 16)), (-1, (16, 16)), (1, (40, 8)), (-1, (8, 40))):
        move = sign * width * shift, height * shift
        found = affine(Image.new("L", (width, height), 200), np.radians(angle), scale, move)
        assert found.size == (width, height) and set(np.asarray(found).flatten()) == {200}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_batch_without_a_decodable_image_is_one_message(num_workers):
    loader = keyed_loader(with_bad_images(keep_batch_size=True), [ImageKey(0, index) for index in BAD], 3, num_workers)
    with pytest.raises(ConfigError, match=r"data.dataset: none of the 3 images of a batch") as caught:
        list(loader)
    assert "Traceback" not in str(caught.value)
    assert not multiprocessing.active_children()
