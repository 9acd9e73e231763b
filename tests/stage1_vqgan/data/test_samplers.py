"""All processes together read every image once per epoch, in an order that interruptions and workers do not change."""

import itertools
import threading
import time
from dataclasses import replace
from itertools import chain, pairwise

import numpy as np
import pytest
import torch

from configs import ConfigError
from stage1_vqgan import AugmentationConfig, DataConfig, ImageDataset, TrainingSampler, load_images
from stage1_vqgan.data.loading import evaluation_loader, training_loader
from stage1_vqgan.data.samplers import (
    EveryImage,
    IndexSampler,
    StreamSampler,
    read_ahead,
    some_images,
    training_sampler,
)
from stage1_vqgan.reconstruction import evaluate_reconstruction
from tests.image_files import picture, value_of, values, write_folder, write_parquet, write_tar
from tests.slow import few

pytestmark = pytest.mark.usefixtures("datasets_cache")

SIZES = [7, 11, 5, 9, 6, 4]  # images of each file, 42 in all


@pytest.fixture(params=["parquet", "tar"])
def streams(request, tmp_path):
    """The training and validation stream of several files; a parquet stream states its number of images."""
    first = 0
    for number, size in enumerate(SIZES):
        shown = range(first, first + size)
        if request.param == "parquet":
            rows = {"picture": [picture(value) for value in shown]}
            write_parquet(tmp_path / f"train-{number}.parquet", rows)
        else:
            write_tar(tmp_path / f"train-{number}.tar", shown)
        first += size
    if request.param == "tar":
        write_tar(tmp_path / "val-0.tar", range(100, 109))
    split = "val" if request.param == "tar" else None
    config = DataConfig(
        dataset=str(tmp_path), validation_split=split, streaming=True, shuffle_buffer_size=8, validation_fraction=0.1
    )
    return load_images(config)


def batches(stream, batch_size=3, start=0, stop=40, seed=5, **where):
    """[(epoch, image, value), …] of every batch."""
    sampler = StreamSampler(stream, batch_size, start, stop, seed, **where)
    found = [[(key.epoch, key.image, value_of(key.encoded)) for key in batch] for batch in sampler]
    assert len(sampler) == len(found)
    return found


def epochs(found):
    """Values of every epoch except the last, incomplete one."""
    by_epoch = {}
    for batch in found:
        assert len({epoch for epoch, _, _ in batch}) == 1
        for epoch, _, value in batch:
            by_epoch.setdefault(epoch, []).append(value)
    assert list(by_epoch) == list(range(len(by_epoch)))
    return list(by_epoch.values())[:-1]


@pytest.mark.parametrize("world_size", few([1, 2, 3, 4], 3, 4))  # 4 cannot share six files, so each reads all files
def test_every_image_once_an_epoch_over_all_processes(streams, world_size):
    train, validation = streams
    everything = values(train)
    assert sorted(everything + values(validation))[: sum(SIZES)] == list(range(sum(SIZES)))
    assert not set(everything) & set(values(validation))
    ranks = [epochs(batches(train, 1, stop=110, rank=rank, world_size=world_size)) for rank in range(world_size)]
    for parts in zip(*ranks, strict=False):
        assert sorted(chain(*parts)) == sorted(everything)
    own_files = not train.is_part and len(SIZES) % world_size == 0
    for passes in ranks:  # all passes of a process have the same length
        assert len({len(shown) for shown in passes}) == 1
        assert (len({frozenset(shown) for shown in passes}) == 1) == (own_files or world_size == 1)


def test_numbers_of_images_do_not_meet(streams):
    keys = [key[:2] for rank in range(3) for batch in batches(streams[0], rank=rank, world_size=3) for key in batch]
    assert len(set(keys)) == len(keys)


def test_epochs_and_seeds_differ_in_order(streams):
    found = batches(streams[0], 1, stop=130)
    assert len(epochs(found)) >= 3 and all(a != b for a, b in pairwise(epochs(found)))
    assert found == batches(streams[0], 1, stop=130) != batches(streams[0], 1, stop=130, seed=6)
    by_epoch = epochs(batches(streams[0], 4, stop=30))
    assert {len(shown) for shown in by_epoch} == {len(values(streams[0])) // 4 * 4}  # a partial batch is dropped


@pytest.mark.parametrize(
    ("streams", "world_size"),
    few(itertools.product(["parquet", "tar"], [1, 2, 4]), ("tar", 2), ("parquet", 4)),
    indirect=["streams"],
)
def test_a_later_start_is_the_tail_of_the_whole_run(streams, world_size):
    for rank in range(world_size):
        whole = batches(streams[0], rank=rank, world_size=world_size)
        for start in (1, 3, 12, 27, 40):
            assert batches(streams[0], start=start, rank=rank, world_size=world_size) == whole[start:]


def test_batches_do_not_depend_on_workers(streams):
    dataset = ImageDataset(streams[0], (8, 8), 3, AugmentationConfig(random_crop=True, max_zoom=1.5, rotate=20))
    one, other = (
        list(training_loader(dataset, training_sampler(streams[0], 4, 3, 15, 0), workers, False)) for workers in (0, 2)
    )
    assert len(one) == len(other) == 12
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.images(), b.images()) and torch.equal(a.indices, b.indices)


def test_the_sampler_fits_the_source(streams, tmp_path):
    assert isinstance(training_sampler(streams[0], 4, 0, 5, 0), StreamSampler)
    folder = write_folder(tmp_path / "a", {f"{n}.png": n for n in range(9)})
    source, _ = load_images(DataConfig(dataset=folder))
    found = training_sampler(source, 2, 1, 5, 0, rank=1, world_size=2)
    assert isinstance(found, TrainingSampler) and list(found) == list(TrainingSampler(8, 2, 1, 5, 0, 1, 2))


@pytest.mark.parametrize("world_size", few([1, 2, 4], 1, 4))
def test_evaluation_sees_every_image_once(streams, tmp_path, world_size):
    folder = write_folder(tmp_path / "a", {f"{n}.png": n for n in range(11)})
    for source in (*streams, load_images(DataConfig(dataset=folder))[0]):
        dataset, seen = ImageDataset(source, (6, 6), 3), []
        for rank in range(world_size):
            keys = list(EveryImage(source, rank, world_size))
            loader = evaluation_loader(dataset, 4, rank=rank, world_size=world_size)
            loaded = [(127.5 * (batch.images()[:, 0, 0, 0] + 1)).round().int() for batch in loader]
            seen += torch.cat(loaded).tolist() if loaded else []
            assert len(keys) == sum(map(len, loaded))
            try:
                assert len(EveryImage(source, rank, world_size)) == len(keys)
            except TypeError:
                assert source.num_images is None or world_size > 1
        assert sorted(seen) == sorted(values(source))


def test_some_images(streams, tmp_path):
    assert [value_of(key.encoded) for key in some_images(streams[0], 3)] == values(streams[0])[:3]
    assert len(some_images(streams[1], 1000)) == len(values(streams[1]))
    folder = write_folder(tmp_path / "a", {f"{n:02}.png": n for n in range(13)})
    assert [key.image for key in some_images(load_images(DataConfig(dataset=folder))[0], 3)] == [0, 5, 11]
    classes = write_folder(tmp_path / "b", {f"{'x' if n < 12 else 'y'}/{n:02}.png": n for n in range(15)})
    source = load_images(DataConfig(dataset=classes))[0]
    assert [int(source.labels[key.image]) for key in some_images(source, 4)] == [0, 0, 1, 1]


def test_a_batch_larger_than_an_epoch(streams):
    with pytest.raises(ConfigError, match=r"per_device_train_batch_size: received 50, .* only (38|42) training images"):
        batches(streams[0], 50)


def test_another_number_of_images_than_stated(streams):
    with pytest.raises(ConfigError, match=r"data\.dataset: process 0 read \d+ images in an epoch .* states 99"):
        batches(replace(streams[0], num_images=99))


class TestReadAhead:
    def readers(self):
        return [thread for thread in threading.enumerate() if thread.name == "read ahead"]

    def test_items_and_errors_arrive_in_order(self):
        def items():
            yield from range(10)
            raise KeyError("broken")

        found = []
        with pytest.raises(KeyError, match="broken"):
            for item in read_ahead(items(), 3):
                found.append(item)
        assert found == list(range(10)) and not self.readers()

    def test_it_reads_no_further_than_its_depth_and_ends_when_closed(self):
        taken = []
        ahead = read_ahead(map(taken.append, range(100)), 3)
        next(ahead)
        time.sleep(0.3)
        assert len(taken) <= 6 and len(self.readers()) == 1
        ahead.close()
        assert not self.readers()

    def test_a_sampler_leaves_no_thread_behind(self, streams):
        for batch in StreamSampler(streams[0], 3, 0, 1000, 0):
            assert len(batch) == 3
            break
        assert not self.readers()


def test_metrics_leave_out_what_cannot_be_decoded(tiny_pipeline, tmp_path):
    folder = write_folder(tmp_path / "a", {f"{n}.png": 20 * n for n in range(9)})
    model = tiny_pipeline.vqgan

    def metrics(**settings):
        source, _ = load_images(DataConfig(dataset=folder, validation_fraction=0.5, **settings))
        dataset = ImageDataset(source, model.config.image_shape, model.config.in_channels)
        return evaluate_reconstruction(model, evaluation_loader(dataset, 1))

    whole = metrics()
    assert whole["images"] == 4 and "skipped" not in whole
    (tmp_path / "a" / "3.png").write_bytes(b"no image")
    found = metrics()
    assert (found["images"], found["skipped"]) == (3, 1) and found["psnr"] != whole["psnr"]
    for n in range(9):
        (tmp_path / "a" / f"{n}.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match="none of the 4 images can be decoded"):
        metrics()


def shuffled(num_images=23, batch_size=4, start=0, stop=17, seed=5, **where):
    return list(TrainingSampler(num_images, batch_size, start, stop, seed, **where))


def test_an_epoch_has_no_image_twice_and_drops_less_than_a_batch():
    by_epoch = {}
    for batch in shuffled():
        assert len(batch) == 4 and all(key.view == 0 and key.encoded is None for key in batch)
        for key in batch:
            by_epoch.setdefault(key.epoch, []).append(key.image)
    assert list(by_epoch) == [0, 1, 2, 3]
    for indices in list(by_epoch.values())[:3]:
        assert len(indices) == 20 and len(set(indices)) == 20 and set(indices) <= set(range(23))
    assert all(a != b for a, b in pairwise(by_epoch.values()))  # each epoch has its own order
    left_out = [set(range(23)) - set(indices) for indices in list(by_epoch.values())[:3]]
    assert len(set.union(*left_out)) > 3  # each epoch drops other images


def test_ranks_together_are_one_process_with_a_larger_batch():
    whole = shuffled(batch_size=6)
    ranks = [shuffled(batch_size=2, rank=rank, world_size=3) for rank in range(3)]
    assert [a + b + c for a, b, c in zip(*ranks, strict=True)] == whole


@pytest.mark.parametrize("start", [0, 1, 5, 12, 17])
def test_a_later_start_is_the_tail_of_a_whole_shuffled_run(start):
    assert shuffled(start=start) == shuffled()[start:]
    assert len(TrainingSampler(23, 4, start, 17, 5)) == 17 - start


def test_arrays_of_indices_are_the_same_batches():
    arrays = list(IndexSampler(23, 4, 3, 17, 5, rank=1, world_size=2))
    assert all(array.dtype == "int64" and array.shape == (4, 2) for array in arrays)
    keys = shuffled(start=3, rank=1, world_size=2)
    assert [array.tolist() for array in arrays] == [[[key.epoch, key.image] for key in batch] for batch in keys]
    order = np.random.default_rng((5, 1)).permutation(23)  # the order in earlier versions
    assert arrays[0].tolist() == [[1, row] for row in order[12:16]]


def test_the_seed_decides_the_order():
    assert shuffled(seed=5) == shuffled(seed=5) != shuffled(seed=6)


def test_too_few_images_for_a_batch():
    assert len(shuffled(num_images=8, batch_size=4, world_size=2, stop=3)) == 3
    with pytest.raises(ConfigError, match=r"per_device_train_batch_size.* 7 training images"):
        shuffled(num_images=7, batch_size=4, world_size=2)
