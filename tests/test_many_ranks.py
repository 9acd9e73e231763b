"""The data of one run over 8 machines of 8 ranks, computed in one process: who reads, evaluates and writes what.

No number divides another one here, and every rank is asked for what it would do.
"""

from collections import Counter
from types import SimpleNamespace

import datasets
import numpy as np
import pytest

from configs import ConfigError
from configs.index_sampler import IndexSampler
from stage1_vqgan import VQGANConfig
from stage1_vqgan.data.columns import undecoded
from stage1_vqgan.data.indexed import ImageSource
from stage1_vqgan.data.samplers import EveryImage, training_sampler
from stage1_vqgan.data.streamed import ImageStream
from stage2_prior import tokenization
from stage2_prior.encoding import EncodedShard
from stage2_prior.training.trainer import PriorTrainer
from tests import process_runs, tiny
from tests.slow import few

RANKS = 8 * 8
BATCH, SEED = 3, 5
IMAGES = 10_007
PER_EPOCH = IMAGES // (BATCH * RANKS)  # batches of a rank in an epoch: 52, which leave 23 images over
SOURCE = ImageSource([None] * IMAGES, None, None)


def stage1_batches(rank, start=0, stop=2 * PER_EPOCH):
    return [
        [(key.epoch, key.image) for key in keys]
        for keys in training_sampler(SOURCE, BATCH, start, stop, SEED, rank, RANKS)
    ]


def trainer(rank, **changes):
    """As much of Trainer as its loaders need; they return their samplers."""
    args = SimpleNamespace(
        process_index=rank, world_size=RANKS, train_batch_size=BATCH, seed=SEED, eval_batch_size=BATCH
    )
    args.gradient_accumulation_steps, args.max_steps = 2, PER_EPOCH
    return SimpleNamespace(args=args, train_dataset=range(IMAGES), _loader=lambda _, **sampler: sampler)


def stage2_batches(rank):
    sampler = PriorTrainer.get_train_dataloader(trainer(rank))["batch_sampler"]
    return [[tuple(row) for row in rows.tolist()] for rows in sampler]


@pytest.mark.parametrize("batches", [stage1_batches, stage2_batches])
def test_no_image_is_trained_on_twice_in_an_epoch(batches):
    """Each epoch is a permutation of which only the last images, less than a global batch, are left out."""
    read = [batches(rank) for rank in range(RANKS)]
    for epoch in range(2):
        of_epoch = [each[epoch * PER_EPOCH : (epoch + 1) * PER_EPOCH] for each in read]
        images = [image for each in of_epoch for batch in each for number, image in batch if number == epoch]
        assert len(images) == len(set(images)) == PER_EPOCH * BATCH * RANKS > IMAGES - BATCH * RANKS
        assert set(images) < set(range(IMAGES))
    steps = IndexSampler(IMAGES, BATCH * RANKS, 0, 2 * PER_EPOCH, SEED)
    for step, whole in enumerate(steps):  # a step reads what one rank with the whole batch reads
        assert [key for each in read for key in each[step]] == [tuple(row) for row in whole.tolist()]


@pytest.mark.parametrize("start", [1, PER_EPOCH - 1, PER_EPOCH, 2 * PER_EPOCH - 1])
def test_a_resumed_rank_reads_on(start):
    for rank in (0, 7, 8, RANKS - 1):
        assert stage1_batches(rank, start) == stage1_batches(rank)[start:]


def test_each_image_is_evaluated_once():
    images = [key.image for rank in range(RANKS) for key in EveryImage(SOURCE, rank, RANKS)]
    assert sorted(images) == list(range(IMAGES))
    rows = [PriorTrainer.get_eval_dataloader(trainer(rank), range(IMAGES))["sampler"] for rank in range(RANKS)]
    assert len(set(map(len, rows))) == 1  # all ranks take part in the same collectives
    assert sorted(row for each in rows for row in each if row >= 0) == list(range(IMAGES))
    assert sum(row < 0 for each in rows for row in each) == -IMAGES % RANKS


@pytest.fixture(params=[7, 2 * RANKS], ids=["shared files", "own files"])
def stream(request):
    """500 numbered images in 7 files, of which every rank reads all, or in 128 files, of which each reads its own."""
    items = {"image": [{"bytes": str(number).encode(), "path": None} for number in range(500)]}
    features = datasets.Features({"image": undecoded()})
    files = datasets.Dataset.from_dict(items, features=features).to_iterable_dataset(num_shards=request.param)
    return ImageStream(files, "image", None, None, 500, shuffle_buffer_size=50)


def image_of(key):
    return int(key.encoded.content)


@pytest.mark.parametrize("stream", few([7, 2 * RANKS], 2 * RANKS), ids=["shared files", "own files"], indirect=True)
def test_no_image_of_a_stream_is_trained_on_twice_in_an_epoch(stream):
    """A rank leaves out less than a batch in an epoch, and continues like an undisturbed one."""
    seen = {epoch: Counter() for epoch in range(2)}
    numbers = Counter()
    for rank in range(RANKS):
        keys = [key for batch in training_sampler(stream, BATCH, 0, 6, SEED, rank, RANKS) for key in batch]
        for key in keys:
            if key.epoch < 2:
                seen[key.epoch][image_of(key)] += 1
                numbers[key.epoch, key.image] += 1
    assert set(numbers.values()) == {1}  # the number decides the augmentation
    for counts in seen.values():
        assert set(counts.values()) == {1} and 500 - (BATCH - 1) * RANKS <= len(counts) <= 500
    for rank in (0, RANKS - 1):
        whole = [
            [(key.epoch, image_of(key)) for key in keys]
            for keys in training_sampler(stream, BATCH, 0, 6, SEED, rank, RANKS)
        ]
        later = training_sampler(stream, BATCH, 5, 6, SEED, rank, RANKS)
        assert [[(key.epoch, image_of(key)) for key in keys] for keys in later] == whole[5:]


def test_each_image_of_a_stream_is_evaluated_once(stream):
    images = [image_of(key) for rank in range(RANKS) for key in EveryImage(stream, rank, RANKS)]
    assert sorted(images) == list(range(500))


def test_fewer_images_than_ranks_need_are_refused():
    with pytest.raises(ConfigError, match="191 training images for 64 process"):
        training_sampler(ImageSource([None] * (BATCH * RANKS - 1), None, None), BATCH, 0, 1, SEED, 0, RANKS)


@pytest.mark.parametrize("ranks", [1, 3, RANKS, 100])
def test_each_shard_of_a_store_is_written_by_one_rank(ranks, monkeypatch, tmp_path):
    """Also by more ranks than shards. No file is made here, so no rank skips what another one has written."""
    written = []

    def encode(model, dataset, images, *_):
        numbers = np.array([image.number for image in images])
        return EncodedShard(numbers, numbers, None, len(numbers), [])

    monkeypatch.setattr(tokenization, "images_per_shard", lambda views: 50)
    monkeypatch.setattr(tokenization, "encode_shard", encode)
    monkeypatch.setattr(tokenization, "write_shard", lambda path, numbers, *_: written.append((path.name, numbers)))
    config = process_runs.stage2_config(tmp_path)
    model = SimpleNamespace(config=VQGANConfig(**tiny.VQGAN))
    for rank in range(ranks):
        processes = SimpleNamespace(process_index=rank, num_processes=ranks, is_main_process=False)
        source = ImageSource([None] * 1013, None, None)
        assert tokenization.tokenize_split(config, processes, model, "train", source, 2) == 21
    assert len({name for name, _ in written}) == len(written) == 21
    assert np.array_equal(np.sort(np.concatenate([numbers for _, numbers in written])), np.arange(1013))
