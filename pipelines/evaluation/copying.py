"""The copying check: does a generator copy its training images?

The score of an image is the distance to its nearest training image, divided by the mean distance to its five nearest
ones. It is small only if one training image is much nearer than the others, as for a copy. An image of a common kind
has many near neighbours, so its score is near 1. Held-out images have scores too, and none of them is a copy. The check
states how the scores of generated images lie among those of held-out images.

A generator may have trained on several views of each image, such as mirrored or rotated ones. The distance to a
training image is then the distance to the nearest of its views, and neighbours are different images.

Sources: the score is that of Carlini et al. 2023, "Extracting training data from diffusion models", section 4.2 (there
with 50 neighbours; with five, more of the changed copies of Fashion-MNIST were found); the comparison with held-out
images is that of Meehan et al. 2020, "A non-parametric test to detect data-copying in generative models".

Shape letters: N images, V views of an image, F features of an image, k neighbours.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from pipelines.evaluation.image_set import ImageSet
from stage1_vqgan import spread
from stage1_vqgan.networks import FrozenNetwork

NEIGHBOURS = 5
LEVEL = 0.05  # share of held-out images whose scores count as those of copies
FEWEST_HELD_OUT = round(1 / LEVEL) - 1  # with fewer, no score is lower than those of 95 %
SAME = 1e-3  # score of an image that equals a training image up to rounding
BATCH_SIZE = 64
LARGEST_PART = 2**24  # distances in memory at the same time


class Suspect(NamedTuple):
    """A generated image and the training image that is nearest to it.

    Attributes:
        generated, train: their rows.
        view: the view of the training image that is nearest.
        score: see above.
    """

    generated: int
    train: int
    view: int
    score: float


class CopyingCheck(NamedTuple):
    """The result of `copying_check`.

    Attributes:
        figures: `suspected_copies`, the share of generated images whose score is lower than those of 95 % of the
            held-out images: at most .05 on average for a generator that has learnt the distribution, near 1 for one
            that copies; `suspected_copies_chance`, the standard deviation of this share that chance alone gives so many
            images; `nearer_than_held_out`, the probability that a generated image has a lower score than a held-out
            one: .5 and 1 in the same two cases.
        suspects: every generated image, those with the lowest scores first.
    """

    figures: dict[str, float]
    suspects: list[Suspect]


class Neighbours(NamedTuple):
    """The nearest training image of each image.

    Attributes:
        scores: float32 `(N,)` in [0, 1].
        rows: int64 `(N,)`, row of the nearest training image.
        views: int64 `(N,)`, which of its views is the nearest.
    """

    scores: np.ndarray
    rows: np.ndarray
    views: np.ndarray


def copying_check(
    generated: ImageSet, train: Sequence[ImageSet], validation: ImageSet, network: FrozenNetwork
) -> CopyingCheck:
    """Compares how near generated and held-out images are to training images.

    Args:
        generated: images of the generator.
        train: the images that it was trained on, in all their views: V sets of images, in which the image n is the
            same; one set if there are no views. If a tokenizer decodes the generated images, give its
            `Reconstructions` of training images and of held-out images. Otherwise its blur sets copies apart from their
            originals, and many networks then see no copy.
        validation: images of the same distribution that the generator was not trained on.
        network: its pooled features are compared. It computes on the device where it lies. "pixels" finds more changed
            copies than a classifier does.

    Raises:
        ValueError: there are too few images, or so many held-out images equal a training image in their features that
            copies cannot be told from them.
    """
    _require(len(generated), 1, "generated")
    _require(len(train[0]), 2, "train")
    _require(len(validation), FEWEST_HELD_OUT, "validation")
    views = tqdm(train, desc="features of training images", unit="view")
    known = torch.stack([features(view, network, "a view", leave=False) for view in views])
    held_out = features(validation, network, "held-out images")
    return check_features(features(generated, network, "generated images"), known, held_out)


def check_features(generated: Tensor, train: Tensor, validation: Tensor) -> CopyingCheck:
    """The copying check of features.

    Args:
        generated, validation: features `(N, F)` of the images.
        train: features `(V, N, F)` of the views of the training images.

    Raises:
        ValueError: see `figures`.
    """
    found = neighbours(generated, train)
    order = np.argsort(found.scores, kind="stable")
    columns = (order, found.rows[order], found.views[order], found.scores[order])
    suspects = [Suspect(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
    return CopyingCheck(figures(found.scores, neighbours(validation, train).scores), suspects)


@torch.no_grad()
def features(images: ImageSet, network: FrozenNetwork, name: str, leave: bool = True) -> Tensor:
    """Pooled features of images: float32 `(N, F)` on the network's device. `leave` keeps the progress bar."""
    starts = tqdm(range(0, len(images), BATCH_SIZE), desc=f"features of {name}", unit="batch", leave=leave)
    batches = (images.read(range(start, min(start + BATCH_SIZE, len(images)))) for start in starts)
    device = network.mean.device
    return torch.cat([network(batch.to(device)).pooled.float() for batch in batches])


def neighbours(queries: Tensor, train: Tensor) -> Neighbours:
    """Scores of images, and their nearest training images.

    Not all distances are in memory at the same time. Those of the nearest images are computed as norms of differences:
    a matrix product is faster, but it loses the small distances of copies.

    Args:
        queries: features `(N, F)` of the images.
        train: features `(V, M, F)` of the V views of M training images, M at least 2.
    """
    mean, (num_views, num_images) = train.mean((0, 1)), train.shape[:2]
    count = min(NEIGHBOURS, num_images)
    train = (train - mean).flatten(0, 1)  # small numbers, so that the product loses little
    scores, rows, views = [], [], []
    for part in queries.split(max(1, LARGEST_PART // max(len(train), count * train.shape[1]))):
        part = part - mean
        of_images, view = torch.cdist(part, train).unflatten(1, (num_views, num_images)).min(1)
        near = of_images.topk(count, largest=False).indices
        nearest_view = view.gather(1, near)
        distances = (part[:, None] - train[nearest_view * num_images + near]).norm(dim=2)
        least, place = distances.min(1, keepdim=True)
        scores.append(least[:, 0] / distances.mean(1).clamp_min(torch.finfo(torch.float32).tiny))
        rows.append(near.gather(1, place)[:, 0])
        views.append(nearest_view.gather(1, place)[:, 0])
    return Neighbours(*(torch.cat(parts).cpu().numpy() for parts in (scores, rows, views)))


def figures(generated: np.ndarray, held_out: np.ndarray) -> dict[str, float]:
    """The figures of `CopyingCheck`, from the scores of generated images and of held-out images.

    An image is suspected if (1 + number of held-out scores up to its own) / (1 + number of held-out images) is at most
    .05. This is a conformal p-value: for images of the same distribution its share is at most .05 on average, however
    few they are.

    Raises:
        ValueError: 5 % of the held-out images or more have a score of 0, up to rounding.
    """
    count = len(held_out)
    same = int((held_out < SAME).sum())
    if same and (1 + same) / (1 + count) > LEVEL:
        message = f"validation: {same} of {count} held-out images equal a training image in these features, so copies"
        advice = "remove duplicates, choose another network, or train the tokenizer until its images differ"
        raise ValueError(f"{message} cannot be told from them; {advice}")
    ordered = np.sort(held_out)
    below, up_to = (np.searchsorted(ordered, generated, side) for side in ("left", "right"))
    return {
        "suspected_copies": float(((1 + up_to) / (1 + count) <= LEVEL).mean()),
        "suspected_copies_chance": float(np.sqrt(LEVEL * (1 - LEVEL) * (1 / len(generated) + 1 / count))),
        "nearer_than_held_out": float(1 - ((below + up_to) / 2).mean() / count),
    }


def suspect_rows(
    suspects: Sequence[Suspect],
    generated: ImageSet,
    train: Sequence[ImageSet],
    to_images: Callable[[Tensor], list[Image.Image]],
    count: int = 32,
    columns: int = 8,
) -> list[tuple[str, list[Image.Image]]]:
    """Rows of `stage1_vqgan.labelled_grid`: generated images above their nearest training images.

    Of the images with the same nearest training image, only the first is shown. Images that equal a training image are
    all as suspicious; if they are more than `count`, some of them are shown, spread evenly over their order.

    Args:
        suspects: those of `CopyingCheck`.
        generated, train: as in `copying_check`.
        to_images: pixels `(N, C, H, W)` in [-1, 1] to images, for instance `VQGANImageProcessor.postprocess`.
        count: largest number of generated images.
        columns: number of images in a row.
    """
    first = {one.train: one for one in reversed(suspects)}
    chosen = [one for one in suspects if first[one.train] is one]
    equal = sum(one.score < SAME for one in chosen)
    chosen = [chosen[place] for place in spread(equal, count)] if equal > count else chosen[:count]
    rows = []
    for start in range(0, len(chosen), columns):
        shown = chosen[start : start + columns]
        nearest = [_row(train[one.view], one.train) for one in shown]
        rows.append(("generated", to_images(torch.cat([_row(generated, one.generated) for one in shown]))))
        rows.append(("nearest in training", to_images(torch.cat(nearest))))
    return rows


def _row(images: ImageSet, row: int) -> Tensor:
    return images.read(range(row, row + 1))


def _require(count: int, least: int, name: str) -> None:
    if count < least:
        raise ValueError(f"{name}: received {count} images; the copying check needs at least {least}; give more")
