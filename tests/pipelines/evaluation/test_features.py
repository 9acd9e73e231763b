"""Features of image sets: their order, their files, interruptions and processes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from pipelines.evaluation import features
from pipelines.evaluation.features import PART, features_of
from tests import forks
from tests.devices import DEVICE, cpu_only
from tests.feature_networks import small_network
from tests.image_sets import TensorImages, random_images

COUNT = 3 * PART + 5


@pytest.fixture(scope="module")
def images():
    return random_images(COUNT)


def extract(images, folder, network=None):
    """The features; how many passes of the network they took; and how many images were read."""
    passes = []
    network = (network or small_network()).to(DEVICE)
    hook = network.register_forward_hook(lambda *_: passes.append(1))
    image_set = TensorImages(images)
    found = features_of(image_set, network, Accelerator(), folder)
    hook.remove()
    return found["pooled"].clone(), len(passes), image_set.reads


@torch.no_grad()
def direct(images, network=None):
    return (network or small_network()).to(DEVICE)(images.to(DEVICE)).pooled.cpu()


def test_rows_are_in_the_order_of_the_images(images, tmp_path):
    found, passes, reads = extract(images, tmp_path)
    assert passes == 4 and reads == COUNT
    torch.testing.assert_close(found, direct(images))
    stored = np.load(tmp_path / "pooled.npy")
    assert stored.dtype == np.float32 and stored.flags.c_contiguous and np.array_equal(stored, found)


def test_images_are_those_of_a_png_file(images, tmp_path):
    """A difference that 8 bits do not show changes no feature."""
    exact, *_ = extract(images[:9], tmp_path / "a")
    close, *_ = extract((images[:9] + 0.003).clamp(-1, 1), tmp_path / "b")
    assert torch.equal(exact, close)


def test_an_interrupted_call_goes_on(images, tmp_path):
    straight, *_ = extract(images, tmp_path / "straight")

    class Fails(TensorImages):
        def read(self, rows):
            if rows.start == 2 * PART:
                raise KeyboardInterrupt
            return super().read(rows)

    with pytest.raises(KeyboardInterrupt):
        features_of(Fails(images), small_network().to(DEVICE), Accelerator(), tmp_path / "again")
    continued, passes, _ = extract(images, tmp_path / "again")
    assert passes == 2 and torch.equal(continued, straight)
    repeated, passes, _ = extract(images, tmp_path / "again")
    assert passes == 0 and torch.equal(repeated, straight)


def test_a_changed_image_is_computed_again(images, tmp_path):
    extract(images, tmp_path)
    changed = images.clone()
    changed[PART + 3] *= -1
    found, passes, _ = extract(changed, tmp_path)
    assert passes == 1
    torch.testing.assert_close(found, direct(changed))


@pytest.mark.parametrize("change", ["network", "count", "cut file", "no file", "record"])
def test_files_of_something_else_are_replaced(images, tmp_path, change):
    extract(images, tmp_path)
    network, path = small_network(), tmp_path / "pooled.npy"
    if change == "network":
        network.module.filters.weight.data.mul_(2)
    elif change == "count":
        images = images[:-1]
    elif change == "cut file":
        path.write_bytes(path.read_bytes()[:-100])
    elif change == "no file":
        path.unlink()
    else:
        (tmp_path / "record.json").write_text("{")
    found, passes, _ = extract(images, tmp_path, network)
    assert passes == 4
    torch.testing.assert_close(found, direct(images, network))


def test_the_record_says_what_the_files_are_of(images, tmp_path):
    extract(images[:10], tmp_path)
    record = json.loads((tmp_path / "record.json").read_text())
    assert (record["images"], record["widths"], len(record["parts"])) == (10, {"pooled": 24}, 1)
    assert record["network"] == features.checksum_of_network(small_network())
    assert record["network"] != features.checksum_of_network(small_network("another name"))


def on_two(folder, count):
    """Called in each of two processes. The second must not write."""
    accelerator = Accelerator()
    image_set = TensorImages(random_images(count))
    found = features_of(image_set, small_network(), accelerator, Path(folder) / str(accelerator.process_index))
    Path(folder, f"seen{accelerator.process_index}.json").write_text(json.dumps([image_set.reads, len(found)]))


@cpu_only
@pytest.mark.parametrize("count", [3, 2 * PART, 2 * PART + 5])  # one, two, and three parts
def test_two_processes_are_one(tmp_path, count):
    alone, *_ = extract(random_images(count), tmp_path / "alone")
    forks.launch_two(on_two, (str(tmp_path), count), {})
    assert np.array_equal(np.load(tmp_path / "0" / "pooled.npy"), alone) and not (tmp_path / "1").exists()
    (first, outputs), (second, nothing) = (json.loads((tmp_path / f"seen{rank}.json").read_text()) for rank in (0, 1))
    assert (outputs, nothing) == (1, 0)
    assert max(first, second) <= max(count, 1) and first + second >= count
    if count >= 2 * PART:
        assert first < count  # it read a share
