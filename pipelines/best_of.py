"""Best of n: the prior samples several candidates of each image, and the best one is kept.

Shape letters: N images, m candidates of each, n candidates of a batch, C classes, P prompt length.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from configs.arguments import choice, described, whole
from configs.memory import shortage
from configs.randomness import mix
from pipelines.prompts import argument_of, class_condition, classes_of
from pipelines.requests import Request
from stage2_prior import CLASS, Segment, TokenLayout, code_nats, require_callback

MOST_CANDIDATES = 1000

# Codes `(n, *codes_shape)` of some candidates, and their numbers among all N·m → float64 `(n,)`; the higher the better.
Score = Callable[[Tensor, slice], Tensor]
# Images and their classes, see `VQGANPipelineOutput.labels`; None for images of no given class → n numbers. For users.
ImageScore = Callable[[list[Image.Image], Sequence[Any]], Any]


class Best(NamedTuple):
    """The best candidate of each image.

    Attributes:
        codes: int64 `(N, *codes_shape)`.
        numbers: which candidate of its image it is, from 0 to m - 1, int64 `(N,)`.
        scores: float64 `(N,)`.
    """

    codes: Tensor
    numbers: Tensor
    scores: Tensor


class BestOf:
    """The part of `VQGANPipeline.generate` that chooses among candidates."""

    prior: PreTrainedModel
    layout: TokenLayout
    _decoded: Callable[[Tensor, str], list[Any]]

    def _best_of(
        self, request: Request, count: int, best_by: Any, sample: Callable[[Request], Iterable[Tensor]]
    ) -> tuple[Request, Best]:
        """The best of `count` candidates of each image, and the request with their seeds.

        Args:
            request: the images.
            count: m.
            best_by: see `VQGANPipeline.generate`.
            sample: samples codes `(n, *codes_shape)` batch by batch.

        Raises:
            ValueError: so many candidates do not fit in memory.
        """
        require_room(request.prompts, count)
        seeds = candidate_seeds(request.seeds, count)
        images = [image for image in range(len(seeds)) for _ in range(count)]
        candidates = request._replace(
            prompts=request.prompts[images],
            seeds=seeds.flatten(),
            options=request.options.of_images(images),
            labels=[request.labels[image] for image in images] if request.labels else None,
            output_type="pil" if callable(best_by) else "codes",  # what they need memory for
        )
        best = best_candidates(sample(candidates), count, self._score(candidates, best_by))
        return request._replace(seeds=seeds.gather(1, best.numbers[:, None])[:, 0]), best

    def _score(self, candidates: Request, best_by: Any) -> Score:
        """The score by which candidates are compared."""
        prompts = candidates.prompts
        labels: Sequence[Any] = candidates.labels or [None] * len(prompts)
        if best_by == "likelihood":
            return lambda codes, some: log_likelihood(self.prior, prompts[some], codes)
        if isinstance(best_by, str):
            asked = class_condition(self.layout, best_by, "best_by")
            return lambda codes, some: log_posterior(self.prior, self.layout, asked, prompts[some], codes)

        def score(codes: Tensor, some: slice) -> Tensor:
            images = [image for part in self._decoded(codes, "pil") for image in part]
            return checked_scores(best_by(images, labels[some]), len(images))

        return score


def require_best_of(layout: TokenLayout, best_of: Any, best_by: Any, given: Collection[str], is_larger: bool) -> int:
    """The number of candidates of each image.

    Args:
        layout: the token layout.
        best_of, best_by: see `VQGANPipeline.generate`.
        given: names of the conditions that are given.
        is_larger: whether the images are larger than those of the training.

    Raises:
        ValueError: an argument is out of range, or the prior cannot give such scores.
    """
    count = whole("best_of", best_of, most=MOST_CANDIDATES)
    if best_by is None:
        if count > 1:
            needs = "needs 'likelihood', 'class' or a function of images and labels"
            raise ValueError(f"best_by: received None; best_of {count} {needs}")
        return count
    if callable(best_by):
        require_callback("best_by", best_by, "images and labels")
        return count
    classes = [segment.name for segment in classes_of(layout)]
    choice("best_by", best_by, ["likelihood", *dict.fromkeys([CLASS, *classes])])
    if layout.family != "causal":
        reason = "this pipeline has a masked prior, which has no likelihood; give a function of images and labels"
        raise ValueError(f"best_by: received {best_by!r}; {reason}")
    if is_larger:
        reason = "the prior has no likelihood of images of another image_size; give a function of images and labels"
        raise ValueError(f"best_by: received {best_by!r}; {reason}")
    if best_by != "likelihood":
        asked = class_condition(layout, best_by, "best_by")
        if asked.name not in given:
            raise ValueError(f"best_by: received {best_by!r}; needs {argument_of(layout, asked)}")
    return count


def require_room(prompts: Tensor, count: int) -> None:
    """Refuses requests of `count` candidates of each image, prompts `(N, P)`, that memory cannot hold.

    Raises:
        ValueError: they do not fit.
    """
    numbers = prompts.shape[1] + 4  # the prompt, the seed and what makes it, and the number of the image
    if lack := shortage(8 * numbers * count * len(prompts), torch.device("cpu")):
        received = f"received {count} for {len(prompts):,} images"
        raise ValueError(f"best_of: {received}; {lack}; ask for fewer candidates, or fewer images at once")


def candidate_seeds(seeds: Tensor, count: int) -> Tensor:
    """The seeds of the candidates of each image, int64 `(N, m)` from 0 up: its own first, then hashes of it.

    Args:
        seeds: int64 `(N,)`.
        count: m.
    """
    numbers = torch.arange(count, device=seeds.device)
    hashed = mix(mix(seeds)[:, None] ^ mix(numbers)) & (2**63 - 1)
    return torch.where(numbers == 0, seeds[:, None], hashed)


def best_candidates(batches: Iterable[Tensor], count: int, score: Score) -> Best:
    """Keeps the best candidate of each image, the first of equal ones.

    Args:
        batches: codes `(n, *codes_shape)` of all candidates in order: first those of the first image.
        count: m.
        score: see `Score`.
    """
    codes: list[Tensor] = []
    numbers: list[int] = []
    scores: list[float] = []
    start = 0
    for batch in batches:
        found = score(batch, slice(start, start + len(batch))).tolist()
        for row, value in enumerate(found):
            image, number = divmod(start + row, count)
            if number == 0:
                codes.append(batch[row].clone())
                numbers.append(0)
                scores.append(value)
            # scores of equal codes may differ by rounding
            elif value > scores[image] and not torch.equal(batch[row], codes[image]):
                codes[image], numbers[image], scores[image] = batch[row].clone(), number, value
        start += len(batch)
    return Best(torch.stack(codes), torch.tensor(numbers), torch.tensor(scores, dtype=torch.float64))


def log_likelihood(prior: PreTrainedModel, prompts: Tensor, codes: Tensor) -> Tensor:
    """ln p(codes | prompt) of codes `(n, *codes_shape)`, without guidance and temperature, float64 `(n,)`."""
    return -code_nats(prior, prompts, codes.flatten(1)).sum(1, dtype=torch.float64)


def log_posterior(
    prior: PreTrainedModel, layout: TokenLayout, asked: Segment, prompts: Tensor, codes: Tensor
) -> Tensor:
    """ln p(class | codes, other conditions) of the class in each prompt, float64 `(n,)`.

    Bayes' rule with equally probable classes, as in `class_posterior`.

    Args:
        prior: the prior.
        layout: the token layout.
        asked: the condition with the classes.
        prompts: int64 `(n, P)`.
        codes: `(n, *codes_shape)`.
    """
    place, first = layout.places[asked.name], layout.first_tokens[asked.name]
    likelihoods = []
    for token in range(first, first + asked.num_tokens):
        as_class = prompts.clone()
        as_class[:, place] = token
        likelihoods.append(log_likelihood(prior, as_class, codes))
    return torch.stack(likelihoods, 1).log_softmax(1).gather(1, prompts[:, place] - first)[:, 0]


def checked_scores(scores: Any, count: int) -> Tensor:
    """What a user's function returned, as float64 `(count,)`.

    Raises:
        ValueError: these are not so many finite numbers.
    """
    try:
        array = np.asarray(scores.detach().cpu() if isinstance(scores, Tensor) else scores)
        good = array.shape == (count,) and array.dtype.kind in "iuf" and bool(np.isfinite(array).all())
    except (TypeError, ValueError):
        good = False
    if not good:
        needed = f"must return {count} finite numbers, one for each image"
        raise ValueError(f"best_by: the function returned {described(scores)}; it {needed}")
    return torch.from_numpy(array.astype(np.float64))
