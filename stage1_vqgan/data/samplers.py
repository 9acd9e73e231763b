"""The order of images: keys in batches for training, one by one for evaluation, from indexed and streamed sources.

The training process reads a stream, in a thread that is a few batches ahead; the workers only decode. So the images of
a batch do not depend on the number of workers or on their timing.
"""

import logging
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from queue import Full, Queue
from typing import Any, TypeVar

from torch.utils.data import Sampler

from configs import ConfigError, Problem
from configs.index_sampler import IndexSampler, too_few
from stage1_vqgan.data.dataset import ImageKey
from stage1_vqgan.data.indexed import ImageSource
from stage1_vqgan.data.sources import Images
from stage1_vqgan.data.streamed import ImageStream
from stage1_vqgan.pictures import spread

T = TypeVar("T")

logger = logging.getLogger(__name__)


class TrainingSampler(IndexSampler):
    """The batches of an `IndexSampler`, as lists of `ImageKey`s."""

    def __iter__(self) -> Iterator[list[ImageKey]]:
        return ([ImageKey(*key) for key in keys.tolist()] for keys in super().__iter__())


class StreamSampler(Sampler[list[ImageKey]]):
    """Batches of one process from a stream: keys that hold their images. A pure function of (seed, step).

    Every process counts its own epochs. Within an epoch no image is read twice over all processes, and the images after
    the last full batch are dropped. To start at a later step, the sampler reads the current epoch up to there, without
    decoding. If the length of an epoch is unknown (an unknown number of images, or several processes with files of
    different sizes), it first reads one epoch to count it.

    Args:
        stream: the images.
        batch_size: number of images in a batch of one process.
        start, stop: range of batches to yield.
        seed: seed of the orders.
        rank: number of this process.
        world_size: number of processes.

    Raises:
        ConfigError: an epoch is shorter than a batch, or its number of images differs from the one that the source
            states.
    """

    def __init__(
        self, stream: ImageStream, batch_size: int, start: int, stop: int, seed: int, rank: int = 0, world_size: int = 1
    ):
        self.stream, self.batch_size, self.seed = stream, batch_size, seed
        self.start, self.stop, self.rank, self.world_size = start, stop, rank, world_size
        length = stream.length(rank, world_size)
        if length is not None and length < batch_size:
            raise self._too_few(length)

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[ImageKey]]:
        return read_ahead(self._batches(), depth=4)

    def _batches(self) -> Iterator[list[ImageKey]]:
        length = self.stream.length(self.rank, self.world_size)
        epoch, position = 0, self.start  # epoch of the next batch, and number of batches before it there
        remaining = len(self)
        while remaining:
            if length is not None:
                later, position = divmod(position, length // self.batch_size)
                epoch += later
            elif position:
                logger.info("process %d reads the stream up to batch %d, to continue there", self.rank, position)
            batch: list[ImageKey] = []
            read = 0
            for read, (encoded, _) in enumerate(
                self.stream.read(self.rank, self.world_size, shuffle=(self.seed, epoch)), 1
            ):
                # the number decides the augmentation, so processes must not share one
                batch.append(ImageKey(epoch, (read - 1) * self.world_size + self.rank, 0, encoded))
                if len(batch) < self.batch_size:
                    continue
                if position:
                    position -= 1
                else:
                    yield batch
                    remaining -= 1
                    if not remaining:
                        return
                batch = []
            if length is not None and read != length:
                message = f"process {self.rank} read {read} images in an epoch of the stream, which states {length}"
                raise ConfigError([Problem("data.dataset", f"{message}; set data.streaming to false")])
            if read < self.batch_size:
                raise self._too_few(read)
            length, epoch = read, epoch + 1

    def _too_few(self, length: int) -> ConfigError:
        return too_few(self.batch_size, f"{length} training images for process {self.rank}")


def training_sampler(
    source: Images, batch_size: int, start: int, stop: int, seed: int, rank: int = 0, world_size: int = 1
) -> TrainingSampler | StreamSampler:
    """The training sampler for a source; the arguments are those of `StreamSampler`."""
    if isinstance(source, ImageStream):
        return StreamSampler(source, batch_size, start, stop, seed, rank, world_size)
    return TrainingSampler(len(source), batch_size, start, stop, seed, rank, world_size)


class EveryImage(Sampler[ImageKey]):
    """Keys of this process's images, in order; all processes together yield every image once.

    Args:
        source: the images.
        rank: number of this process.
        world_size: number of processes.
    """

    def __init__(self, source: Images, rank: int = 0, world_size: int = 1):
        self.source, self.rank, self.world_size = source, rank, world_size

    def __len__(self) -> int:
        length = self._length()
        if length is None:
            raise TypeError("a stream with an unknown number of images has no len()")
        return length

    def __iter__(self) -> Iterator[ImageKey]:
        if isinstance(self.source, ImageSource):
            yield from (ImageKey(0, number) for number in range(self.rank, len(self.source), self.world_size))
            return
        with closing(read_ahead(self.source.read(self.rank, self.world_size), depth=64)) as items:
            for position, (encoded, _) in enumerate(items):
                yield ImageKey(0, position * self.world_size + self.rank, 0, encoded)

    def _length(self) -> int | None:
        if isinstance(self.source, ImageSource):
            return len(range(self.rank, len(self.source), self.world_size))
        return self.source.length(self.rank, self.world_size)


def some_images(source: Images, count: int) -> list[ImageKey]:
    """Keys of at most `count` images: spread over the classes of an indexed source, the first ones of a stream."""
    if isinstance(source, ImageSource):
        return [ImageKey(0, number) for number in spread(len(source), count, source.labels)]
    with closing(source.read()) as items:
        return [ImageKey(0, number, 0, encoded) for number, (encoded, _) in zip(range(count), items, strict=False)]


def read_ahead(items: Iterable[T], depth: int) -> Generator[T, None, None]:
    """Yields the same items, which a thread reads up to `depth` ahead. The thread ends with the iterator.

    An exception of the thread is raised here, after the items that were read before it.
    """
    queue: Queue[tuple[Any, BaseException | None]] = Queue(depth)
    stopped = threading.Event()

    def put(entry: tuple[Any, BaseException | None]) -> bool:
        while not stopped.is_set():
            try:
                queue.put(entry, timeout=0.1)
                return True
            except Full:
                continue
        return False

    def read() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((None, StopIteration()))
        except Exception as error:
            put((None, error))

    thread = threading.Thread(target=read, name="read ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = queue.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stopped.set()
        thread.join()
