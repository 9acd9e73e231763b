"""Skipped images, which cannot be decoded: each is logged and recorded, and too many of them stop the run."""

import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from accelerate.utils import gather_object

from configs import ConfigError, Problem
from configs.files import write_text
from stage1_vqgan.data.dataset import ImageBatch
from stage1_vqgan.data.decoding import SkippedImage

FILE_NAME = "skipped_images.jsonl"
MAX_WARNINGS = 20
MAX_LISTED = 20
# Number of images of a stream before its fraction of skipped images is checked.
MIN_SEEN = 100

logger = logging.getLogger(__name__)


class SkippedImages:
    """Collects the skipped images of batches. For each it logs a warning (up to `MAX_WARNINGS`) and writes a line to
    `skipped_images.jsonl`. It raises an error if there are too many.

    Each image of a split counts once, even if it is read again. An image that an earlier run in the folder recorded is
    not recorded again. It counts only if this run skips it too, because its file may have been repaired.

    Args:
        max_fraction: largest allowed fraction of skipped images of a split, in [0, 1].
        num_images: number of images of each split, by its name; None counts the images while they are read.
        folder: folder of the run; None writes no record.
        is_main_process: whether this process writes the record.
    """

    def __init__(
        self,
        max_fraction: float,
        num_images: Mapping[str, int | None],
        folder: str | Path | None = None,
        is_main_process: bool = True,
    ):
        self.max_fraction, self.num_images = max_fraction, num_images
        self.path = Path(folder) / FILE_NAME if folder is not None and is_main_process else None
        self.found: dict[tuple[str, int], SkippedImage] = {}
        self._known: set[tuple[str, int]] = set()  # skipped by any process, up to the last exchange
        self._new: list[tuple[str, SkippedImage]] = []  # skipped by this process since the last exchange
        self._seen: Counter[str] = Counter()  # images read by all processes up to the last exchange
        self._new_seen: Counter[str] = Counter()  # images read by this process since then
        self._recorded = set() if self.path is None else _read(self.path)

    def add(self, split: str, batch: ImageBatch) -> None:
        """Collects the skipped images of a batch in this process, and logs warnings."""
        self._new_seen[split] += len(batch.indices) + len(batch.skipped)
        for image in batch.skipped:
            if (split, image.image) in self._known:
                continue
            self._known.add((split, image.image))
            self._new.append((split, image))
            if len(self._known) <= MAX_WARNINGS:
                logger.warning("skipped %s of the %s images: %s", image.name, split, image.reason)
            elif len(self._known) == MAX_WARNINGS + 1:
                where = f"in {self.path}" if self.path else "not shown"
                logger.warning("more images are skipped; the others are %s", where)

    def watch(self, split: str, batches: Iterable[ImageBatch]) -> Iterator[ImageBatch]:
        """Yields the batches, after adding each."""
        for batch in batches:
            self.add(split, batch)
            yield batch

    def exchange(self) -> None:
        """Gathers the skipped images of all processes and records them. All processes must call it at the same step.

        Raises:
            ConfigError: too many images were skipped; raised in every process.
        """
        for new, seen in gather_object([(self._new, self._new_seen)]):
            self._seen.update(seen)
            for split, image in new:
                self.found.setdefault((split, image.image), image)
        self._new, self._new_seen = [], Counter()
        self._known |= self.found.keys()
        self._record()
        self._check()

    def _record(self) -> None:
        if self.path is None:
            return
        lines = []
        for (split, _), image in self.found.items():
            line = json.dumps({"split": split, **image._asdict()}) + "\n"
            if line not in self._recorded:
                self._recorded.add(line)
                lines.append(line)
        if lines:
            with open(self.path, "a") as file:
                file.write("".join(lines))

    def _check(self) -> None:
        problems = []
        for split, total in self.num_images.items():
            skipped = [image for (of, _), image in self.found.items() if of == split]
            images = self._seen[split] if total is None else total
            if total is None and images < MIN_SEEN:
                continue
            what = f"{split} images" if total is not None else f"{split} images seen so far"
            problem = too_many_skipped(skipped, images, self.max_fraction, what)
            if problem is not None:
                problems.append(problem)
        if problems:
            raise ConfigError(problems, "image data")


def too_many_skipped(
    skipped: Sequence[SkippedImage],
    num_images: int,
    max_fraction: float,
    what: str,
    advice: str = "repair or remove them, or allow more",
) -> Problem | None:
    """The problem that lists the skipped images, if there are more than allowed; else None.

    Args:
        skipped: skipped images.
        num_images: number of all images.
        max_fraction: largest allowed fraction of skipped images, in [0, 1].
        what: name of the images in the message.
        advice: what the user can do, for the message.
    """
    if not skipped or len(skipped) / num_images <= max_fraction:
        return None
    listed = [f"      {image.name}: {image.reason}" for image in skipped[:MAX_LISTED]]
    if len(skipped) > MAX_LISTED:
        listed.append(f"      and {len(skipped) - MAX_LISTED} more")
    counts = f"received {max_fraction:g}, but {len(skipped)} of the {num_images:,} {what} cannot be used"
    enough = f"{smallest_fraction(len(skipped), num_images):g} is enough for these"
    return Problem("data.max_skipped_fraction", "\n".join([f"{counts}; {advice} ({enough}):", *listed]))


def smallest_fraction(skipped: int, num_images: int) -> float:
    """The smallest `max_skipped_fraction` of three digits that allows so many, at least 1, to be skipped."""
    share = skipped / num_images
    scale = 10 ** (2 - math.floor(math.log10(share)))
    return min(1.0, math.ceil(share * scale) / scale)


def _read(path: Path) -> set[str]:
    """The lines of a record. A last line that is incomplete, because its process was killed, is removed."""
    text = path.read_text() if path.is_file() else ""
    complete = text[: text.rfind("\n") + 1]
    if complete != text:
        write_text(path, complete)
    return set(complete.splitlines(keepends=True))
