"""Scores of images: how probable the prior finds their codes, and of which class they are.

Shape letters: N images, H W height and width in pixels, L codes of an image, C classes, P prompt length.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from configs.arguments import described, instance, whole
from pipelines.arguments import int64_codes
from pipelines.conditions import ConditionTokenizer, not_learnt
from pipelines.heat_maps import overlays, surprise_maps
from pipelines.prompts import Given, class_condition, given_conditions, require_given
from pipelines.requests import prompts_of
from stage1_vqgan import VQGANImageProcessor
from stage2_prior import CLASS, Segment, TokenLayout, code_nats, marginal_nats

if TYPE_CHECKING:
    from pipelines.sampling import CodeSampler

# Numbers that the nats of all codes given each class may have at once.
LARGEST_TABLE = 2**24


@dataclass(frozen=True)
class ScoreOutput:
    """Output of [`VQGANPipeline.score`]. `len(out)` is N. All tensors are on the CPU.

    Attributes:
        nats: float64 `(N,)`, -ln p(codes of the image): the training loss times L. Higher is less probable.
        bits_per_pixel: float64 `(N,)`, nats / (ln 2 · H · W).
        code_nats: float64, the nats of each code; its shape is that of `codes`. `heat_maps` makes pictures of them.
        codes: int64 `(N, h, w)`, `(N, h, w, G)` or `(N, L)`.
        likelihood: what was given: the names of the conditions, joined by "+", as in "class" or "style+text"; or
            "unconditional", with null tokens as the prompt; or "marginal", the mean over all classes, if nothing was
            given and the prior has not learnt the null token of its class.
    """

    nats: Tensor
    bits_per_pixel: Tensor
    code_nats: Tensor
    codes: Tensor
    likelihood: str

    def __len__(self) -> int:
        return len(self.nats)


class Scoring:
    """The methods of a pipeline that score images."""

    vqgan: Any  # VQGANModel; each tensor of its output may be None
    prior: PreTrainedModel
    image_processor: VQGANImageProcessor
    layout: TokenLayout
    _tokenizers: dict[str, ConditionTokenizer]
    _sampler: "CodeSampler"

    if TYPE_CHECKING:

        def encode(self, images: Any) -> Tensor: ...

    @torch.no_grad()
    def score(
        self,
        images: Any = None,
        class_labels: int | str | Sequence[int | str] | Mapping[str, Any] | None = None,
        *,
        text: str | Sequence[str] | Mapping[str, Any] | None = None,
        condition_images: Any = None,
        codes: Any = None,
        batch_size: int | None = None,
    ) -> ScoreOutput:
        """How probable the prior finds the codes of images: the likelihood by which unusual images are found.

        As in the training loss, the probabilities are those of all tokens. `compress` leaves out the tokens that are no
        codes, so it takes at most as many bits.

        Args:
            images: PIL images, arrays or tensors, one or a list; see [`VQGANImageProcessor`].
            class_labels, text, condition_images: as in `VQGANPipeline.generate`: of each image, or one for all images.
                What is left out is a null token, if the prior has learnt to do without it. `likelihood` of the output
                says what was given. If nothing is given, and the prior has not learnt the null token of its class, the
                score is the marginal over the C classes, each equally probable, which takes C forwards.
            codes: in place of images, their codes as `encode` returns them.
            batch_size: sequences in one forward; by default as many as fit in memory.

        Returns:
            [`ScoreOutput`].

        Raises:
            ValueError: an argument is out of range, the prior needs a condition that is not given, or it is masked, so
                that it has no likelihood.
            FloatingPointError: logits or latents were NaN or infinite.
        """
        batch_size = None if batch_size is None else whole("batch_size", batch_size)
        self._require_likelihood("score")
        codes = self._codes_of(images, codes)
        given = given_conditions(self.layout, class_labels, text, condition_images)
        unknown = None if given else needed_class(self.layout)
        if unknown is not None:
            likelihood, nats = "marginal", self._marginal_nats(unknown, codes, batch_size)
        else:
            likelihood = "+".join(one.segment.name for one in given) or "unconditional"
            prompts = self._prompts(len(codes), given)
            with self._scoring(len(codes)) as bar:
                nats = code_nats(self.prior, prompts, codes.flatten(1), batch_size, bar.update)
        total = nats.sum(1, dtype=torch.float64)
        return ScoreOutput(
            nats=total,
            bits_per_pixel=total / (math.log(2) * self.layout.pixels),
            code_nats=nats.double().view(codes.shape),
            codes=codes,
            likelihood=likelihood,
        )

    @torch.no_grad()
    def class_posterior(
        self,
        images: Any = None,
        condition: str | None = None,
        *,
        class_labels: int | str | Sequence[int | str] | Mapping[str, Any] | None = None,
        text: str | Sequence[str] | Mapping[str, Any] | None = None,
        condition_images: Any = None,
        codes: Any = None,
        class_prior: str | Sequence[float] | Tensor = "uniform",
        batch_size: int | None = None,
    ) -> Tensor:
        """The probability of each class given the image, by Bayes' rule.

        p(class | codes) is proportional to p(class) · p(codes | class). It takes C forwards for each image.

        Args:
            images, codes, batch_size: see `score`.
            condition: the condition whose classes are asked for, of a prior with several; by default "class", or the
                only one.
            class_labels, text, condition_images: other conditions, which are known; see `score`.
            class_prior: p(class): "uniform"; "counts", as frequent as in the training data; or C weights from 0 up,
                which are divided by their sum.

        Returns:
            float64 `(N, C)` on the CPU; each row sums to 1.

        Raises:
            ValueError: the prior has no classes or is masked, needs another condition, or an argument is out of range.
            FloatingPointError: logits or latents were NaN or infinite.
        """
        batch_size = None if batch_size is None else whole("batch_size", batch_size)
        self._require_likelihood("class_posterior")
        asked = class_condition(self.layout, condition)
        log_prior = log_class_prior(asked, self.layout.class_counts if asked.name == CLASS else (), class_prior)
        given = given_conditions(self.layout, class_labels, text, condition_images)
        if asked.name in [one.segment.name for one in given]:
            advice = "its probabilities are asked for; leave it out of class_labels"
            raise ValueError(f"class_labels: received the condition {asked.name!r}; {advice}")
        codes = self._codes_of(images, codes)
        prompts = self._prompts(len(codes), given, asked.name)
        with self._scoring(len(codes) * asked.num_tokens) as bar:
            each = self._nats_by_class(asked, prompts, codes, batch_size, bar)
            nats = torch.stack([one.sum(1, dtype=torch.float64) for one in each], 1)
        return (log_prior - nats).softmax(1)

    def heat_maps(self, images: Any, code_nats: Tensor, span: tuple[float, float] | None = None) -> list[Image.Image]:
        """Pictures of where images surprise the prior: each image in gray, under the colours of its bits per pixel.

        A code stands for a patch of pixels, and its nats depend on the codes before it. So a map shows where reading
        became surprising, which may be one patch after the cause.

        Args:
            images: those that were scored.
            code_nats: those of `score(images)`.
            span: bits per pixel of the lowest and of the highest colour. By default the 1st and the 99th percentile of
                these images, so pictures of one call can be compared.

        Returns:
            N RGB images of the size of the decoded images.

        Raises:
            ValueError: the nats are those of other images or of another layout.
        """
        pixels = self.image_processor(images)["pixel_values"]
        instance("code_nats", code_nats, Tensor, "code_nats of score(images)")
        if code_nats.shape != (len(pixels), *self.layout.codes_shape):
            needed = f"must have shape {(len(pixels), *self.layout.codes_shape)}, as that of score(images)"
            raise ValueError(f"code_nats: received {described(code_nats)}; {needed}")
        return overlays(self.image_processor.postprocess(pixels), surprise_maps(code_nats, self.layout), span)

    # ------------------------------------------------------------------ helpers

    def _require_likelihood(self, name: str) -> None:
        """Refuses a masked prior."""
        if self.layout.family != "causal":
            reason = (
                "it predicts hidden codes in any order, so it has no likelihood; use a pipeline with a causal prior"
            )
            raise ValueError(f"{name}: this pipeline has a masked prior: {reason}")

    def _codes_of(self, images: Any, codes: Any) -> Tensor:
        """The codes of either argument, int64 `(N, *codes_shape)` on the CPU."""
        if (images is None) == (codes is None):
            raise ValueError(f"images: received {described(images)}; give either images or codes")
        if codes is None:
            return self.encode(images).cpu()
        codes = int64_codes(codes, 1 + len(self.layout.codes_shape)).cpu()
        if codes.shape[1:] != self.layout.codes_shape:
            needed = f"the prior has learnt images of {self.layout.codes_text} codes"
            raise ValueError(f"codes: received shape {tuple(codes.shape)}; {needed}, {('N', *self.layout.codes_shape)}")
        self.vqgan.check_codes(codes.to(self.vqgan.device), self.layout.grid)
        return codes

    def _prompts(self, count: int, given: Sequence[Given], *later: str) -> Tensor:
        """The prompts of images, int64 `(count, P)`, with null tokens for what is not given; see `prompts_of`.

        Raises:
            ValueError: the prior needs a condition that is neither given nor one of `later`.
        """
        require_given(self.layout, [*later, *(one.segment.name for one in given)])
        return prompts_of(count, given, self.vqgan, self.layout, "codes", self._tokenizers)

    def _nats_by_class(
        self, asked: Segment, prompts: Tensor, codes: Tensor, batch_size: int | None, bar: tqdm
    ) -> Iterator[Tensor]:
        """The nats of all codes given each class of a condition in turn, float32 `(N, L)`."""
        prompts = prompts.clone()
        for number in range(asked.num_tokens):
            prompts[:, self.layout.places[asked.name]] = self.layout.first_tokens[asked.name] + number
            yield code_nats(self.prior, prompts, codes.flatten(1), batch_size, bar.update)

    def _marginal_nats(self, unknown: Segment, codes: Tensor, batch_size: int | None) -> Tensor:
        """float64 `(N, L)`, without any condition; see `marginal_nats`."""
        log_prior = log_class_prior(unknown, (), "uniform")
        at_once = max(1, LARGEST_TABLE // (unknown.num_tokens * self.layout.length))
        parts = []
        with self._scoring(len(codes) * unknown.num_tokens) as bar:
            for part in codes.split(at_once):
                prompts = self.layout.null_prompt().repeat(len(part), 1)
                each = self._nats_by_class(unknown, prompts, part, batch_size, bar)
                parts.append(marginal_nats(torch.stack(list(each), 1), log_prior))
        return torch.cat(parts)

    def _scoring(self, total: int) -> tqdm:
        """A progress bar with the options of the pipeline."""
        return tqdm(total=total, **{"desc": "scoring", "unit": "image", **self._sampler.progress_bar})


def needed_class(layout: TokenLayout) -> Segment | None:
    """The class that a prior needs, if it needs nothing else; None if it needs nothing, or something else too."""
    lacking = not_learnt(layout, [segment.name for segment in layout.conditions])
    return lacking[0] if len(lacking) == 1 and lacking[0].kind == "class" and lacking[0].num_tokens else None


def log_class_prior(segment: Segment, counts: Sequence[int], class_prior: Any) -> Tensor:
    """ln p(class), float64 `(C,)`; see `Scoring.class_posterior`.

    Args:
        segment: the condition with the classes.
        counts: number of training images of each class; empty if it is unknown.
        class_prior: see `Scoring.class_posterior`.

    Raises:
        ValueError: it is neither "uniform" nor "counts" nor C weights, or the counts of the classes are unknown.
    """
    allowed = f"must be 'uniform', 'counts' or {segment.num_tokens} numbers from 0 up, not all 0"
    if isinstance(class_prior, str):
        if class_prior == "counts" and not counts:
            missing = "this pipeline does not record how many images each class had; give 'uniform' or weights"
            raise ValueError(f"class_prior: received 'counts', but {missing}")
        class_prior = {"uniform": [1] * segment.num_tokens, "counts": counts}.get(class_prior, class_prior)
    instance("class_prior", class_prior, (list, tuple, np.ndarray, Tensor), allowed)
    try:
        weights = np.asarray(class_prior.tolist() if isinstance(class_prior, Tensor) else class_prior)
    except (NotImplementedError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"class_prior: received {described(class_prior)}; {allowed}") from error
    good = weights.shape == (segment.num_tokens,) and weights.dtype.kind in "iuf"
    if not good or not np.isfinite(weights).all() or weights.min() < 0 or not weights.max() > 0:
        raise ValueError(f"class_prior: received {described(class_prior)}; {allowed}")
    shares = torch.from_numpy(weights.astype(np.float64) / float(weights.max()))
    return (shares / shares.sum()).log()
