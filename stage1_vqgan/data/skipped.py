"""What became of images that cannot be used: each is named, recorded, and too many of them stop the run."""

import json
import logging
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
# A share of a stream means something only after so many of its images.
MIN_SEEN = 100

logger = logging.getLogger(__name__)


class SkippedImages:
    """Takes the skipped images of batches: a warning for each (not more than `MAX_WARNINGS`), a line in
    `skipped_images.jsonl` for each, and an error when there are too many.

    Each image of a split counts once, however often it comes. What earlier runs in the folder recorded is not recorded
    again, and does not count: files may have been repaired since.

    Args:
        max_fraction: of the images of a split that may be skipped.
        num_images: images of each split by its name; None for a stream, whose images are counted as they come.
        folder: of the run; None keeps no record.
        is_main_process: whether this process writes it.
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
        self._known: set[tuple[str, int]] = set()  # to this process, found by any
        self._new: list[tuple[str, SkippedImage]] = []  # since the last exchange
        self._seen: Counter[str] = Counter()  # by all processes up to the last exchange
        self._new_seen: Counter[str] = Counter()
        self._recorded = set() if self.path is None else _read(self.path)

    def add(self, split: str, batch: ImageBatch) -> None:
        """Takes note of a batch in this process, and warns."""
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
                logger.warning("more images are skipped; further ones are %s", where)

    def watch(self, split: str, batches: Iterable[ImageBatch]) -> Iterator[ImageBatch]:
        """The batches, each taken note of before it is used."""
        for batch in batches:
            self.add(split, batch)
            yield batch

    def exchange(self) -> None:
        """Brings what all processes found together, and records it. Every process calls it, at the same step.

        Raises:
            ConfigError: too many images were skipped (in all processes alike).
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
    """The problem of more skipped images than are allowed, with the first of them; None if there are not so many.

    Args:
        skipped: the images.
        num_images: of which they are.
        max_fraction: of them that may be skipped.
        what: they are, for the message.
        advice: what to do, for the message.
    """
    if len(skipped) <= max_fraction * num_images:
        return None
    listed = [f"      {image.name}: {image.reason}" for image in skipped[:MAX_LISTED]]
    if len(skipped) > MAX_LISTED:
        listed.append(f"      and {len(skipped) - MAX_LISTED} more")
    counts = f"received {max_fraction:g}, but {len(skipped)} of the {num_images:,} {what} cannot be used"
    return Problem("data.max_skipped_fraction", "\n".join([f"{counts}; {advice}:", *listed]))


def _read(path: Path) -> set[str]:
    """The lines of a record; one that was cut short when its process was killed is cut off."""
    text = path.read_text() if path.is_file() else ""
    complete = text[: text.rfind("\n") + 1]
    if complete != text:
        write_text(path, complete)
    return set(complete.splitlines(keepends=True))
